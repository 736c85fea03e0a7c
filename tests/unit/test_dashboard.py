# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The dashboard for Grafana is about metrics and labels that there are, and each of its parts has a place."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.vmfleet.backup.plugins.module_utils._report.prometheus import metrics
from ansible_collections.vmfleet.backup.tests.harness.reports import a_vm

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "grafana" / "vmfleet_backup.json").read_text(encoding="utf-8")
)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
WRITTEN = metrics("/srv/backup", [a_vm()], 0)
NAMES = set(re.findall(r"^(vmfleet_\w+)\{", WRITTEN, re.MULTILINE))
# Prometheus adds the label of the hypervisor.
LABELS = {*re.findall(r'[{,](\w+)="', WRITTEN), "instance"}


def test_metrics_are_those_that_are_written() -> None:
    queries = [*QUERIES, VARIABLES["repository"]["query"]["query"]]
    assert set(re.findall(r"vmfleet_\w+", " ".join(queries))) == NAMES


def test_labels_are_those_that_are_written() -> None:
    legends = [target["legendFormat"] for panel in PANELS for target in panel["targets"]]
    used = {
        *re.findall(r"(\w+)=~?\"", " ".join(QUERIES)),
        *(label for found in re.findall(r"by \(([^)]*)\)", " ".join(QUERIES)) for label in found.split(", ")),
        *re.findall(r"\{\{(\w+)\}\}", " ".join(legends)),
    }
    assert used <= LABELS
    assert used >= {"repository", "vm"}


def test_panels_have_names_and_places_of_their_own() -> None:
    for one in ("id", "title"):
        assert len({panel[one] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_the_source_and_the_repositories_can_be_chosen() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert [each["datasource"] for panel in PANELS for each in (panel, *panel["targets"])].count(source) == len(
        PANELS
    ) + len(QUERIES)
    assert set(re.findall(r"\$\{?(\w+)", " ".join(QUERIES))) == {"repository"}
    assert set(VARIABLES) == {"datasource", "repository"}


def test_the_columns_of_the_table_are_its_queries() -> None:
    [table] = [panel for panel in PANELS if panel["type"] == "table"]
    letters = [target["refId"] for target in table["targets"]]
    assert len(set(letters)) == len(letters)
    organize = next(each["options"] for each in table["transformations"] if each["id"] == "organize")
    columns = {*(f"Value #{letter}" for letter in letters), "repository", "vm", "level"}
    hidden = {name for name, is_hidden in organize["excludeByName"].items() if is_hidden}
    assert {*organize["renameByName"], *hidden} == {*columns, "Time"}
    assert set(organize["indexByName"]) == columns - hidden
    named = {override["matcher"]["options"] for override in table["fieldConfig"]["overrides"]}
    assert named <= set(organize["renameByName"].values())


@pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool")
def test_promtool_takes_the_queries(tmp_path: Path) -> None:
    rules = [
        {"record": f"query_{number}", "expr": query.replace("$repository", ".*")}
        for number, query in enumerate(QUERIES)
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The example of alert rules is about metrics that there are, and the guide shows it as it is."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.vmfleet.backup.plugins.module_utils._report.prometheus import HELP

DOCS = Path(__file__).parents[2] / "docs"
RULES = DOCS / "prometheus" / "vmfleet_backup.rules.yml"
GUIDE = DOCS / "docsite" / "rst" / "guide_reports.rst"

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="there is no promtool")

SERIES = 'repository="/srv/backup", vm="web01"'

# What happens on the way, in values of one a minute: the alerts that have fired after so many hours.
STORIES: dict[str, tuple[dict[str, str], int, set[str]]] = {
    "all is well": (
        {
            f"vmfleet_backup_last_success_timestamp_seconds{{{SERIES}}}": "0x1000 60000x2000",
            f"vmfleet_backup_last_verified_timestamp_seconds{{{SERIES}}}": "0x1000 60000x2000",
            f"vmfleet_backup_failed{{{SERIES}}}": "0x3000",
            f"vmfleet_backup_damaged{{{SERIES}}}": "0x3000",
            'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "0x1000 60000x2000",
        },
        40,
        set(),
    ),
    "the last set is old": (
        {
            f'vmfleet_backup_last_success_timestamp_seconds{{{SERIES}, instance="hv1"}}': "0x3000",
            'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "0x1000 60000x2000",
        },
        27,
        {"VmBackupTooOld"},
    ),
    "it has moved": (
        {
            f'vmfleet_backup_last_success_timestamp_seconds{{{SERIES}, instance="hv1"}}': "0x3000",
            f'vmfleet_backup_last_success_timestamp_seconds{{{SERIES}, instance="hv2"}}': "60000x3000",
            'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "0x1000 60000x2000",
        },
        27,
        set(),
    ),
    "failed and damaged": (
        {
            f"vmfleet_backup_failed{{{SERIES}}}": "1x100",
            f"vmfleet_backup_damaged{{{SERIES}}}": "1x100",
            'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "0x100",
        },
        1,
        {"VmBackupFailed", "VmBackupDamaged"},
    ),
    "never verified": (
        {
            f"vmfleet_backup_last_verified_timestamp_seconds{{{SERIES}}}": "0x20000",
            'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "700000x20000",
        },
        24 * 9 + 1,
        {"VmBackupNotVerified"},
    ),
    "not run": (
        {'vmfleet_backup_last_run_timestamp_seconds{repository="/srv/backup"}': "0x3000"},
        27,
        {"VmBackupNotRun"},
    ),
    "nobody tells anything": ({"up": "1x100"}, 1, {"VmBackupUnknown"}),
}


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def test_rules_are_about_metrics_that_there_are() -> None:
    for rule in rules():
        used = set(re.findall(r"vmfleet_\w+", rule["expr"]))
        assert used
        assert used <= set(HELP), rule["alert"]


def test_each_rule_says_what_is_wrong_and_how_bad_it_is() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


def test_the_guide_shows_them() -> None:
    text = RULES.read_text(encoding="utf-8").split("---\n")[1]
    assert textwrap.indent(text, "   ") in GUIDE.read_text(encoding="utf-8")


def test_the_guide_names_every_metric() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert set(re.findall(r"``(vmfleet_backup_\w+)``", text)) == set(HELP)


@needs_promtool
def test_promtool_takes_them() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("story", STORIES)
def test_they_fire_when_they_should_and_only_then(story: str, tmp_path: Path) -> None:
    series, hours, fired = STORIES[story]
    expression = 'count by (alertname) (ALERTS{alertstate="firing"})'
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fired)]
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "10m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": expression, "eval_time": f"{hours}h", "exp_samples": samples}],
            }
        ],
    }
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

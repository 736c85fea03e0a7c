# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What GitHub runs for us is what `make test` runs, with actions that are pinned and with the fewest rights."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parents[2]
WORKFLOWS = sorted((HERE / ".github" / "workflows").glob("*.yml"))
# What may be written to, beside by nobody.
RIGHTS = {
    ("docs.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"contents": "write"},
}


def read(path: Path) -> dict[str, t.Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_job_for_each_check_of_make_test() -> None:
    jobs = read(HERE / ".github" / "workflows" / "test.yml")["jobs"]
    [checks] = re.findall(r"^test:.*\n(?:\t.*\n)*\t@.*tools/check (.*)$", (HERE / "Makefile").read_text(), re.MULTILINE)
    assert sorted(jobs["test"]["strategy"]["matrix"]["target"]) == sorted(checks.split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_may_read_unless_they_publish(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions", {}) == RIGHTS.get((path.name, name), {})


@pytest.mark.parametrize("path", [*WORKFLOWS, *HERE.glob(".github/actions/*/*.yml")], ids=lambda path: path.name)
def test_actions_are_pinned_by_their_major_version(path: Path) -> None:
    used = re.findall(r"uses: *(\S+)", path.read_text(encoding="utf-8"))
    assert used
    for action in used:
        if action.startswith("./"):
            assert (HERE / action).exists()
        else:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", action)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Others can change the repository, a part of it, or the directory of reports or metrics."""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.hostile import NEIGHBOUR, ODD, Pair, ask, said
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files are given to others by root")

NEW = "s9"
SOMEBODY = 1000


def expose(path: Path, how: int | str) -> None:
    """Give something these permissions, or to somebody else."""
    if isinstance(how, str):
        os.chown(path, SOMEBODY, SOMEBODY)
    else:
        path.chmod(how)


def work(pair: Pair, directory: Path, **options: t.Any) -> dict[str, dict[str, t.Any]]:
    """Do all that writes, and say so beforehand."""
    given = {"repository": str(pair.library.path), **options}
    monitors = [{"monitor": str(vm.monitor)} for vm in pair.vms]
    (directory / "metrics").mkdir(mode=0o755)
    results = {
        "restore": ask("backup_restore", {**given, "vm": ODD, "directory": str(directory)}),
        "verify": ask("backup_verify", {**given, "depth": "manifest"}),
        "plan": ask("backup_plan", {**given, "id": NEW, "reserve": "0", "vms": monitors}),
    }
    plan = results["plan"].get("plan")
    results["set"] = ask("backup_set", {"plan": plan, **options} if plan else {**given, "state": "cancelled"})
    results["prune"] = ask("backup_prune", {**given, "keep_last": 1})
    return results


def refused(results: dict[str, dict[str, t.Any]]) -> set[str]:
    return {verb for verb, result in results.items() if result["rc"]}


WAYS = (0o777, 0o775, 0o1777, "another's")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("place", [".", "vmfleet.json"])
def test_a_repository_that_others_can_change(pair: Pair, directory: Path, place: str, how: int | str) -> None:
    path = pair.library.path / place
    expose(path, how)
    results = work(pair, directory)
    assert refused(results) == {"plan", "prune"}
    for verb in ("plan", "prune"):
        assert results[verb]["msg"].startswith(f"repository: {path} is "), results[verb]["msg"]
        assert "trust_others: true" in results[verb]["msg"]
    for verb in ("restore", "verify"):
        assert any(str(path) in warning and "trust_others" in warning for warning in results[verb]["warnings"]), verb
    assert not list(pair.odd.glob(".*.json"))
    pair.assert_neighbour_whole()


@pytest.mark.parametrize("how", WAYS)
def test_a_vm_whose_directory_others_can_change(pair: Pair, directory: Path, how: int | str) -> None:
    expose(pair.odd, how)
    results = work(pair, directory)
    assert refused(results) == {"set", "prune"}
    found = result_of(results["set"], ODD)
    assert found["state"] == "failed"
    assert f"{pair.odd} is " in found["error"]
    assert result_of(results["set"], NEIGHBOUR)["state"] == "published"
    assert f"{pair.odd} is " in results["prune"]["msg"]
    assert NEW in [one["id"] for one in results["prune"]["kept"] if one["vm"] == NEIGHBOUR]
    for verb in ("restore", "verify"):
        assert any(str(pair.odd) in warning for warning in results[verb]["warnings"]), verb


@pytest.mark.parametrize("place", [".", "vmfleet.json", ODD])
@pytest.mark.parametrize("how", [0o777, "another's"])
def test_others_can_be_trusted(pair: Pair, directory: Path, place: str, how: int | str) -> None:
    expose(pair.library.path / place, how)
    results = work(pair, directory, trust_others=True)
    assert not refused(results)
    assert result_of(results["set"], ODD)["state"] == "published"
    assert "trust_others: true" not in said(results["restore"])


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o2750, 0o1755])
def test_what_others_can_only_read_is_in_order(pair: Pair, directory: Path, mode: int) -> None:
    pair.library.path.chmod(mode)
    pair.odd.chmod(mode)
    assert not refused(work(pair, directory))


@pytest.mark.parametrize("how", WAYS)
def test_a_repository_is_not_made_where_others_write(pair: Pair, directory: Path, how: int | str) -> None:
    place = directory / "new"
    place.mkdir(mode=0o755)
    expose(place, how)
    given = {"repository": str(place), "create_repository": True, "vms": [{"monitor": str(pair.vms[0].monitor)}]}
    result = ask("backup_plan", given)
    assert result["rc"]
    assert result["msg"].startswith(f"repository: {place} is ")
    assert not ask("backup_plan", {**given, "trust_others": True})["rc"]


@pytest.mark.parametrize("how", WAYS)
def test_reports_that_others_can_change(directory: Path, how: int | str) -> None:
    place = directory / "texts"
    place.mkdir(mode=0o755)
    expose(place, how)
    given = {"directory": str(place), "id": NEW, "hypervisors": {}}
    result = ask("backup_report", given)
    assert result["rc"]
    assert result["msg"].startswith(f"directory: {place} is "), result["msg"]
    assert not list(place.iterdir())
    assert not ask("backup_report", {**given, "trust_others": True})["rc"]


@pytest.mark.parametrize("how", WAYS)
def test_metrics_go_into_a_directory_of_the_collector(pair: Pair, directory: Path, how: int | str) -> None:
    place, elsewhere = directory / "texts", directory / "elsewhere"
    place.mkdir(mode=0o755)
    given = {"repository": str(pair.library.path), "id": NEW, "directory": str(place)}
    file = pathlib.Path(ask("backup_metrics", given)["path"])
    expose(place, how)
    before = file.stat().st_ino
    assert not ask("backup_metrics", given)["rc"]
    assert file.stat().st_ino != before
    elsewhere.write_text("not ours")
    file.unlink()
    file.symlink_to(elsewhere)
    result = ask("backup_metrics", given)
    assert result["rc"]
    assert f"{file} is a symbolic link" in result["msg"], result["msg"]
    assert elsewhere.read_text() == "not ours"


def test_a_directory_of_reports_that_is_made(directory: Path) -> None:
    place = directory / "reports"
    before = os.umask(0)
    try:
        assert not ask("backup_report", {"directory": str(place), "id": NEW, "hypervisors": {}})["rc"]
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o750

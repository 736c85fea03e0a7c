# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Something else stands in a repository than its name says: a link, a pipe, a device, a directory, a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.hostile import (
    NEIGHBOUR,
    ODD,
    Canary,
    Pair,
    ask,
    put_socket,
    put_zeroes,
    said,
)
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

NEW = "s9"
"""The set that is to be made."""


def mkdir(path: Path, _canary: Canary) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def move(path: Path, canary: Canary) -> None:
    """What an admin does who needs space."""
    there = canary.path.parent / "moved"
    if path.exists():
        path.rename(there)
    else:
        there.mkdir()
        (there / "vda.qcow2").write_text("an image")
    path.symlink_to(there)


KINDS: dict[str, t.Callable[[Path, Canary], object]] = {
    "link to a set": lambda path, canary: path.symlink_to(canary.path / "s1"),
    "link to a file": lambda path, canary: path.symlink_to(canary.file),
    "link to nothing": lambda path, canary: path.symlink_to(canary.path / "nothing"),
    "link to itself": lambda path, _canary: path.symlink_to(path.name),
    "pipe": lambda path, _canary: os.mkfifo(path),
    "socket": lambda path, _canary: put_socket(path),
    "device": lambda path, _canary: put_zeroes(path),
    "hard link": lambda path, canary: path.hardlink_to(canary.file),
    "directory": mkdir,
    "file": lambda path, _canary: path.write_text("something"),
    "moved": move,
}


def put(kind: str, path: Path, canary: Canary) -> None:
    """Put something in the place of what stands there, or of what might."""
    if kind != "moved" and path.is_dir():
        shutil.rmtree(path)
    elif kind != "moved":
        path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path, canary)


def work(pair: Pair, where: Path) -> dict[str, dict[str, t.Any]]:
    """Do everything with a repository that is done with one; return what is said."""
    path = str(pair.library.path)
    monitors = [{"monitor": str(vm.monitor)} for vm in pair.vms]
    (where / "metrics").mkdir(parents=True)
    results = {
        "info": ask("backup_info", {"repository": path}),
        "verify": ask("backup_verify", {"repository": path, "depth": "checksum"}),
        "restore": ask("backup_restore", {"repository": path, "vm": ODD, "directory": str(where)}),
        "plan": ask("backup_plan", {"repository": path, "id": NEW, "reserve": "0", "vms": monitors}),
    }
    results["set"] = ask("backup_set", {"plan": results["plan"]["plan"]})
    results["prune"] = ask("backup_prune", {"repository": path, "keep_last": 1, "consolidate": True})
    told = {"id": NEW, "results": results["set"]["vms"], "directory": str(where / "metrics")}
    results["metrics"] = ask("backup_metrics", {"repository": path, **told})
    return results


def assert_neighbour_was_served(results: dict[str, dict[str, t.Any]]) -> None:
    """All was done with the healthy VM that was asked for."""
    assert NEIGHBOUR in [vm["name"] for vm in results["info"]["vms"]]
    verified = [found for found in results["verify"]["results"] if found["vm"] == NEIGHBOUR]
    assert verified
    assert all(not found["error"] for found in verified)
    assert result_of(results["set"], NEIGHBOUR)["state"] == "published"
    assert [one["id"] for one in results["prune"]["kept"] if one["vm"] == NEIGHBOUR] == [NEW]


LINKS = ("moved", "link to a file", "link to nothing")
ALL = {"info", "verify", "restore", "plan", "set", "prune", "metrics"}

# Of each place: what may stand there, who names it, who refuses to work on the VM for it, and what becomes of its set.
TABLE: list[tuple[str, tuple[str, ...], set[str], set[str], str]] = [
    (".", (*LINKS, "link to a set", "link to itself"), ALL, ALL - {"plan"}, "failed"),
    (".", ("pipe", "socket", "device", "file"), {"plan", "restore", "set"}, {"restore", "set", "metrics"}, "failed"),
    (
        "s1",
        (*LINKS, "link to a set"),
        {"info", "verify", "restore", "plan", "prune"},
        {"verify", "restore", "prune"},
        "published",
    ),
    ("s1", ("pipe", "device", "file", "directory"), {"info"}, {"restore", "verify"}, "published"),
    (
        "s2",
        (*LINKS, "link to itself"),
        {"info", "verify", "restore", "plan", "prune"},
        {"verify", "restore", "prune"},
        "published",
    ),
    ("s2", ("socket", "file"), {"info"}, set(), "published"),
    (
        f".{NEW}.staging",
        (*LINKS, "link to a set", "pipe", "socket", "file"),
        {"info", "verify", "plan", "set", "prune"},
        {"verify", "set", "prune"},
        "failed",
    ),
    (
        f".{NEW}.staging/intent.json",
        (*LINKS, "pipe", "device", "directory"),
        {"info", "verify", "plan", "set", "prune"},
        {"verify", "set", "prune"},
        "failed",
    ),
    (".s0.removed", (*LINKS, "link to a set", "pipe", "file"), {"info", "verify", "plan"}, {"verify"}, "published"),
    (
        ".lock",
        (*LINKS, "pipe", "socket", "device", "directory"),
        {"set", "prune", "restore", "verify"},
        {"set", "prune"},
        "failed",
    ),
    (".prune.lock", (*LINKS, "pipe", "device", "directory"), {"prune"}, {"prune"}, "published"),
    (
        "s2/manifest.json",
        (*LINKS, "link to itself", "pipe", "device", "directory"),
        {"info", "verify", "restore", "plan", "prune"},
        {"verify", "restore", "prune"},
        "published",
    ),
    (
        "s1/drive0.qcow2",
        (*LINKS, "pipe", "device", "directory", "hard link"),
        {"info", "verify", "restore"},
        {"verify", "restore"},
        "published",
    ),
    ("s2/vm.json", (*LINKS, "pipe", "device", "directory"), {"verify"}, {"verify"}, "published"),
    (
        ".s1.protected.json",
        (*LINKS, "pipe", "device", "directory"),
        {"info", "verify", "prune"},
        {"verify", "prune"},
        "published",
    ),
    (".s1.verified.json", (*LINKS, "socket"), {"info", "verify", "prune"}, {"verify", "prune"}, "published"),
    (
        ".s1.pin-01234567.json",
        (*LINKS, "pipe", "directory"),
        {"info", "verify", "prune"},
        {"verify", "prune"},
        "published",
    ),
    (
        ".s2.consolidation.json",
        (*LINKS, "pipe", "directory"),
        {"info", "verify", "plan", "prune"},
        {"verify", "prune"},
        "published",
    ),
    (f".{NEW}.failed.json", (*LINKS, "pipe", "directory"), {"info", "verify", "plan"}, {"verify"}, "published"),
    (".s2.drive0.qcow2.consolidating", (*LINKS, "pipe", "hard link"), {"info"}, set(), "published"),
    (".s2.drive0.qcow2.consolidating", ("directory",), {"info"}, set(), "published"),
    (".s2.verified.json.new", (*LINKS, "pipe", "hard link"), {"info"}, set(), "published"),
    (".s2.verified.json.new", ("directory",), {"info"}, set(), "published"),
]


@pytest.mark.parametrize(
    ("place", "kind", "tell", "refuse", "state"),
    [(place, kind, *expected) for place, kinds, *expected in TABLE for kind in kinds],
)
def test_what_stands_there_is_named_and_left_alone(
    pair: Pair, canary: Canary, directory: Path, place: str, kind: str, tell: set[str], refuse: set[str], state: str
) -> None:
    path = pair.odd / place
    put(kind, path, canary)
    moved = directory / "moved"
    before = snapshot(moved) if moved.exists() else None
    results = work(pair, directory / "restored")
    assert {verb for verb, result in results.items() if str(path) in said(result)} >= tell
    assert {verb for verb, result in results.items() if result["rc"]} == refuse
    assert result_of(results["set"], ODD)["state"] == state
    canary.assert_untouched()
    assert_neighbour_was_served(results)
    if before is not None:
        assert snapshot(moved) == before


@pytest.mark.parametrize("kind", [*LINKS, "link to itself", "pipe", "socket", "device", "directory"])
def test_the_marker_of_a_repository(pair: Pair, canary: Canary, directory: Path, kind: str) -> None:
    path = pair.library.path / "vmfleet.json"
    put(kind, path, canary)
    given = {"repository": str(pair.library.path)}
    monitors = [{"monitor": str(vm.monitor)} for vm in pair.vms]
    (directory / "restored").mkdir()
    results = [
        ask("backup_info", given),
        ask("backup_verify", given),
        ask("backup_restore", {**given, "vm": ODD, "directory": str(directory / "restored")}),
        ask("backup_plan", {**given, "create_repository": True, "vms": monitors}),
        ask("backup_set", {**given, "state": "cancelled"}),
        ask("backup_prune", {**given, "keep_last": 1}),
        ask("backup_metrics", {**given, "id": NEW}),
    ]
    for result in results:
        assert result["rc"], result
        assert str(path) in result["msg"]
    pair.assert_neighbour_whole()


def test_the_plan_says_it_once(pair: Pair, canary: Canary) -> None:
    path = pair.odd / "s2" / "manifest.json"
    put("link to a file", path, canary)
    monitors = [{"monitor": str(vm.monitor)} for vm in pair.vms]
    given = {"repository": str(pair.library.path), "id": NEW, "reserve": "0", "vms": monitors}
    assert len([one for one in ask("backup_plan", given)["warnings"] if str(path) in one]) == 1


@pytest.mark.parametrize("place", [".", "s1", "s2"])
def test_what_was_moved_can_come_back(pair: Pair, canary: Canary, directory: Path, place: str) -> None:
    """Nothing that was done meanwhile has hurt it."""
    path = pair.odd / place
    put("moved", path, canary)
    work(pair, directory / "restored")
    path.unlink()
    (directory / "moved").rename(path)
    found = {one["id"]: one["broken"] for one in pair.library.info(names=[ODD])["sets"]}
    assert found.items() >= {"s1": "", "s2": ""}.items()
    results = work(pair, directory / "again")
    assert not {verb for verb, result in results.items() if result["rc"]}, results
    assert NEW in [one["id"] for one in results["prune"]["kept"] if one["vm"] == ODD]


def test_a_second_name_of_a_set_is_in_nobodys_way(pair: Pair, directory: Path) -> None:
    (pair.odd / "latest").symlink_to("s2")
    results = work(pair, directory / "restored")
    assert not {verb for verb, result in results.items() if result["rc"]} - {"verify"}, results
    assert [one["what"] for one in results["info"]["leftovers"]] == ["no set: no valid manifest"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("place", [".", "s1"])
def test_a_mount_in_the_place_of_what_was_moved(pair: Pair, directory: Path, place: str) -> None:
    """The remedy for one that does not fit where it was: what is there is read, and stays as long as it is mounted."""
    path = pair.odd / place
    path.rename(directory / "moved")
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "--bind", directory / "moved", path], check=True)
    try:
        results = work(pair, directory / "restored")
        refuse = {verb for verb, result in results.items() if result["rc"]}
        assert refuse == ({"prune"} if place == "s1" else set()), results
        if refuse:
            assert f"{path}: Device or resource busy" in results["prune"]["msg"]
            assert {NEW, "s1"} <= set(pair.library.listed(ODD))
    finally:
        subprocess.run(["umount", path], check=True)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_info: all that is told is true, and nothing is left out."""

from __future__ import annotations

import json
import os
import shutil
import typing as t
from datetime import UTC, datetime

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Protection, Verification
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness.backup import release
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, SIZE, Chain, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms

pytestmark = pytest.mark.usefixtures("clean")


def test_everything_about_a_set(library: Library) -> None:
    before = library.content()
    found = library.info()
    assert not found["changed"]
    assert [(one["vm"], one["id"], one["sequence"]) for one in found["sets"]] == [
        (NAME, f"s{number}", number) for number in (3, 2, 1)
    ]
    manifest = library.manifest(NAME, "s3")
    images = library.images(NAME, "s3")
    assert found["sets"][0] == {
        "vm": NAME,
        "id": "s3",
        "sequence": 3,
        "level": "incremental",
        "created": manifest["started"],
        "bytes": sum(image.stat().st_size for image in images.values()),
        "consistency": "crash",
        "disks": {disk: image.stat().st_size for disk, image in images.items()},
        "parents": ["s2"],
        "chain": 3,
        "broken": "",
        "verified": {},
        "decrypted": [],
        "protected": False,
        "used_by": [],
    }
    assert [(one["parents"], one["chain"]) for one in found["sets"][1:]] == [(["s1"], 2), ([], 1)]
    [vm] = found["vms"]
    age = vm.pop("age")
    assert vm.pop("uuid") == manifest["vm"]["uuid"]
    begun = datetime.fromisoformat(manifest["started"])
    assert 0 <= age <= (datetime.now(UTC) - begun).total_seconds()
    assert vm == {
        "name": NAME,
        "sets": 3,
        "bytes": sum(one["bytes"] for one in found["sets"]),
        "newest": "s3",
        "created": manifest["started"],
        "level": "incremental",
        "verified": "",
        "ok": True,
    }
    assert found["leftovers"] == []
    assert found["totals"] == {"vms": 1, "sets": 3, "bytes": vm["bytes"], "broken": 0, "leftovers": 0}
    assert library.content() == before
    assert succeed("backup_info", {"repository": str(library.path)}, check=True)["sets"] == found["sets"]


def test_what_is_said_of_sets(library: Library, directory: Path) -> None:
    repository = open_repository(str(library.path))
    attempts = {set_id: library.manifest(NAME, set_id)["attempt"] for set_id in ("s1", "s3")}
    write_annotation(repository, NAME, Protection("s1", "2026-11-22T00:00:00Z"))
    write_annotation(repository, NAME, Verification("s1", attempts["s1"], "image", "2026-11-22T00:00:00Z"))
    write_annotation(
        repository, NAME, Verification("s3", attempts["s3"], "checksum", "2026-11-22T00:00:00Z", ("bad", "worse"))
    )
    look = directory / "look"
    library.restore(id="s2", method="overlay", disks=[{"name": "drive0", "target": str(look)}])
    found = library.info()
    newest, middle, oldest = found["sets"]
    assert newest["verified"] == {
        "depth": "checksum",
        "when": "2026-11-22T00:00:00Z",
        "ok": False,
        "errors": ["bad", "worse"],
    }
    assert (oldest["verified"]["depth"], oldest["verified"]["ok"], oldest["protected"]) == ("image", True, True)
    assert middle["used_by"] == [f"{look} on {os.uname().nodename}"]
    assert [(vm["verified"], vm["ok"]) for vm in found["vms"]] == [("", False)]
    assert found["leftovers"] == []


def test_broken_sets_are_told_with_the_reason(library: Library) -> None:
    image = library.images(NAME, "s2")["drive1"]
    image.unlink()
    found = library.info()
    reason = f"disk drive1: image {image} is missing"
    assert [one["broken"] for one in found["sets"]] == [reason, reason, ""]
    assert (found["totals"]["broken"], found["vms"][0]["ok"]) == (2, False)


def test_leftovers_of_every_kind(vms: Vms, directory: Path) -> None:
    chain = Chain(vms, directory, sets=2)
    library = chain.library
    for disk in ("drive0", "drive1"):
        chain.vm.write(disk, 1, 0, SIZE)
    plan = library.start(chain.vm, id="s3", speed="64K")
    place = library.path / NAME
    (place / "s8").mkdir()
    (place / "README").write_text("hands off")
    (place / ".s0.removed").mkdir()
    (place / ".s2.drive0.qcow2.consolidating").touch()
    look = directory / "look"
    library.restore(id="s2", method="overlay", disks=[{"name": "drive0", "target": str(look)}])
    look.unlink()
    [pin] = place.glob(".*.pin-*.json")
    # A VM whose backups have always failed.
    (library.path / "web02").mkdir()
    failed = library.path / "web02" / ".s3.failed.json"
    times = {"started": "2026-11-22T01:00:00Z", "ended": "2026-11-22T01:00:00Z"}
    failure = {"run": "r", "attempt": "a", "id": "s3", "state": "failed", "error": "no room", "schema": 1, **times}
    failed.write_text(json.dumps(failure))
    found = library.info()
    told = {(entry["vm"], entry["path"].split("/")[-1]): entry["what"] for entry in found["leftovers"]}
    intent = json.loads((place / ".s3.staging" / "intent.json").read_text())
    assert told == {
        (NAME, ".s3.staging"): f"set s3 is being made by hypervisor {os.uname().nodename} since {intent['started']}",
        (NAME, ".s0.removed"): "left by a process that was killed",
        (NAME, ".s2.drive0.qcow2.consolidating"): (
            "an increment that becomes a full image, or was to; the next prune goes on"
        ),
        (NAME, pin.name): f"{look}, which has read set s2, is gone",
        (NAME, "README"): "no set: no valid manifest",
        (NAME, "s8"): "no set: no valid manifest",
        ("web02", ".s3.failed.json"): "set s3 failed: no room",
    }
    assert found["totals"]["leftovers"] == len(told)
    assert [vm["name"] for vm in found["vms"]] == [NAME]
    # What can go goes with the next prune, and the set that grows is not touched.
    library.prune(keep_last=2)
    assert {entry["path"].split("/")[-1] for entry in library.info(names=[NAME])["leftovers"]} == {
        ".s3.staging",
        "README",
        "s8",
    }
    release(chain.vm)
    wait_until(lambda: all(job["status"] == "concluded" for job in chain.vm.block_jobs), "the jobs")
    succeed("backup_set", {"plan": plan})
    assert library.listed() == ["s3", "s2", "s1"]


def test_names(library: Library) -> None:
    shutil.copytree(library.path / NAME, library.path / "web02")
    for path in (library.path / "web02").glob("*/manifest.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "vm": {**found["vm"], "name": "web02"}}))
    for names, expected in (
        (None, [NAME, "web02"]),
        (["web02"], ["web02"]),
        (["web02", NAME, "web02"], ["web02", NAME]),
    ):
        found = library.info(**({} if names is None else {"names": names}))
        assert [vm["name"] for vm in found["vms"]] == expected
        assert {one["vm"] for one in found["sets"]} == set(expected)
        assert found["totals"]["sets"] == 3 * len(expected)


def test_names_that_nobody_knows(library: Library) -> None:
    (library.path / "forgotten").mkdir()
    for names, unknown, listed in (
        (["nosuch", NAME], "nosuch has no set", [NAME]),
        (["nosuch", "../web01", "forgotten"], "nosuch, ../web01 have no sets", []),
    ):
        found = fail("backup_info", {"repository": str(library.path), "names": names})
        assert found["msg"] == f"names: {unknown} in {library.path}; VMs there: {NAME}"
        assert [vm["name"] for vm in found["vms"]] == listed
    assert library.info(names=["forgotten"])["vms"] == []


def test_an_empty_repository_and_none(library: Library, directory: Path) -> None:
    shutil.rmtree(library.path / NAME)
    assert library.info()["totals"] == {"vms": 0, "sets": 0, "bytes": 0, "broken": 0, "leftovers": 0}
    said = fail("backup_info", {"repository": str(directory / "nosuch")})["msg"]
    assert "is not a repository" in said


def test_a_newer_schema_is_never_skipped(library: Library) -> None:
    library.rewrite("s2", schema=99)
    path = library.path / NAME / "s2" / "manifest.json"
    reason = f"{path}: its schema 99 is newer than this collection; update vmfleet.backup"
    found = library.info()
    assert found["leftovers"] == [{"vm": NAME, "path": str(path.parent), "what": reason}]
    assert any(NAME in warning and reason in warning for warning in found["warnings"])
    # What builds on it cannot be restored; what does not, can.
    newest, oldest = found["sets"]
    assert (newest["id"], reason in newest["broken"]) == ("s3", True)
    assert (oldest["id"], oldest["broken"]) == ("s1", "")
    assert [vm["ok"] for vm in found["vms"]] == [False]


def test_a_repository_that_can_only_be_read(library: Library, storage: Storage) -> None:
    mount = storage.mount("tmpfs", 32 << 20)
    there = library.copy(mount.path / "repository")
    mount.make_read_only()
    assert there.info()["totals"]["sets"] == 3


def test_a_vm_whose_sets_a_later_release_has_made_does_not_hide_the_others(library: Library) -> None:
    shutil.copytree(library.path / NAME, library.path / "db01")
    for path in (library.path / "db01").glob("*/manifest.json"):
        path.chmod(0o600)
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    # And here is one that the file system does not tell.
    loop = library.path / "db02" / "s1" / "manifest.json"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    result = fail("backup_info", {"repository": str(library.path)})
    assert "VM db01" in result["msg"]
    assert "update vmfleet.backup" in result["msg"]
    assert "VM db02" in result["msg"]
    assert str(loop) in result["msg"]
    assert [vm["name"] for vm in result["vms"]] == [NAME]

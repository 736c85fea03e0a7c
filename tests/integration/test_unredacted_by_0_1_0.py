# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Version 0.1.0 left secrets in its documents: they are shown to nobody, and the chains of its sets go on."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import REMOVED
from ansible_collections.vmfleet.backup.tests.harness.filesystems import NbdServer
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.old_version import OldVersion
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

SECRET = "hunter2"
EXPORT = f"disk&token={SECRET}"
SAID = f"qemu-img: Could not open 'nbd://me:{SECRET}@host/base': no such host"
TIME = "2026-01-01T00:00:00Z"


@pytest.fixture
def old(directory: Path) -> OldVersion:
    return OldVersion(directory / "0.1.0")


@pytest.fixture
def vm(vms: Vms, directory: Path) -> t.Iterator[Qemu]:
    """A VM of a disk whose name holds what looks like a password, and with one on its command line."""
    image = create(directory / "disk.qcow2", 8 * MIB)
    # A server has room for what is written, or it has not.
    os.truncate(image, 16 * MIB)
    with NbdServer(directory / "nbd", image, export=EXPORT) as server:
        file = {"driver": "nbd", "export": EXPORT, "server": {"type": "unix", "path": str(server.path)}}
        disk = Disk(image, id="drive0", node="n0", file=file)
        yield vms.start(disk, name=NAME, extra=["-object", f"secret,id=s0,data={SECRET}"])


@pytest.fixture
def library(directory: Path, old: OldVersion, vm: Qemu) -> Library:
    """A repository with a set of 0.1.0, which was verified in vain, and a set that failed."""
    library = Library(directory / "repository")
    plan = old.run("backup_plan", **library.arguments(vm, id="s1"))["plan"]
    assert result_of(old.run("backup_set", plan=plan), NAME)["state"] == "published"
    place = library.directory(NAME)
    assert SECRET in (place / "s1" / "manifest.json").read_text()
    attempt = library.manifest(NAME, "s1")["attempt"]
    marks: dict[str, dict[str, t.Any]] = {
        ".s0.failed.json": {"run": "r0", "id": "s0", "state": "failed", "error": SAID, "started": TIME, "ended": TIME},
        ".s1.verified.json": {"id": "s1", "attempt": attempt, "depth": "image", "when": TIME, "errors": [SAID]},
    }
    for name, mark in marks.items():
        (place / name).write_text(json.dumps({"attempt": "a0", **mark, "schema": 1}))
    return library


def test_nobody_is_shown_them(library: Library, vm: Qemu, directory: Path) -> None:
    repository = {"repository": str(library.path)}
    (directory / "told").mkdir()
    metrics = {"id": "s1", "results": [], "directory": str(directory / "told")}
    results = {
        "info": run_module("backup_info", repository),
        "plan": run_module("backup_plan", library.arguments(vm, id="s0")),
        "metrics": run_module("backup_metrics", {**repository, **metrics}),
        "prune": run_module("backup_prune", {**repository, "keep_last": 1, "consolidate": True}),
        "restore": run_module("backup_restore", {**repository, "vm": NAME, "directory": str(directory / "told")}),
        "cancel": run_module("backup_set", {**repository, "state": "cancelled", "names": [NAME]}),
        **{depth: run_module("backup_verify", {**repository, "depth": depth}) for depth in ("checksum", "image")},
    }
    for verb, result in results.items():
        assert not result["rc"], verb
        assert SECRET not in json.dumps(result), verb
    shown = f"nbd://me:{REMOVED}@host/base"
    assert shown in results["info"]["leftovers"][0]["what"]
    assert shown in results["info"]["sets"][0]["verified"]["errors"][0]
    for path in (directory / "told").iterdir():
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_report_of_before_is_told_without_them(library: Library, directory: Path) -> None:
    vm_told = {"name": NAME, "id": "s1", "state": "failed", "changed": False, "error": "full"}
    metrics = {"id": "s1", "results": [vm_told], "directory": str(directory)}
    told = succeed("backup_metrics", {"repository": str(library.path), **metrics})["hypervisor"]
    given = {"directory": str(directory / "reports"), "id": "s1"}
    data = Path(succeed("backup_report", {**given, "hypervisors": {"hv1": told}})["data"])
    report = json.loads(data.read_text())
    [hypervisor] = report["hypervisors"]
    hypervisor["error"] = hypervisor["vms"][0]["error"] = SAID
    data.write_text(json.dumps(report))
    # Of hv1 nothing new is told, and what was told of it before is still true.
    succeed("backup_report", {**given, "hypervisors": {"hv1": {}}, "pending": ["hv1"]})
    report = json.loads(data.read_text())
    assert REMOVED in report["hypervisors"][0]["error"]
    assert REMOVED in report["hypervisors"][0]["vms"][0]["error"]
    for path in (directory / "reports").iterdir():
        assert SECRET not in path.read_text(), path


def test_the_chain_goes_on(library: Library, old: OldVersion, vm: Qemu, directory: Path) -> None:
    """The name in the manifest is the one that QEMU tells, but for the secret."""
    copies = {}
    # It is not to count as bad here.
    (library.directory(NAME) / ".s1.verified.json").unlink()
    for number, set_id in enumerate(("s2", "s3", "s4"), start=1):
        vm.write("drive0", number, number * MIB, 65536)
        copies[set_id] = vm.freeze(vm.disks[0], directory / f"{set_id}.qcow2")
        if set_id == "s3":
            # A machine that still has the old version.
            plan = old.run("backup_plan", **library.arguments(vm, id=set_id))["plan"]
            assert result_of(old.run("backup_set", plan=plan), NAME)["state"] == "published"
        else:
            library.back_up(vm, id=set_id)
        assert library.levels(NAME, set_id) == {"drive0": "incremental"}, library.reasons(NAME, set_id)
        assert (SECRET in (library.directory(NAME) / set_id / "manifest.json").read_text()) == (set_id == "s3")
    for set_id, copy in copies.items():
        target = directory / f"restored-{set_id}"
        library.restore(id=set_id, disks=[{"name": "drive0", "target": str(target)}])
        assert identical(copy, target)

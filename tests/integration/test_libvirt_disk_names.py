# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The disks of a domain have libvirt's names; chains go on where it is reached by a second monitor at other times."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.library import Library
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

SIZE = 8 * MIB
MONITOR = "/var/lib/libvirt/qemu/second.qmp"
# As an administrator gives QEMU one more monitor.
SECOND = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{MONITOR},server=on,wait=off'/></qemu:commandline>"
)
BY_LIBVIRT, BY_SOCKET = "libvirt:web01", MONITOR
TARGETS, DEVICES = ["vda", "sda", "sdb"], ["virtio-disk0", "scsi0-0-0-0", "sata0-0-1"]


class Turns:
    """A domain that is backed up by libvirt at times, and at times by its second monitor."""

    def __init__(self, libvirt: Libvirt, directory: Path) -> None:
        self.library = Library(directory / "repository", libvirt.inside)
        self.inside = libvirt.inside
        self._directory = directory
        self.frozen: dict[str, list[Path]] = {}
        disks = [
            DomainDisk(patterned(directory / "a.qcow2", size=SIZE)),
            DomainDisk(patterned(directory / "b.raw", "raw", SIZE, 16), "sda", "scsi", "raw"),
            DomainDisk(patterned(directory / "c.qcow2", size=SIZE, seed=32), "sdb", "sata"),
        ]
        self.domain: Domain = libvirt.start("web01", *disks, more=SECOND)

    def change(self, set_id: str, pattern: int) -> None:
        """Write to each disk, and remember what they hold then."""
        for number, target in enumerate(TARGETS):
            self.domain.io(target, f"write -P {pattern + number} {pattern * 65536} 65536")
        self.frozen[set_id] = [self.domain.freeze(name, self._directory / f"{set_id}-{name}") for name in TARGETS]

    def back_up(self, set_id: str, pattern: int, monitor: str, **options: t.Any) -> dict[str, t.Any]:
        """Write to the disks, and make a set; returns what its manifest says."""
        self.change(set_id, pattern)
        self.library.back_up(monitor, id=set_id, **options)
        return self.library.manifest("web01", set_id)

    def check(self) -> None:
        """Every set holds what the disks held at its moment."""
        for set_id, copies in self.frozen.items():
            for copy, image in zip(copies, self.library.images("web01", set_id).values(), strict=True):
                assert identical(copy, image), (set_id, image)


@pytest.fixture
def turns(libvirt: Libvirt, directory: Path) -> Turns:
    return Turns(libvirt, directory)


def named(manifest: dict[str, t.Any]) -> list[str]:
    return [disk["name"] for disk in manifest["disks"]]


def test_by_turns(turns: Turns) -> None:
    manifests = [
        turns.back_up(f"s{number}", number, monitor)
        for number, monitor in enumerate((BY_SOCKET, BY_LIBVIRT, BY_LIBVIRT, BY_SOCKET, BY_LIBVIRT), 1)
    ]
    assert [named(manifest) for manifest in manifests] == [DEVICES, TARGETS, TARGETS, DEVICES, TARGETS]
    levels = [{disk["level"] for disk in manifest["disks"]} for manifest in manifests]
    assert levels == [{"full"}] + [{"incremental"}] * 4
    assert [manifest["disks"][0]["parent"]["disk"] for manifest in manifests[1:]] == [
        "virtio-disk0",
        "",
        "vda",
        "virtio-disk0",
    ]
    turns.check()
    verified = {"repository": str(turns.library.path), "id": "s5", "depth": "image"}
    said = succeed("backup_verify", verified)["results"]
    assert [(one["disk"], one["ok"]) for one in said] == [(name, True) for name in TARGETS]


def test_targets_outlive_a_start_and_a_snapshot(turns: Turns, directory: Path) -> None:
    turns.back_up("s1", 1, BY_LIBVIRT)
    turns.domain.destroy()
    turns.domain.start()
    second = turns.back_up("s2", 2, BY_LIBVIRT)
    assert named(second) == TARGETS
    # A raw disk keeps no record when QEMU ends.
    assert [disk["level"] for disk in second["disks"]] == ["incremental", "full", "incremental"]
    turns.domain.virsh(
        "snapshot-create-as",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        f"vda,file={directory}/over.qcow2",
        "--diskspec",
        "sda,snapshot=no",
        "--diskspec",
        "sdb,snapshot=no",
    )
    third = turns.back_up("s3", 3, BY_LIBVIRT)
    assert (named(third), third["level"]) == (TARGETS, "incremental")
    # Its nodes are counted anew.
    assert second["disks"][0]["node"] != third["disks"][0]["node"]
    fourth = turns.back_up("s4", 4, BY_SOCKET)
    assert (named(fourth), fourth["level"]) == (DEVICES, "incremental")
    turns.check()


@pytest.mark.parametrize(("first", "then"), [(BY_SOCKET, BY_LIBVIRT), (BY_LIBVIRT, BY_SOCKET)])
def test_a_set_that_was_begun_in_the_other_way(turns: Turns, first: str, then: str) -> None:
    turns.back_up("s1", 1, BY_LIBVIRT)
    turns.change("s2", 2)
    plan = turns.library.start(first, id="s2", level="full")
    for job in turns.domain.qmp("query-block-jobs"):
        turns.domain.qmp("block-job-set-speed", device=job["device"], speed=0)
    # The same set: it has the names with which it was begun.
    again = turns.library.plan(then, id="s2")["plan"]
    assert again["vms"][0]["action"] == "attach"
    result = succeed("backup_set", {"plan": again}, inside=turns.inside)
    assert result_of(result, "web01")["state"] == "published"
    names = TARGETS if first == BY_LIBVIRT else DEVICES
    assert named(turns.library.manifest("web01", "s2")) == names
    # Published is published, by whatever way.
    for each in (plan, turns.library.plan(then, id="s2")["plan"]):
        assert not succeed("backup_set", {"plan": each}, inside=turns.inside)["changed"]
    # And the next one of another id brings an unfinished one to its end first.
    turns.change("s3", 3)
    turns.library.start(first, id="s3", level="full")
    for job in turns.domain.qmp("query-block-jobs"):
        turns.domain.qmp("block-job-set-speed", device=job["device"], speed=0)
    fourth = turns.back_up("s4", 4, then)
    assert fourth["level"] == "incremental"
    assert {disk["parent"]["id"] for disk in fourth["disks"]} == {"s3"}
    turns.check()


def test_any_of_its_names_means_a_disk(turns: Turns) -> None:
    plan = turns.library.plan(BY_LIBVIRT, exclude_disks=["virtio-disk0", "sdb"])["plan"]["vms"][0]
    assert [disk["name"] for disk in plan["disks"]] == ["sda"]
    assert plan["left_out"] == [{"name": name, "reason": "is excluded"} for name in ("vda", "sdb")]
    [vm] = succeed("vm_info", {"monitors": [BY_LIBVIRT]}, inside=turns.inside)["vms"]
    assert [disk["name"] for disk in vm["disks"]] == TARGETS
    assert all(disk["stable_name"] for disk in vm["disks"])


def test_drive_backup_by_turns(turns: Turns, directory: Path) -> None:
    target = str(directory / "copy.qcow2")
    asked = {"monitor": BY_LIBVIRT, "device": "vda", "target": target}
    assert succeed("drive_backup", asked, inside=turns.inside)["changed"]
    by_socket = {"monitor": BY_SOCKET, "device": "virtio-disk0", "target": target}
    assert not succeed("drive_backup", by_socket, inside=turns.inside)["changed"]
    assert not succeed("drive_backup", asked, inside=turns.inside)["changed"]
    said = fail("drive_backup", {**asked, "device": "sdb"}, inside=turns.inside)["msg"]
    assert "its receipt is for another disk" in said
    other = str(directory / "other.qcow2")
    assert succeed("drive_backup", {**by_socket, "target": other}, inside=turns.inside)["changed"]
    assert not succeed("drive_backup", {**asked, "target": other}, inside=turns.inside)["changed"]


def test_what_a_detached_disk_leaves_is_no_disk(turns: Turns, directory: Path) -> None:
    """libvirt may leave its nodes open, and nobody could name such a disk."""
    path = create(directory / "left.qcow2", SIZE)
    path.chmod(0o666)
    file = {"driver": "file", "filename": str(path), "node-name": "libvirt-77-storage"}
    turns.domain.qmp("blockdev-add", **file)
    turns.domain.qmp("blockdev-add", driver="qcow2", node_name="libvirt-77-format", file="libvirt-77-storage")
    for monitor, names in ((BY_LIBVIRT, TARGETS), (BY_SOCKET, DEVICES)):
        [vm] = succeed("vm_info", {"monitors": [monitor]}, inside=turns.inside)["vms"]
        assert [disk["name"] for disk in vm["disks"]] == names

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains that are restored from their sets: defined, started, and with what they had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import domain as restored_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import restore as restore_module
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.libvirt_host import LibvirtHost
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import DiskRestore
from ansible_collections.vmfleet.backup.tests.harness.images import (
    MIB,
    assert_pattern,
    identical,
    patterned,
    qemu_img,
)
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import (
    FIRMWARE,
    Domain,
    DomainDisk,
    domain_xml,
)
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess, fail, run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")

HARDWARE: dict[str, t.Any] = {"memory": 64, "nvram": True, "tpm": True}
DEVICES = (
    "<graphics type='vnc' passwd='hunter2'/><interface type='user'/>"
    "<disk type='file' device='cdrom'><source file='{}'/><target dev='sdc' bus='sata'/><readonly/></disk>"
)
VOLUME = "<disk type='volume'><source pool='images' volume='v.qcow2'/><target dev='vda' bus='virtio'/></disk>"
STATE = "tpm2-00.permall"


class Backup:
    """A domain with two disks, UEFI variables and a TPM, of which there is a set without its second disk."""

    def __init__(self, libvirt: Libvirt, directory: Path) -> None:
        self.libvirt = libvirt
        self.directory = directory
        (directory / "restored").mkdir()
        disks = [DomainDisk(patterned(directory / f"{name}.qcow2"), name) for name in ("vda", "vdb")]
        medium = patterned(directory / "medium.iso", "raw", size=MIB)
        self.domain = libvirt.define("web01", *disks, devices=DEVICES.format(medium), **HARDWARE)
        # Its firmware would write its variables at any moment.
        self.domain.start("--paused")
        self.sets = Sets(directory / "repository", libvirt.inside)
        self.domain.write("vda", 0x51, 5 * MIB, 65536)
        self.disk = self.domain.freeze("vda", directory / "frozen.qcow2")
        self.sets.back_up("libvirt:web01", exclude_disks=["vdb"])
        self.nvram = self.domain.nvram.read_bytes()
        self.state = (self.domain.tpm / STATE).read_bytes()

    def asked(self, **options: t.Any) -> dict[str, t.Any]:
        place = str(self.directory / "restored")
        asked = {"repository": str(self.sets.path), "vm": "web01", "directory": place, "domain": "define"}
        return {name: value for name, value in {**asked, **options}.items() if value is not None}

    def restore(self, libvirt: Libvirt | None = None, **options: t.Any) -> dict[str, t.Any]:
        return succeed("backup_restore", self.asked(**options), inside=(libvirt or self.libvirt).inside)

    def refuse(self, **options: t.Any) -> str:
        """Return why it is refused, after it was seen that nothing was done."""
        before = self.seen()
        told: str = fail("backup_restore", self.asked(**options), inside=self.libvirt.inside)["msg"]
        assert self.seen() == before
        return told

    def seen(self) -> tuple[list[Path], str]:
        files = sorted([*self.directory.rglob("*"), *self.libvirt.seen_here("/var/lib/libvirt/swtpm").rglob("*")])
        return files, self.libvirt.virsh("list", "--all", "--name", "--uuid")

    def assert_restored(self, domain: Domain) -> None:
        """See that a domain that is off has all of it, and that it starts with that."""
        assert domain.state == "shut off"
        place = self.directory / "restored"
        assert identical(place / "vda.qcow2", self.disk)
        assert (place / "nvram.fd").read_bytes() == self.nvram
        assert (domain.tpm / STATE).read_bytes() == self.state
        assert domain.xml("--inactive").findtext("os/nvram") == str(place / "nvram.fd")
        # The state of a TPM is swtpm's to accept.
        domain.start()
        assert domain.state == "running"
        assert domain.image("vda") == (place / "vda.qcow2", "qcow2")
        assert identical(domain.freeze("vda", self.directory / "started.qcow2"), self.disk)


@pytest.fixture
def backup(libvirt: Libvirt, directory: Path) -> Backup:
    return Backup(libvirt, directory)


def addresses(domain: Domain) -> list[str]:
    return [mac.attrib["address"] for mac in domain.xml("--inactive").iterfind("devices/interface/mac")]


def test_beside_the_old_domain(backup: Backup, libvirt: Libvirt) -> None:
    wanted = {"domain_name": "web02", "domain_uuid": "new", "domain_mac": "new"}
    place = backup.directory / "restored"
    place.chmod(0o750)
    planned = run_module("backup_restore", backup.asked(**wanted), check=True, inside=libvirt.inside)
    told = f"it cannot be started yet: the user that QEMU runs as (64055) cannot enter {place}"
    assert told in planned["notes"]
    place.chmod(0o711)
    assert planned["changed"]
    assert libvirt.virsh("list", "--all", "--name") == "web01"
    done = backup.restore(**wanted)
    assert done["changed"]
    assert done["domain"]["changed"]
    restored = Domain(libvirt, "web02")
    assert (done["domain"]["name"], done["domain"]["uuid"]) == ("web02", restored.uuid)
    assert restored.uuid != backup.domain.uuid
    assert len(addresses(restored)) == 1
    assert addresses(restored) != addresses(backup.domain)
    assert done["notes"] == [
        "not in the set, so give the domain again: domain: devices/graphics@passwd",
        "disk vdb is not in the set, and was removed from the domain",
        "drive sdc is empty: what was in it is not in the set",
        f"it uses of this machine: {FIRMWARE}",
    ]
    assert [disk.attrib["dev"] for disk in restored.xml().iterfind("devices/disk/target")] == ["vda", "sdc"]
    assert (planned["domain"], planned["notes"]) == (done["domain"], [told, *done["notes"]])
    again = backup.restore(**wanted)
    assert (again["changed"], again["domain"]["changed"]) == (False, False)
    backup.assert_restored(restored)
    # It is another VM to the next backup, and can be restored in its turn.
    backup.sets.back_up("libvirt:web02", id="s2")
    found = json.loads((backup.sets.directory("web02") / "s2" / "vm.json").read_text())
    assert found["uuid"] == restored.uuid


def test_on_another_machine_when_the_old_one_is_gone(directory: Path) -> None:
    with Libvirt() as old:
        backup = Backup(old, directory)
        uuid, macs = backup.domain.uuid, addresses(backup.domain)
    with Libvirt() as new:
        # Somebody may need it: undefine keeps it with --keep-tpm.
        state = new.seen_here(f"/var/lib/libvirt/swtpm/{uuid}/tpm2/{STATE}")
        state.parent.mkdir(parents=True)
        for other in (b"another", bytes(1 << 19)):
            # The second one is larger than any that is read.
            state.write_bytes(other)
            told = fail("backup_restore", backup.asked(), inside=new.inside)["msg"]
            assert told.endswith(f"{STATE} exists, and is not of this set; overwrite: true replaces it")
        state.unlink()
        hypervisor = Hypervisor(directory, inside=new.inside)
        wanted = {"restore_vm": "web01", "restore_directory": f"{directory}/restored", "restore_domain": "define"}
        for changes in (1, 0):
            play = hypervisor.play("restore", **wanted)
            assert play.rc == 0, play.output
            assert play.recap()["changed"] == changes
        assert f"domain web01 ({uuid}) is defined already at qemu:///system" in play.output
        assert "not in the set, so give the domain again: domain: devices/graphics@passwd" in play.output
        restored = Domain(new, "web01")
        assert addresses(restored) == macs
        backup.assert_restored(restored)
        # Its next set goes on in the repository.
        frozen = directory / "nvram.qcow2"
        qemu_img("convert", "-U", "-f", "raw", "-O", "qcow2", directory / "restored" / "nvram.fd", frozen)
        sets = Sets(backup.sets.path, new.inside)
        sets.back_up("libvirt:web01", id="s2")
        sets.assert_good("web01", {"vda": backup.disk, "nvram": frozen}, "s2")


def test_what_stands_in_the_way_is_found_before_anything_is_written(
    backup: Backup, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid = backup.domain.uuid
    assert backup.refuse() == (
        "domain_name: domain web01 exists, and this restore has not defined it; give another name, or replace its"
        " definition with overwrite: true"
    )
    assert backup.refuse(overwrite=True) == "domain_name: domain web01 runs; it was left as it is"
    assert backup.refuse(domain_name="web02").startswith(f"domain_uuid: domain web01 has the uuid {uuid}; domain_uuid")
    new: dict[str, t.Any] = {"domain_name": "web02", "domain_uuid": "new"}
    assert backup.refuse(**new, method="overlay").startswith("method: a domain is defined on copies")
    some = {**new, "directory": None, "disks": [{"name": "vda", "target": str(backup.directory / "x.qcow2")}]}
    assert backup.refuse(**some) == "disks: disk nvram of set s1 is missing; a domain is defined with all of them"
    nowhere = [{"name": name, "target": f"/nowhere/{name}"} for name in ("vda", "nvram")]
    told = backup.refuse(**new, directory=None, disks=nowhere)
    assert told == "target: /nowhere/vda: there is no directory /nowhere"
    assert "names no domain" in backup.refuse(domain_name="a/b", domain_uuid="new")
    assert backup.refuse(**new, libvirt_uri="qemu+ssh://host/system").startswith("libvirt_uri: ")
    assert backup.refuse(**{**new, "domain": "none"}).startswith("domain_name: nothing is defined")
    assert backup.refuse(**{**new, "directory": "restored"}).startswith("directory: ")
    # Others could have written what is going to be defined.
    backup.sets.path.chmod(0o777)
    assert backup.refuse(**new).startswith("repository: ")
    backup.sets.path.chmod(0o700)
    # What the description asks for is not here.
    path = backup.sets.directory("web01") / "s1" / "vm.json"
    whole = path.read_text()
    path.write_text(whole.replace("VM", "vm"))
    told = "VM web01: vm.json of set s1 is not what was written: its SHA-256 is another one than that in the manifest"
    assert backup.refuse(**new).startswith(told)
    new["checksum"] = "false"
    for old, other, told in (
        (
            "/usr/share/OVMF/OVMF_CODE_4M.fd",
            "/usr/share/OVMF/NONE.fd",
            "domain: the domain starts from /usr/share/OVMF/NONE.fd",
        ),
        ("machine='pc-q35", "machine='pc-q99", "domain: libvirt at qemu:///system cannot run such a VM"),
        ("<domain type", "<!DOCTYPE d><domain type", "VM web01: vm.json of set s1: the XML has a document type"),
        ('"xml": "<', '"xml": "", "x": "<', "domain: set s1 has no definition of a domain"),
        (STATE, "../../x", "vm.json: '../../x' is no file of a TPM"),
    ):
        assert old in whole
        path.write_text(whole.replace(old, other))
        assert told in backup.refuse(**new)
    path.write_text(whole)
    # No word is lost of what libvirt is missing for.
    monkeypatch.setitem(__import__("sys").modules, "libvirt", None)
    assert "python3-libvirt" in backup.refuse(**new)


def test_a_killed_process_leaves_what_the_next_one_finds(
    backup: Backup, libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"domain_name": "web02", "domain_uuid": "new"}
    # libvirt leaves the directories of domains that the tests before have had.
    known = {path.name for path in libvirt.seen_here("/var/lib/libvirt/swtpm").iterdir()} - {backup.domain.uuid}

    def die(*_args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for place in ((restored_domain, "_place"), (LibvirtHost, "define")):
        with monkeypatch.context() as patched:
            patched.setattr(*place, die)
            ModuleProcess("backup_restore", backup.asked(**wanted), inside=libvirt.inside).wait()
        assert libvirt.virsh("list", "--all", "--name") == "web01"

    def refuse(*_args: object) -> None:
        raise BackupError("libvirt refused it")

    with monkeypatch.context() as patched:
        patched.setattr(LibvirtHost, "define", refuse)
        told = fail("backup_restore", backup.asked(**wanted), inside=libvirt.inside)
    reason = "libvirt:web02: the disks are restored, and the domain is not defined: libvirt refused it"
    assert told["msg"].startswith(reason)
    assert [disk["changed"] for disk in told["restored"]] == [False, False]
    done = backup.restore(**wanted)
    assert [disk["changed"] for disk in done["restored"]] == [False, False]
    assert done["domain"]["changed"]
    # No state is left of those that came to nothing.
    places = {path.name for path in libvirt.seen_here("/var/lib/libvirt/swtpm").iterdir()}
    assert {backup.domain.uuid, done["domain"]["uuid"]} == places - known
    backup.assert_restored(Domain(libvirt, "web02"))


def test_the_old_domain_is_defined_anew(backup: Backup, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = backup.domain
    uuid = domain.uuid
    domain.virsh("snapshot-create-as", "s", "--disk-only", "--diskspec", "vda,snapshot=no")
    domain.destroy()
    # The newest set is that of a domain that is off.
    backup.sets.back_up("libvirt:web01", id="s2", exclude_disks=["vdb"])
    assert backup.refuse().startswith("domain_name: domain web01 exists")
    beside = {"domain_name": "web02", "domain_uuid": "new", "overwrite": True, "directory": str(backup.directory)}
    assert backup.refuse(**beside).startswith(f"target: {backup.directory}/vda.qcow2 is a file of domain web01")
    # A domain that is off may have its disk in a storage pool.
    volume = backup.directory / "pool" / "v.qcow2"
    volume.parent.mkdir()
    patterned(volume, size=MIB)
    backup.libvirt.virsh("pool-define-as", "images", "dir", "--target", volume.parent)
    backup.libvirt.virsh("pool-start", "images")
    backup.libvirt.define("web03", devices=VOLUME)
    targets = {"vda": volume, "nvram": backup.directory / "restored" / "x.fd"}
    disks = [{"name": name, "target": str(target)} for name, target in targets.items()]
    for pool in ("is active", "is inactive"):
        told = backup.refuse(**{**beside, "directory": None, "disks": disks})
        assert told == f"target: {volume} is a file of domain web03; restore to another place", pool
        if pool == "is active":
            backup.libvirt.virsh("pool-destroy", "images")
    # Nobody knows where the volumes of a pool are that is no more.
    backup.libvirt.virsh("pool-undefine", "images")
    assert backup.refuse(**{**beside, "directory": None, "disks": disks}) == (
        f"target: {volume} exists, and may be a disk of domain web03: that is volume v.qcow2 of storage pool images,"
        " and libvirt has no such pool. Define the pool, remove the disk from web03, or restore to places where no file"
        " exists yet"
    )
    new = {**beside, "directory": str(backup.directory / "restored")}
    assert succeed("backup_restore", backup.asked(**new), check=True, inside=backup.libvirt.inside)["changed"]
    # The definition of one that is off does not name what its disk builds on.
    base, between, top = (backup.directory / f"{name}.qcow2" for name in ("base", "between", "top"))
    patterned(base, size=MIB)
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    qemu_img("create", "-q", "-f", "qcow2", "-b", f"json:{json.dumps(node)}", "-F", "qcow2", between)
    qemu_img("create", "-q", "-f", "qcow2", "-b", between.name, "-F", "qcow2", top)
    backup.libvirt.define("web04", DomainDisk(top))
    for image in (between, base):
        disks[0]["target"] = str(image)
        told = backup.refuse(**{**beside, "directory": None, "disks": disks})
        assert told == f"target: {image} is a file of domain web04; restore to another place"
    told = f"domain_name: domain web01 is another one, of uuid {uuid}"
    assert backup.refuse(overwrite=True, domain_uuid="new").startswith(told)
    assert "has snapshots or checkpoints" in backup.refuse(overwrite=True)
    domain.virsh("snapshot-delete", "s", "--metadata")
    lock_target = restored_domain.lock_target

    def start(target: str) -> object:
        subprocess.run(["virsh", "start", "web01", "--paused"], check=True, capture_output=True)
        return lock_target(target)

    with monkeypatch.context() as patched:
        # Somebody starts it while its disks are copied.
        patched.setattr(restored_domain, "lock_target", start)
        told = fail("backup_restore", backup.asked(overwrite=True), inside=backup.libvirt.inside)["msg"]
    assert told == (
        "libvirt:web01: the disks are restored, and the domain is not defined: the domain has changed during the"
        " restore: it runs. Call again"
    )
    domain.destroy()
    assert domain.xml("--inactive").findtext("os/nvram") != str(backup.directory / "restored" / "nvram.fd")
    (domain.tpm / STATE).write_bytes(b"of today")
    done = backup.restore(overwrite=True)
    assert done["id"] == "s2"
    assert done["domain"] == {"name": "web01", "uuid": uuid, "libvirt_uri": "qemu:///system", "changed": True}
    backup.assert_restored(domain)
    # By now it is in use.
    assert "domain web01 runs" in backup.refuse(overwrite=True)


def test_a_disk_that_others_may_write_to(libvirt: Libvirt, directory: Path) -> None:
    (directory / "restored").mkdir()
    shared = DomainDisk(patterned(directory / "vdb.raw", "raw"), "vdb", format="raw", more="<shareable/>")
    domain = libvirt.define("web01", DomainDisk(patterned(directory / "vda.qcow2")), shared)
    domain.start("--paused")
    domain.write("vdb", 0x52, 2 * MIB, 65536)
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up("libvirt:web01")
    wanted = {"repository": str(sets.path), "vm": "web01", "domain": "define"}
    beside = {**wanted, "domain_name": "web02", "domain_uuid": "new"}
    done = succeed("backup_restore", {**beside, "directory": str(directory / "restored")}, inside=libvirt.inside)
    assert [disk["format"] for disk in done["restored"]] == ["qcow2", "raw"]
    restored = Domain(libvirt, "web02")
    restored.start("--paused")
    assert restored.image("vdb") == (directory / "restored" / "vdb.raw", "raw")
    assert restored.disk("vdb").find("shareable") is not None
    assert_pattern(directory / "restored" / "vdb.raw", "raw", 0x52, 2 * MIB, 65536)
    # In its place, and in another format: nothing is replaced.
    domain.destroy()
    files = {path: path.stat().st_ino for path in directory.glob("vd*")}
    disks = [{"name": "vda", "target": str(directory / "vda.qcow2")}]
    disks.append({"name": "vdb", "target": str(directory / "vdb.raw"), "format": "qcow2"})
    told = fail("backup_restore", {**wanted, "disks": disks, "overwrite": True}, inside=libvirt.inside)["msg"]
    assert told == (
        f"format: {directory}/vdb.raw: disk vdb is shareable, and libvirt takes such a disk in format raw only"
    )
    assert {path: path.stat().st_ino for path in directory.glob("vd*")} == files
    succeed("backup_restore", {**wanted, "directory": str(directory), "overwrite": True}, inside=libvirt.inside)
    domain.start("--paused")
    assert domain.image("vdb") == (directory / "vdb.raw", "raw")
    assert_pattern(directory / "vdb.raw", "raw", 0x52, 2 * MIB, 65536)


def test_what_happens_during_the_copy_keeps_all_disks(
    backup: Backup, libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = backup.domain
    domain.write("vda", 0x99, 6 * MIB, 65536)
    domain.destroy()
    old = backup.directory / "vda.qcow2"
    targets = {"vda": old, "nvram": backup.directory / "restored" / "x.fd"}
    disks = [{"name": name, "target": str(target)} for name, target in targets.items()]
    wanted = {"overwrite": True, "directory": None, "disks": disks}
    whole = f"VM web01: disk vda to {old}, disk nvram to {targets['nvram']}: "
    copy = restore_module._copy

    def during_the_copy(*commands: tuple[str, ...]) -> str:
        """Return what is told where somebody does this, after it was seen that all is as it was."""

        async def copy_and_change(run: t.Any, disk: t.Any, *place: t.Any) -> None:
            if disk.name == "vda":
                for words in commands:
                    subprocess.run(["virsh", *words], check=True, capture_output=True)
            await copy(run, disk, *place)

        inode, files = old.stat().st_ino, sorted(backup.directory.rglob("*"))
        with monkeypatch.context() as patched:
            patched.setattr(restore_module, "_copy", copy_and_change)
            told: str = fail("backup_restore", backup.asked(**wanted), inside=libvirt.inside)["msg"]
        assert (old.stat().st_ino, sorted(backup.directory.rglob("*"))) == (inode, files)
        assert_pattern(old, "qcow2", 0x99, 6 * MIB, 65536)
        return told

    start = ("start", "web01", "--paused")
    assert during_the_copy(start, ("managedsave", "web01")) == (
        f"{whole}the domain has changed during the restore: it has a saved state (virsh managedsave), which belongs to"
        " its old disks. No file was replaced"
    )
    domain.virsh("managedsave-remove")
    assert f"{whole}target: {old} is in use by a running VM" in during_the_copy(start)
    domain.destroy()
    # Another domain gets the disk.
    other = backup.directory / "other.xml"
    other.write_text(domain_xml("web05", DomainDisk(old)))
    told = during_the_copy(("define", str(other)))
    assert f"{whole}target: {old} is a file of domain web05; restore to another place. No file was replaced" == told
    libvirt.virsh("undefine", "web05")
    # One disk that cannot be copied keeps the other one from being replaced.
    taken = targets["nvram"].with_name("x.fd.partial")
    taken.mkdir()
    told = backup.refuse(**wanted)
    assert (
        f"disk vda to {old}: it was not put in its place, because another disk of the domain was not restored" in told
    )
    taken.rmdir()
    backup.restore(**wanted)
    assert identical(old, backup.disk)


def test_a_block_device_is_left_alone_where_the_domain_has_changed(
    backup: Backup, libvirt: Libvirt, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup.domain.destroy()
    device, variables = storage.loop(64 * MIB), backup.directory / "restored" / "x.fd"
    disks = [{"name": "vda", "target": str(device)}, {"name": "nvram", "target": str(variables)}]
    wanted = backup.asked(overwrite=True, directory=None, disks=disks)

    def save_before(name: str) -> str:
        """Return what is told where the domain is saved right before the call of this function for the device."""
        function = getattr(restore_module, name)

        def save_and_call(*args: t.Any) -> t.Any:
            if any(isinstance(disk, DiskRestore) and disk.target == str(device) for disk in args):
                for words in (("start", "web01", "--paused"), ("managedsave", "web01")):
                    subprocess.run(["virsh", *words], check=True, capture_output=True)
            return function(*args)

        with monkeypatch.context() as patched:
            patched.setattr(restore_module, name, save_and_call)
            told: str = fail("backup_restore", wanted, inside=libvirt.inside)["msg"]
        backup.domain.virsh("managedsave-remove")
        assert not variables.exists()
        return told

    told = save_before("check_device")
    assert f"disk vda to {device}: the domain has changed during the restore: it has a saved state" in told
    assert f"disk nvram to {variables}: it was not put in its place, because another disk of the domain" in told
    assert_pattern(device, "raw", 0, 5 * MIB, 65536)
    # What was written to it in its place stays.
    told = save_before("_copy")
    assert told.startswith(f"VM web01: disk nvram to {variables}: the domain has changed during the restore: it has a")
    assert_pattern(device, "raw", 0x51, 5 * MIB, 65536)
    succeed("backup_restore", wanted, inside=libvirt.inside)
    assert backup.domain.xml("--inactive").find(f"devices/disk/source[@dev='{device}']") is not None

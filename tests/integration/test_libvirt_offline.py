# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains that are shut off: their sets, and those of the same domains while they run, are one chain."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import typing as t
from xml.etree.ElementTree import canonicalize

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import daemon_place, storage_daemon
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.description import parse_description
from ansible_collections.vmfleet.backup.tests.harness.backup import sent
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info, patterned, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import Daemon
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of
from ansible_collections.vmfleet.backup.tests.harness.turns import ADDRESS, Turns

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

STATE = "tpm2-00.permall"
STAYS_OFF = "it is off, and cannot be started while it is copied"


@pytest.fixture
def turns(libvirt: Libvirt, directory: Path) -> Turns:
    return Turns(libvirt, directory)


def start_slowly(turns: Turns, set_id: str, **options: t.Any) -> dict[str, t.Any]:
    """Start copies that run until the test lets them go; returns the plan."""
    turns.freeze(set_id)
    plan = turns.plan(set_id, speed="64K", **options)
    succeed("backup_set", {"plan": plan, "state": "started"}, inside=turns.inside)
    return plan


def let_go(turns: Turns) -> None:
    """Have the copies come to their end, and nobody look at them."""
    [place] = turns.domain.libvirt.seen_here("/run/vmfleet-locks").glob(f"{daemon_place.PLACE}*")
    Daemon(place).release()
    Daemon(place).wait_copied()


def test_on_and_off_in_turns(turns: Turns) -> None:
    [planned] = turns.plan("s1")["vms"]
    assert (planned["name"], planned["identity"], planned["level"]) == ("web", turns.domain.uuid, "full")
    assert planned["reason"].endswith(STAYS_OFF)
    turns.back_up("s1")
    turns.domain.start()
    turns.write(0xA1, MIB)
    turns.back_up("s2")
    turns.domain.destroy()
    turns.write(0xB1, 2 * MIB)
    third = turns.back_up("s3")
    # Only what has changed is opened for a copy.
    assert [copy["device"] for copy in sent(third, "drive-backup")] == ["off0"]
    turns.assert_released()
    before = {path: path.stat().st_mtime_ns for path in turns.disks.values()}
    fourth = turns.back_up("s4")
    assert not fourth["qmp"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    turns.domain.start()
    turns.write(0xC1, 3 * MIB, "vdb")
    turns.back_up("s5")
    for number in range(2, 6):
        assert turns.sets.levels("web", f"s{number}") == dict.fromkeys(turns.disks, "incremental")
        assert turns.sets.manifest("web", f"s{number}")["vm"]["uuid"] == turns.domain.uuid
    turns.check()


def test_started_while_it_is_copied(turns: Turns) -> None:
    plan = start_slowly(turns, "s1")
    said = turns.domain.libvirt.attempt("virsh", "start", "web")
    assert 'Failed to get "write" lock' in said.stderr
    assert turns.domain.state == "shut off"
    # The storage daemon of a domain is found by its name, also where nobody has told that.
    [planned] = turns.plan("s1")["vms"]
    assert (planned["action"], planned["identity"]) == ("attach", turns.domain.uuid)
    succeed("backup_set", {"plan": plan, "state": "cancelled"}, inside=turns.inside)
    turns.assert_released()
    turns.frozen.clear()
    turns.domain.start()
    turns.back_up("s2")
    # It goes on from there, and so do its records of changes.
    turns.write(0xA1, MIB)
    turns.domain.virsh("managedsave")
    assert "its saved memory (virsh managedsave) is not in the set" in str(
        turns.sets.plan(ADDRESS, id="s3")["warnings"]
    )
    turns.back_up("s3")
    turns.domain.start()
    turns.write(0xB1, 2 * MIB)
    turns.back_up("s4")
    for set_id in ("s3", "s4"):
        assert turns.sets.levels("web", set_id) == dict.fromkeys(turns.disks, "incremental")
    turns.check()


def test_started_on_snapshots_while_it_is_copied(turns: Turns) -> None:
    """QEMU has the images that are copied as backing files, which it only reads: nobody can change them any more."""
    succeed("backup_set", {"plan": turns.plan("s1", speed="64K"), "state": "started"}, inside=turns.inside)
    turns.domain.virsh("snapshot-create-as", "outside", "--no-metadata", "--disk-only")
    [place] = turns.domain.libvirt.seen_here("/run/vmfleet-locks").glob(f"{daemon_place.PLACE}*")
    daemon = Daemon(place)
    daemon.release()
    daemon.wait_copied()
    # Nobody knows how it has ended: the set is given up.
    daemon.execute("job-dismiss", id=daemon.jobs[0]["device"])
    turns.domain.start()
    turns.disks = {target: path.with_suffix(".outside") for target, path in turns.disks.items()}
    made = turns.back_up("s2")
    assert "a bitmap that no set needs any more could not be removed" in str(made["warnings"])
    turns.assert_released()
    turns.write(0xA1, MIB)
    turns.back_up("s3")
    assert turns.sets.levels("web", "s3") == dict.fromkeys(turns.disks, "incremental")
    turns.check()


def test_libvirt_is_killed_while_it_is_copied(turns: Turns) -> None:
    libvirt = turns.domain.libvirt
    plan = start_slowly(turns, "s1")
    libvirt.stop_daemon(signal.SIGKILL)
    let_go(turns)
    turns.make(plan)
    libvirt.start_daemon()
    turns.assert_released()
    turns.domain.start()
    turns.write(0xA1, MIB)
    turns.back_up("s2")
    assert turns.sets.levels("web", "s2") == dict.fromkeys(turns.disks, "incremental")
    turns.check()


def test_started_while_its_copies_are_prepared(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    turns.back_up("s1")
    turns.write(0xA1, MIB)
    turns.freeze("s2")
    start = storage_daemon.start

    async def start_late(*args: t.Any) -> t.Any:
        # In the module, which is inside already.
        subprocess.run(["virsh", "start", "web"], check=True, capture_output=True)
        return await start(*args)

    monkeypatch.setattr(storage_daemon, "start", start_late)
    made = turns.make(turns.plan("s2"))
    monkeypatch.undo()
    assert "somebody started the VM while its copies were prepared, so it is backed up as a running VM" in str(
        made["warnings"]
    )
    assert turns.sets.levels("web", "s2") == dict.fromkeys(turns.disks, "incremental")
    turns.assert_released()
    turns.domain.destroy()
    turns.write(0xB1, 2 * MIB)
    turns.back_up("s3")
    assert turns.sets.levels("web", "s3") == dict.fromkeys(turns.disks, "incremental")
    turns.check()


CDROM = (
    "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/nowhere.iso'/>"
    "<target dev='sda' bus='sata'/><readonly/></disk>"
)
EMPTY = "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>"
NETWORK = (
    "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='x'>"
    "<host name='127.0.0.1' port='1'/></source><target dev='vdc' bus='virtio'/></disk>"
)
VOLUME = (
    "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='images' volume='vdd.qcow2'/>"
    "<target dev='vdd' bus='virtio'/></disk>"
)


def test_all_kinds_of_disks(libvirt: Libvirt, directory: Path) -> None:
    (directory / "pool").mkdir()
    patterned(directory / "pool" / "vdd.qcow2", size=8 * MIB, seed=7)
    libvirt.virsh("pool-create-as", "images", "dir", "--target", directory / "pool")
    turns = Turns(libvirt, directory, devices=CDROM + EMPTY + NETWORK + VOLUME, nvram=True, tpm=True)
    turns.domain.nvram.write_bytes(bytes(range(256)) * 2112)
    turns.domain.tpm.mkdir(parents=True)
    (turns.domain.tpm / STATE).write_bytes(b"sealed")
    [planned] = turns.plan("s1")["vms"]
    assert planned["action"] == "fail"
    assert planned["reason"] == (
        "disk vdc of VM web (network nbd:x) cannot be copied while the VM is off. Only qcow2 and raw images that the"
        " VM writes to can be copied then: start the VM, or leave the disk out (exclude_disks)"
    )
    turns.freeze("s1")
    plan = turns.plan("s1", exclude_disks=["vdc"])
    [planned] = plan["vms"]
    assert {drive["name"]: drive["reason"] for drive in planned["left_out"]} == {
        "sda": "is read-only",
        "sdb": "has no medium",
        "vdc": "is excluded",
    }
    turns.make(plan)
    images = turns.sets.images("web", "s1")
    assert list(images) == ["vda", "vdb", "vdd", "nvram"]
    assert identical(turns.domain.nvram, images["nvram"], "raw")
    assert identical(directory / "pool" / "vdd.qcow2", images["vdd"])
    turns.check()
    # And how it is built, though nobody has seen it run.
    found = parse_description((turns.sets.directory("web") / "s1" / "vm.json").read_bytes())
    assert canonicalize(found["domain"]["xml"]) == canonicalize(turns.domain.virsh("dumpxml", "--inactive"))
    assert found["tpm"]["state"] == {STATE: base64.b64encode(b"sealed").decode()}
    # It can be defined again from that.
    (directory / "restored").mkdir()
    wanted = {
        "directory": str(directory / "restored"),
        "domain": "define",
        "domain_name": "web02",
        "domain_uuid": "new",
    }
    succeed("backup_restore", {"repository": str(turns.sets.path), "vm": "web", **wanted}, inside=turns.inside)
    assert (directory / "restored" / "nvram.fd").read_bytes() == turns.domain.nvram.read_bytes()
    targets = [target.attrib["dev"] for target in Domain(libvirt, "web02").xml().iterfind("devices/disk/target")]
    assert targets == ["vda", "vdb", "vdd", "sda", "sdb"]
    libvirt.virsh("pool-destroy", "images")
    [planned] = turns.plan("s2", exclude_disks=["vdc"])["vms"]
    assert "disk vdd of VM web (volume images/vdd.qcow2) cannot be copied while the VM is off" in planned["reason"]


def test_a_disk_that_cannot_be_copied_is_added_while_others_are_copied(turns: Turns, directory: Path) -> None:
    """The copies come to their end, and the domain can be started: what the next set is told to do works."""
    plan = start_slowly(turns, "s1")
    added = directory / "added.xml"
    added.write_text(NETWORK)
    turns.domain.virsh("attach-device", added, "--config")
    let_go(turns)
    turns.make(plan)
    turns.assert_released()
    assert result_of(succeed("backup_set", {"plan": plan}, inside=turns.inside), "web")["state"] == "published"
    [planned] = turns.plan("s2")["vms"]
    assert "disk vdc of VM web (network nbd:x) cannot be copied while the VM is off" in planned["reason"]
    turns.domain.virsh("detach-device", added, "--config")
    turns.domain.start()
    turns.check()


def test_a_set_of_before_comes_to_its_end_though_the_next_one_cannot_be_begun(turns: Turns, directory: Path) -> None:
    start_slowly(turns, "s1")
    added = directory / "added.xml"
    added.write_text(NETWORK)
    turns.domain.virsh("attach-device", added, "--config")
    let_go(turns)
    plan = turns.plan("s2")
    assert plan["vms"][0]["action"] == "finish"
    found = result_of(fail("backup_set", {"plan": plan}, inside=turns.inside), "web")
    assert "disk vdc of VM web (network nbd:x) cannot be copied while the VM is off" in found["error"]
    turns.assert_released()
    turns.check()


def test_libvirt_ends_while_a_domain_is_copied_of_which_a_disk_is_excluded(libvirt: Libvirt, directory: Path) -> None:
    """Nobody tells of that disk any more."""
    turns = Turns(libvirt, directory, devices=NETWORK)
    plan = start_slowly(turns, "s1", exclude_disks=["vdc"])
    libvirt.stop_daemon(signal.SIGKILL)
    let_go(turns)
    turns.make(plan)
    turns.assert_released()
    libvirt.start_daemon()
    turns.check()


def test_state_of_the_tpm_has_moved_since_the_last_set(libvirt: Libvirt, directory: Path) -> None:
    turns = Turns(libvirt, directory, tpm=True)
    own, old = turns.domain.tpm, directory / "tpm"
    for place, state in ((own, b"new"), (old, b"old")):
        place.mkdir(parents=True)
        (place / STATE).write_bytes(state)
    turns.back_up("s1")
    # A set from when the definition named another place, which this libvirt may not know to name.
    description = turns.sets.directory("web") / "s1" / "vm.json"
    there = f"/var/lib/libvirt/swtpm/{turns.domain.uuid}/tpm2"
    for set_id, state, told in (
        ("s2", b"new", f"is that in {there}, where libvirt has it by itself. There is another one in {old},"),
        ("s3", b"old", f"is that in {old}, where an earlier set has found it, and it may be an old one: there is none"),
    ):
        text = description.read_text()
        assert f'"{there}"' in text
        description.write_text(text.replace(f'"{there}"', f'"{old}"'))
        done = turns.back_up(set_id)
        assert [told in warning for warning in done["warnings"] if "TPM" in warning] == [True]
        description = turns.sets.directory("web") / set_id / "vm.json"
        found = parse_description(description.read_bytes())
        assert found["tpm"]["state"] == {STATE: base64.b64encode(state).decode()}
        (own / STATE).unlink(missing_ok=True)


def test_other_policies_leave_it_alone(turns: Turns) -> None:
    for offline in ("fail", "skip"):
        [planned] = turns.plan("s1", offline=offline)["vms"]
        assert planned["action"] == offline
    listed = [{"name": "web", "monitor": ADDRESS, "disks": [{"name": "vda", "file": "/a", "format": "raw"}]}]
    said = fail("backup_plan", turns.sets.arguments(vms=listed), inside=turns.inside)["msg"]
    assert said == "vms: libvirt:web has a list of disks; remove the list, because libvirt knows the disks of a domain"


def test_definition_that_names_other_images_below(libvirt: Libvirt, directory: Path) -> None:
    """libvirt leaves one when it reverts to an internal snapshot of before a pull. QEMU does as it says."""
    directory.chmod(0o777)
    base, overlay = patterned(directory / "base.qcow2", size=8 * MIB), directory / "overlay.qcow2"
    domain = libvirt.define("web", DomainDisk(base, "vda"), machine="pc")
    domain.start()
    domain.virsh("snapshot-create-as", "outside", "--no-metadata", "--disk-only", "--diskspec", f"vda,file={overlay}")
    domain.write("vda", 0xA1, MIB, 65536)
    domain.virsh("snapshot-create-as", "inside")
    domain.virsh("blockpull", "vda", "--wait")
    domain.virsh("snapshot-revert", "inside")
    assert "backing-filename" not in info(overlay)
    domain.io("vda", "flush")
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(overlay)}}
    node["backing"] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
    guests = directory / "guests.qcow2"
    qemu_img("convert", "-U", "-O", "qcow2", f"json:{json.dumps(node)}", guests)
    assert not identical(guests, overlay)
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up(ADDRESS, id="s1")
    assert identical(guests, sets.images("web", "s1")["vda"])
    domain.destroy()
    [planned] = sets.plan(ADDRESS, id="s2")["plan"]["vms"]
    assert planned["action"] == "fail"
    assert f"disk vda: the definition of the domain says that {overlay} builds on {base} (qcow2)" in planned["reason"]
    qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", overlay)
    sets.back_up(ADDRESS, id="s2")
    assert identical(guests, sets.images("web", "s2")["vda"])

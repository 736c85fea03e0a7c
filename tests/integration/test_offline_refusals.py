# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that are off: what cannot be meant, and what cannot be done, is told before anything changes."""

from __future__ import annotations

import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.offline import NAME, OffHistory

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("clean")

UUID = "6f9b16e4-7b8c-4a52-9df3-5c2b1f0c7a10"
OTHER = "11111111-7b8c-4a52-9df3-5c2b1f0c7a10"


def disk(name: str = "drive0", file: str = "/vms/a.qcow2", **more: t.Any) -> dict[str, t.Any]:
    return {"name": name, "file": file, "format": "qcow2", **more}


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ([{"monitor": "/m", "disks": [disk()]}], "vms: /m has a list of disks, but no name; add name"),
        ([{"name": "a", "monitor": "/m", "disks": [disk(), disk(file="/b")]}], "vms: disk drive0 of a is listed twice"),
        (
            [
                {"name": "a", "monitor": "/m", "disks": [disk()]},
                {"name": "b", "monitor": "/n", "disks": [disk("x", "/vms/./a.qcow2")]},
            ],
            "vms: /vms/a.qcow2 is listed as a disk of a (drive0), and of b",
        ),
        ([{"name": "a", "monitor": "/m", "disks": [disk(file="a.qcow2")]}], "'a.qcow2' is not an absolute path"),
        ([{"name": "a", "monitor": "/m", "disks": [disk(format="vmdk")]}], "value of format must be one of"),
        (
            [{"name": "a", "monitor": "/m", "disks": [{"name": "x", "file": "/a"}]}],
            "required arguments: format",
        ),
        ([{"monitor": "/m", "uuid": "web01"}], "vms: /m is listed with uuid 'web01', which is none"),
    ],
)
def test_lists_that_cannot_be_meant(directory: Path, listed: list[dict[str, t.Any]], told: str) -> None:
    result = fail("backup_plan", {"repository": str(directory / "none"), "vms": listed, "offline": "backup"})
    assert told in result["msg"]


def planned(off: OffHistory, **options: t.Any) -> str:
    [vm] = off.plan("s1", **options)["vms"]
    assert vm["action"] == "fail"
    return str(vm["reason"])


def test_no_list_of_disks(off: OffHistory) -> None:
    del off.entry["disks"]
    assert "To back it up while it is off, list its disks (vms: disks)" in planned(off)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(b"no image"), "Image is not in qcow2 format"),
        (lambda path: (path.unlink(), path.mkdir()), "it is neither a file nor a block device"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "it is neither a file nor a block device"),
    ],
    ids=["missing", "no image", "directory", "pipe"],
)
def test_a_disk_that_is_none(off: OffHistory, change: t.Callable[[Path], t.Any], told: str) -> None:
    path = off.vm.disks[1].path
    assert path
    change(path)
    reason = planned(off)
    assert f"disk drive1: {path} cannot be looked at" in reason
    assert told in reason
    assert not off.stored()


def test_an_encrypted_disk(off: OffHistory, directory: Path) -> None:
    path = directory / "source1.qcow2"
    secret = ("--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s")
    qemu_img("create", "-q", "-f", "qcow2", *secret, path, "8M")
    assert "disk drive1 is encrypted at rest, and only its VM has the key" in planned(off)
    # Without it, the other one is copied.
    [vm] = succeed("backup_set", {"plan": off.plan("s1", exclude_disks=["drive1"])})["vms"]
    assert vm["state"] == "published"


def test_the_uuid_that_was_told_is_another(off: OffHistory) -> None:
    off.entry["uuid"] = UUID
    off.make("s1")
    off.entry["uuid"] = OTHER
    assert "the directory belongs to another VM of this name" in planned(off, id="s2")
    off.vm.start()
    assert f"vms: {NAME} is listed with uuid {OTHER}, and the VM at unix:{off.vm.monitor} has no uuid" in planned(off)
    off.entry["disks"] = []


def test_nobody_has_told_the_uuid(off: OffHistory) -> None:
    """The sets were made by another hypervisor: whether this VM is theirs is not known here."""
    off.entry["uuid"] = UUID
    off.make("s1")
    del off.entry["uuid"]
    manifest = off.sets.path / NAME / "s1" / "manifest.json"
    text = manifest.read_text()
    machine, boot = (off.sets.manifest(NAME, "s1")["hypervisor"][name] for name in ("machine_id", "boot_id"))
    manifest.chmod(0o600)
    manifest.write_text(text.replace(machine, "0" * 32).replace(boot, "00000000-0000-4000-8000-000000000000"))
    assert "its uuid is unknown: if it has one, list it (vms: uuid)" in planned(off, id="s2")
    off.entry["uuid"] = UUID
    assert off.plan("s2")["vms"][0]["action"] == "start"


def test_what_is_listed_otherwise_than_the_vm_has_it(off: OffHistory, directory: Path) -> None:
    off.vm.start()
    first, second = off.entry["disks"]
    first["file"], second["file"] = second["file"], first["file"]
    second["name"] = "drive7"
    warnings = " ".join(off.plan("s1")["warnings"])
    assert f"disk drive0 is listed as {directory}/source1.qcow2 (qcow2), but the VM has it in" in warnings
    assert "disk drive7 is listed (vms: disks), and the VM has none of that name" in warnings


def test_disks_that_were_listed_the_wrong_way_round(off: OffHistory) -> None:
    off.make("s1")
    first, second = off.entry["disks"]
    first["file"], second["file"] = second["file"], first["file"]
    made = succeed("backup_set", {"plan": off.plan("s2")})
    assert made["vms"][0]["level"] == "full"
    assert "the disks were swapped" in off.sets.reasons(NAME, "s2")["drive0"]


def test_no_storage_daemon(off: OffHistory, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    tools = directory / "tools"
    tools.mkdir()
    for name in ("qemu-img", "timeout"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    assert "qemu-storage-daemon is not installed on this hypervisor" in planned(off)

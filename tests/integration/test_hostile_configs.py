# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The vm.json of a set describes a VM that nobody has ever had: it is not started, and its set is none the worse."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.booting import NAME, boot, bootable, throwaway
from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.headers import sign
from ansible_collections.vmfleet.backup.tests.harness.hostile import Canary, ask
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

Change = t.Callable[[dict[str, t.Any], dict[str, str]], None]
FIRMWARE = "is no firmware of this machine, so it was not read"
ODD = "and a throwaway VM cannot have that"


def given(*words: str) -> Change:
    """Words on the command line of the VM. They may have names in them: of the canary's files, and of its link."""

    def change(description: dict[str, t.Any], names: dict[str, str]) -> None:
        description["command_line"] += [word.format(**names) for word in words]

    return change


def says(**fields: t.Any) -> Change:
    """Fields of the description."""
    return lambda description, _names: description.update(fields)


def device(*words: str) -> Change:
    """The device of the disk is another one."""

    def change(description: dict[str, t.Any], names: dict[str, str]) -> None:
        line = description["command_line"]
        at = next(at for at, word in enumerate(line) if "ide-hd" in word)
        line[at : at + 1] = [word.format(**names) for word in words]

    return change


def flash(file: str, unit: str = "0") -> Change:
    """A chip of the firmware that is not in the backup."""

    def change(description: dict[str, t.Any], names: dict[str, str]) -> None:
        chip = {
            "name": "code",
            "node": "c",
            "qdev": f"/machine/system.flash{unit}",
            "device": "pflash0",
            "driver": "raw",
        }
        description["disks"].append({**chip, "file": file.format(**names)})

    return change


CASES: dict[str, tuple[Change, str]] = {
    "kernel": (given("-kernel", "{canary}"), f"'{{canary}}', which vm.json names as its kernel, {FIRMWARE}"),
    "kernel, last of two": (given("-kernel", "/usr/share/qemu/x", "-kernel", "{canary}"), f"as its kernel, {FIRMWARE}"),
    "kernel of the kernel": (given("-kernel", "/proc/self/environ"), f"as its kernel, {FIRMWARE}"),
    "kernel behind a link": (given("-kernel", "{link}"), f"'{{link}}', which vm.json names as its kernel, {FIRMWARE}"),
    "kernel behind firmware": (given("-kernel", "/usr/share/qemu/../../..{canary}"), f"as its kernel, {FIRMWARE}"),
    "kernel that is a pipe": (given("-kernel", "{pipe}"), f"as its kernel, {FIRMWARE}"),
    "kernel that is a device": (given("-kernel", "/dev/null"), f"as its kernel, {FIRMWARE}"),
    "kernel that is a directory": (given("-kernel", "/usr/share/qemu"), f"as its kernel, {FIRMWARE}"),
    "kernel without a directory": (given("-kernel", "passwd"), "as its kernel, cannot be opened: No such file"),
    "kernel that is not there": (given("-kernel", "/usr/share/qemu/none"), "cannot be opened: No such file"),
    "kernel with an odd name": (given("-kernel", "/x\n\x1b[2J"), "the file '/x\\n\\x1b[2J', which"),
    "initrd": (given("-initrd", "{canary}"), f"as its initrd, {FIRMWARE}"),
    "initrd of this machine": (given("--initrd", "/etc/hostname"), f"as its initrd, {FIRMWARE}"),
    "device tree": (given("-dtb", "{canary}"), f"as its dtb, {FIRMWARE}"),
    "firmware": (given("-bios", "{canary}"), f"as its bios, {FIRMWARE}"),
    "firmware elsewhere": (given("-bios", "../../etc/hostname"), "as its bios, "),
    "firmware with an option": (given("-bios", "x,y"), f"'x,y' as firmware, {ODD}"),
    "flash": (flash("{canary}"), f"'{{canary}}', which vm.json names as a flash chip, {FIRMWARE}"),
    "flash behind a link": (flash("{link}"), f"as a flash chip, {FIRMWARE}"),
    "flash that is a device": (flash("/dev/zero"), f"as a flash chip, {FIRMWARE}"),
    "flash that is a pipe": (flash("{pipe}", "1"), f"as a flash chip, {FIRMWARE}"),
    "flash that is an image of a set": (flash("{image}"), f"as a flash chip, {FIRMWARE}"),
    "command line of the kernel": (given("-append", "quiet\nx"), f"'quiet\\nx' as kernel command line, {ODD}"),
    "machine": (says(machine="q35,kernel=/etc/hostname"), f"'q35,kernel=/etc/hostname' as machine, {ODD}"),
    "machine that is a path": (says(machine="../q35"), f"'../q35' as machine, {ODD}"),
    "machine of two words": (says(machine="q35 -net user"), f"as machine, {ODD}"),
    "machine that moves a cursor": (says(machine="q35\x1b[2J"), f"'q35\\x1b[2J' as machine, {ODD}"),
    "property of a machine": (given("-machine", "q35,smm=/etc/hostname"), f"as property of the machine, {ODD}"),
    "property of JSON": (given("-machine", '{{"type":"q35","acpi":{{"x":1}}}}'), f"as property of the machine, {ODD}"),
    "processor": (given("-cpu", "max,x=y,,z"), f"as processor, {ODD}"),
    "processor of a path": (says(cpus={"count": 1, "type": "/etc/hostname"}, command_line=[]), f"as processor, {ODD}"),
    "uuid": (says(uuid="4b1e3cde,x=y"), f"as uuid, {ODD}"),
    "much memory": (says(memory=1 << 60), "the VM had 1048576.0 TiB of memory"),
    "too much memory": (says(memory=1 << 46), "of memory. This machine has "),
    "global": (given("-global", "cfi.pflash01.secure=/etc/hostname"), f"as -global, {ODD}"),
    "global with more": (given("-global", "ICH9-LPC.disable_s3=1,x=y"), f"as -global, {ODD}"),
    "device of the host": (device("vfio-pci,host=00:00.0,drive=drive0"), f"'vfio-pci' as disk, {ODD}"),
    "device of another process": (
        device("vhost-user-blk-pci,chardev=x,drive=drive0"),
        f"'vhost-user-blk-pci' as disk, {ODD}",
    ),
    "device that loads a file": (device("loader,file={canary},drive=drive0"), f"'loader' as disk, {ODD}"),
    "device without a driver": (device('{{"drive":"drive0"}}'), f"'' as disk, {ODD}"),
    "device with an odd driver": (device('{{"driver":"ide-hd,x=y","drive":"drive0"}}'), f"as disk, {ODD}"),
    "controller": (device("vhost-scsi-pci,id=s", "-device", "scsi-hd,bus=s.0,drive=drive0"), f"as controller, {ODD}"),
    "serial number": (device('{{"driver":"ide-hd","drive":"drive0","serial":"a\\nb"}}'), f"as serial, {ODD}"),
    "boot index": (device("ide-hd,drive=drive0,bootindex=1,,drive=x"), f"as property of a disk, {ODD}"),
    "block size": (device("ide-hd,drive=drive0,logical_block_size=-1"), f"as property of a disk, {ODD}"),
}
"""What is changed, and what is said of the VM. Nothing of this ever gets to QEMU."""
SURVIVED: dict[str, Change] = {
    "as it is": says(),
    "name": says(name="web01,debug-threads=on\n\x1b[2J"),
    "options that are not taken over": given(
        *("-netdev", "user,id=n", "-object", "memory-backend-file,mem-path=/x,size=1", "-incoming", "exec:false", "-S"),
        *(
            "-monitor",
            "stdio",
            "-chardev",
            "file,id=x,path=/etc/x",
            "-fw_cfg",
            "name=opt/x,file=/etc/hostname",
            "-daemonize",
        ),
    ),
    "no value": given("-kernel"),
    "JSON that is none": given("-device", "{{" * 9),
    "JSON without an end": given("-device", '{{"a":' * 50000),
    "global of something else": given("-global", "virtio-blk-pci.x=/etc/hostname"),
    "flash that is not there": flash("/var/lib/nowhere/x.fd"),
    "no memory": says(memory=None),
}
"""What is odd, and of no consequence: the VM is started, and says its word."""


def vm_of(case: str) -> str:
    return "vm-" + "".join(letter if letter.isalnum() else "-" for letter in case)


class Zoo:
    """A repository with a VM for each case."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        sets = Sets(path / "repository")
        bootable(Vms(path, stack), sets, path).quit()
        self.path = sets.path
        self.canary = Canary(path / "outside")
        (path / "link").symlink_to(self.canary.file)
        os.mkfifo(path / "pipe")
        self.names = {
            "canary": str(self.canary.file),
            "link": str(path / "link"),
            "pipe": str(path / "pipe"),
            "image": str(sets.images(NAME, "s1")["drive0"]),
        }
        for case, change in [*((case, change) for case, (change, _said) in CASES.items()), *SURVIVED.items()]:
            directory = self.path / vm_of(case)
            shutil.copytree(self.path / NAME, directory)
            description = directory / "s2" / "vm.json"
            found = json.loads(description.read_text())
            change(found, self.names)
            description.chmod(0o600)
            description.write_text(json.dumps(found))
            sign(directory, directory.name)
        # The QEMU of throwaway VMs notes whom it is started for. It is somebody else, who may write there.
        path.chmod(0o711)
        self.log = path / "started"
        self.log.touch()
        self.log.chmod(0o666)
        self.qemu = path / "qemu"
        self.qemu.write_text(f'#!/bin/sh\necho "$*" >>{self.log}\nexec {shutil.which("qemu-system-x86_64")} "$@"\n')
        self.qemu.chmod(0o755)

    def verify(self, place: Path, cases: t.Iterable[str], **options: t.Any) -> dict[str, dict[str, t.Any]]:
        """Start a VM for each of these; return what is said of it."""
        self.log.write_text("")
        names = [vm_of(case) for case in cases]
        arguments = {"repository": str(self.path), "names": names, "qemu": str(self.qemu), **boot(place, **options)}
        result = ask("backup_verify", arguments)
        self.canary.assert_untouched()
        assert list(place.iterdir()) == throwaway(place) == []
        assert all(one["ok"] for one in result["results"] if one["disk"])
        return {one["vm"]: one for one in result["results"] if not one["disk"]}

    def started(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def zoo() -> t.Iterator[Zoo]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        yield Zoo(Path(path), stack)


@pytest.fixture
def place() -> t.Iterator[Path]:
    """A directory for throwaway VMs; the names of their sockets are not to get too long."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def refused(zoo: Zoo) -> dict[str, dict[str, t.Any]]:
    """What is said of all the VMs that are not started, and of one among them that is."""
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        found = zoo.verify(Path(path), [*CASES, "as it is"], boot_timeout=60)
    [line] = zoo.started()
    assert f"guest=verify-{NAME}" in line
    assert found[vm_of("as it is")]["ok"]
    return found


@pytest.fixture(scope="module")
def known(zoo: Zoo, refused: dict[str, t.Any]) -> dict[str, dict[str, t.Any]]:
    """What is known of the sets afterwards."""
    assert refused
    told = ask("backup_info", {"repository": str(zoo.path)})
    return {one["vm"]: one["verified"] for one in told["sets"] if one["id"] == "s2"}


@pytest.mark.parametrize("case", CASES)
def test_not_started(
    zoo: Zoo, refused: dict[str, dict[str, t.Any]], known: dict[str, dict[str, t.Any]], case: str
) -> None:
    """The value is named, nothing of it gets to QEMU, and the set is good as far as it was looked at."""
    one = refused[vm_of(case)]
    assert (one["ok"], one["depth"], one["console"]) == (False, "boot", [])
    assert CASES[case][1].format(**zoo.names) in one["error"]
    assert "boot_options" in one["error"]
    assert one["error"].isprintable()
    assert "canary outside" not in str(one)
    assert (known[vm_of(case)]["depth"], known[vm_of(case)]["ok"]) == ("image", True)


def test_started_all_the_same(zoo: Zoo, place: Path) -> None:
    found = zoo.verify(place, SURVIVED, boot_timeout=60)
    assert {name: one["error"] for name, one in found.items()} == {vm_of(case): "" for case in SURVIVED}
    assert len(zoo.started()) == len(SURVIVED)
    for line in zoo.started():
        # What it is given is a file that is open already, or its own.
        assert not [word for word in ("/etc", "/var/lib", "netdev", "exec:", str(zoo.path)) if word in line]


def test_what_the_caller_names_may_be_used(zoo: Zoo, place: Path) -> None:
    """It is no kernel, and so QEMU says something about it: but nothing of what is in it."""
    found = zoo.verify(place, ["kernel"], boot_files=[str(zoo.canary.file)], boot_timeout=5)
    [line] = zoo.started()
    assert "-kernel /proc/self/fd/" in line
    assert FIRMWARE not in found[vm_of("kernel")]["error"]
    assert "canary outside" not in str(found)
    # What is given takes the place of what the set says, and that may be anything.
    found = zoo.verify(place, ["machine"], boot_options=["-machine", "q35"], boot_timeout=60)
    assert found[vm_of("machine")]["ok"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a throwaway VM as somebody else")
def test_who_it_is_and_what_it_reaches(zoo: Zoo, place: Path) -> None:
    """A program in the place of QEMU tells what it could do."""
    spy, log = zoo.path.parent / "spy", zoo.path.parent / "said"
    log.touch()
    log.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        lines = [
            f"#!/bin/bash\nexec >{log} 2>&1",
            f"cat /etc/shadow; ls {place}; cat {zoo.names['image']}; echo x >{zoo.canary.file}",
            f"echo >/dev/tcp/127.0.0.1/{port} && echo REACHED",
            "id -u; env; grep -e CapEff -e NoNewPrivs /proc/self/status; exit 1",
        ]
        spy.write_text("\n".join(lines))
        spy.chmod(0o755)
        arguments = {**boot(place), "qemu": str(spy), "repository": str(zoo.path), "names": [NAME]}
        result = ask("backup_verify", arguments | {"boot_user": "nobody"})
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert result["rc"] == 1
    said = log.read_text()
    assert "REACHED" not in said
    assert said.count("Permission denied") >= 4
    assert "root:" not in said
    assert str(pwd.getpwnam("nobody").pw_uid) in said.splitlines()
    assert "CapEff:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "ANSIBLE" not in said
    assert "HOME" not in said
    zoo.canary.assert_untouched()

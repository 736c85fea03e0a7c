# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A tiny real Linux under real QEMU: two ext4 disks, a guest agent, and a process that writes all the time."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, Disk, Qemu, wait_until

BUILD = Path(__file__).parents[2] / "demo" / "guest" / "build"
DISKS = ("system", "data")
MEMORY = 192
# Under KVM the guest is ready within a second; where KVM is there but boots nothing, this is what finding out costs.
KVM_PATIENCE = 5.0
# Without KVM it takes seconds, and a minute where the machine is busy.
START_PATIENCE = 3 * PATIENCE


@functools.cache
def built() -> Path:
    """The directory with the guest's kernel, initrd and disks; building it takes some seconds, once."""
    build = subprocess.run([BUILD], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    return Path(build.stdout.strip())


def known_files() -> dict[str, str]:
    """The sha256 of what every guest's disks hold, by `disk/file`."""
    lines = (built() / "SHA256SUMS").read_text().splitlines()
    return {name: checksum for checksum, name in (line.split() for line in lines)}


@functools.cache
def accelerator() -> str:
    """`kvm` if that really boots the guest, else `tcg`; remembered until the machine is started anew."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = built().parent / "accelerator"
    if memory.exists():
        found, where = memory.read_text().split()
        if where == machine:
            return found
    found = "kvm" if _kvm_boots() else "tcg"
    memory.write_text(f"{found} {machine}\n")
    return found


def _kvm_boots() -> bool:
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35,accel=kvm", "-serial", "stdio"]
    command += _hardware("kvm", "poweroff")
    try:
        boot = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return False
    return b"GUEST READY" in boot.stdout


def _hardware(accel: str, *words: str, writer: bool = False, agent: bool = False) -> list[str]:
    guest = built()
    options = ["-cpu", "host" if accel == "kvm" else "qemu64", "-m", str(MEMORY), "-no-reboot"]
    kernel = ["-kernel", str(guest / "vmlinuz"), "-initrd", str(guest / "initrd.img")]
    return [*options, *kernel, "-append", command_line(*words, writer=writer, agent=agent)]


def command_line(*words: str, writer: bool = False, agent: bool = False) -> str:
    """Return the command line of the guest's kernel."""
    wanted = [word for word, wanted in (("writer", writer), ("agent", agent)) if wanted]
    # Without KVM, on a machine that is busy, interrupts come so late that the kernel takes the timer to be broken.
    return " ".join(("console=ttyS0", "quiet", "panic=-1", "no_timer_check", *words, *wanted))


def lay_disks(directory: Path) -> list[Path]:
    """Return the images of the guest's disks in a directory: those that are there, else fresh ones."""
    paths = [directory / f"{disk}.qcow2" for disk in DISKS]
    for path in paths:
        if not path.exists():
            shutil.copy(built() / path.name, path)
    return paths


class Console:
    """The file with what a guest says on its console."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        """Return what the guest has said."""
        return self.path.read_text(errors="replace")

    @property
    def rounds(self) -> int:
        """Return how many rounds of writing on both disks are finished."""
        console = self.text
        assert "WRITING FAILED" not in console, console
        return int(["0", *re.findall(r"^WROTE (\d+)$", console, re.MULTILINE)][-1])

    def ready(self, writer: bool) -> bool:
        """Return whether the guest has started, and has written if it is a writer."""
        return "GUEST READY" in self.text and (self.rounds > 0 or not writer)


class Guest(Qemu):
    """A guest whose disks are `system.qcow2` and `data.qcow2` in `directory`: those that are there, else fresh ones.

    They get their names from the block backends or, with `backends=False`, from the guest devices. With `iothreads`,
    each disk has a thread of its own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "guest",
        writer: bool = True,
        agent: bool = True,
        backends: bool = True,
        errors: str = "werror=enospc,rerror=report",
        iothreads: bool = False,
    ) -> None:
        disks = []
        threads: list[str] = []
        for disk, path in zip(DISKS, lay_disks(directory), strict=True):
            device = f"virtio-blk-pci,id={f'device-{disk}' if backends else disk},{errors}"
            if iothreads:
                threads += ["-object", f"iothread,id=thread-{disk}"]
                device = f"{device},iothread=thread-{disk}"
            disks.append(Disk(path, id=disk if backends else None, node=f"node-{disk}", device=device))
        self.accelerator = accelerator()
        machine = f"q35,accel={self.accelerator}"
        hardware = _hardware(self.accelerator, writer=writer, agent=agent)
        super().__init__(*disks, name=name, uuid=str(uuid.uuid4()), machine=machine, extra=[*threads, *hardware])
        self._writer = writer
        self._console = Console(self.directory / "console")
        self.agent = self.directory / "agent"
        self._options += [
            *("-serial", f"file:{self._console.path}"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        ]

    def start(self) -> None:
        """Start QEMU and wait for the guest and its first writes."""
        super().start()
        wait_until(self._ready, "the guest's start", START_PATIENCE)

    def _ready(self) -> bool:
        assert self.alive, f"the guest did not start: {self.console}"
        return self._console.ready(self._writer)

    @property
    def console(self) -> str:
        """What the guest has said on its console."""
        return self._console.text

    @property
    def rounds(self) -> int:
        """How many rounds of writing on both disks are finished."""
        return self._console.rounds


def file_system(image: Path, copy: Path) -> Path:
    """Make a raw copy of a disk's image and bring its ext4 up as after a power cut.

    Its journal is replayed, and then a full check must find nothing to repair.
    """
    qemu_img("convert", "-O", "raw", image, copy)
    _e2fs("e2fsck", "-p", "-E", "journal_only", str(copy))
    _e2fs("e2fsck", "-f", "-n", str(copy))
    return copy


def file_in(copy: Path, name: str) -> bytes:
    """The content of a file in such a copy; neither root nor a mount is needed."""
    return _e2fs("debugfs", "-R", f"cat {name}", str(copy))


def _e2fs(*command: str) -> bytes:
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False)
    # 1 is e2fsck's word for "repaired", here: replayed the journal. debugfs has only words.
    assert done.returncode in (0, 1), (command, done.stdout, done.stderr)
    assert b"not found" not in done.stderr, (command, done.stderr)
    return done.stdout

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A throwaway VM that starts from a backup: put together from C(vm.json), watched for a sign of life, and put away.

It has no network. It writes to overlays in a directory of its own, which goes with it; what it reads stays as it is.

Reference: QEMU 7.2, qemu-options.hx.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import AgentError, Refused
from .._common.formats import human
from .._host.files import free_bytes
from .._host.namespaces import PROCESSES, spaces
from .._host.process import Process, die_with_parent
from .._qemu.guest_agent import Agent
from .boot_options import Host, flash_chips

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from .boot_options import BootDisk, BootOptions


PREFIX = "vmfleet-boot-"
"""What the directory of a throwaway VM is called, followed by whose it is."""
INTERVAL = 0.25
"""Seconds between two looks at the guest's console."""
ROOM = 128 << 20
"""Bytes that a throwaway VM leaves free where its overlays are: others live there."""
CONSOLE_LIMIT = 1 << 20
"""Bytes of the console, the last ones, that are looked at."""
TAIL = 40
"""Lines of the console that are told of a guest that did not start."""
END_TIMEOUT = 10.0
"""Seconds for a killed QEMU to be gone; only one that hangs in the kernel takes longer."""
NICENESS = 10
"""QEMU gives way to the VMs of the hypervisor."""
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
NOISE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]")
"""What moves a terminal's cursor or colours its text."""


@dataclass(frozen=True)
class BootResult:
    """How it went. C(error) is empty where there was a sign of life; C(guilty) tells the backup's faults from ours."""

    error: str = ""
    console: tuple[str, ...] = ()
    guilty: bool = True


# The machine that it runs on


def this_host() -> Host:
    return Host(kvm_works(), len(os.sched_getaffinity(0)))


def kvm_works() -> bool:
    """Whether this process may use KVM, and the kernel answers."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, KVM_GET_API_VERSION) == KVM_API_VERSION
    except OSError:
        return False
    finally:
        os.close(fd)


def find_qemu(wanted: str = "") -> str:
    """The path of QEMU; Refused where there is none."""
    machine = os.uname().machine
    architecture = {"i686": "i386", "ppc64le": "ppc64", "armv7l": "arm"}.get(machine, machine)
    # Red Hat has it under a name of its own.
    names = [wanted] if wanted else [f"qemu-system-{architecture}", "/usr/libexec/qemu-kvm"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise Refused("qemu", f"{names[0]} is not installed on this machine; depth boot needs it")
    return found


# Directories


@contextlib.contextmanager
def work_dir(tmpdir: str) -> Iterator[str]:
    """A directory for one throwaway VM, which goes with what is in it."""
    me = Process.of(os.getpid())
    owner = f"{me.pid}-{me.start}" if me else "0-0"
    # Nobody can tell in another pid namespace whether this one has ended.
    owner += f"-{spaces()[PROCESSES]}"
    path = tempfile.mkdtemp(prefix=f"{PREFIX}{owner}-", dir=tmpdir)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def clear_work_dirs(tmpdir: str) -> None:
    """Remove what modules have left that were killed: their QEMU died with them."""
    for path in glob.glob(os.path.join(glob.escape(tmpdir), PREFIX + "*")):
        owner = re.match(PREFIX + r"(\d+)-(\d+)-(\d+)-", os.path.basename(path))
        # Somebody else may have made something that looks like ours; of what is not ours, nothing can be removed.
        if (
            owner
            and owner.group(3) == spaces()[PROCESSES]
            and not Process(int(owner.group(1)), int(owner.group(2))).alive
        ):
            shutil.rmtree(path, ignore_errors=True)


def copy_flash(description: Mapping[str, Any], layers: Sequence[BootDisk], place: str) -> dict[str, str]:
    """Copies of the flash chips that the backup does not have, as far as they are on this machine, by name."""
    copies: dict[str, str] = {}
    for disk in flash_chips(description):
        known = any(layer.name == disk["name"] for layer in layers)
        if not known and os.path.isfile(disk["file"]):
            copies[disk["name"]] = os.path.join(place, f"flash{len(copies)}")
            shutil.copyfile(disk["file"], copies[disk["name"]])
    return copies


# Its life


async def watch(arguments: Sequence[str], place: str, wish: BootOptions) -> BootResult:
    """Start it and wait for a sign of life. QEMU is gone when this returns, however it returns."""
    log = os.open(os.path.join(place, "log"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *die_with_parent(arguments, NICENESS), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
    finally:
        os.close(log)
    # Nobody listens there where the agent is no sign of life.
    answer = asyncio.ensure_future(_answer(os.path.join(place, "agent")))
    try:
        return await _wait(process, answer, place, wish)
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), END_TIMEOUT)


async def _answer(path: str) -> None:
    """Return once the agent has answered."""
    while True:
        with contextlib.suppress(AgentError):
            async with Agent(path):
                return
        await asyncio.sleep(INTERVAL)


async def _wait(
    process: asyncio.subprocess.Process, answer: asyncio.Future[None], place: str, wish: BootOptions
) -> BootResult:
    deadline = time.monotonic() + wish.timeout
    while True:
        # Asked first: what it said at its very end is read below.
        ended = process.returncode
        console = _read(os.path.join(place, "console"))
        if wish.pattern and re.search(wish.pattern, console, re.MULTILINE):
            return BootResult()
        if answer.done():
            answer.result()
            return BootResult()
        tail = tuple(console.splitlines()[-TAIL:])
        if ended is not None:
            return _early_end(ended, _read(os.path.join(place, "log")), tail)
        if free_bytes(place) < ROOM:
            said = f"{place} has only {human(ROOM)} left: the guest was stopped; give a tmpdir with more room"
            return BootResult(said, tail, guilty=False)
        if time.monotonic() >= deadline:
            return BootResult(_silence(wish, tail), tail)
        await asyncio.sleep(INTERVAL)


def _early_end(status: int, log: str, tail: tuple[str, ...]) -> BootResult:
    if status == 0:
        return BootResult(
            "the guest switched off or restarted before it gave a sign of life; its console tells more", tail
        )
    reason = "; ".join(log.splitlines()[-3:]) or f"status {status}"
    said = f"QEMU ended before the guest gave a sign of life: {reason}; give boot_options that fit this machine"
    return BootResult(said, tail, guilty=False)


def _silence(wish: BootOptions, tail: tuple[str, ...]) -> str:
    signs = ["its agent's answer"] if wish.agent else []
    signs += [f"{wish.pattern!r} on its console"] if wish.pattern else []
    hint = "its console tells more" if tail else "its console said nothing (does the guest use the serial console?)"
    return (
        f"the guest gave no sign of life ({' or '.join(signs)}) within {wish.timeout:g} s: {hint}. A slow one needs a"
        " longer boot_timeout, one that misses something boot_options"
    )


def _read(path: str) -> str:
    """The end of a text that the guest or QEMU writes, without what is for terminals only."""
    try:
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            source.seek(max(0, size - CONSOLE_LIMIT))
            content = source.read(CONSOLE_LIMIT)
    except FileNotFoundError:
        return ""
    return NOISE.sub("", content.decode("utf-8", "replace").replace("\r\n", "\n"))

# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Start a throwaway VM from a backup, wait for a sign of life, and stop it.

It has no network, and is in a cage. It writes to overlays in a work directory, which is removed with it; what it reads
stays as it is.

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
from .._host.process import PROCESSES, Process, spaces
from .._host.target_files import free_bytes
from .._qemu.guest_agent import Agent
from .boot_files import MIN_FREE
from .boot_options import Host
from .cage import KVM, NOT_STARTED, caged, may_use_kvm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .boot_options import BootOptions
    from .cage import User


PREFIX = "vmfleet-boot-"
"""The name of a work directory begins with this, followed by the process that it belongs to."""
INTERVAL = 0.25
"""Seconds between two looks at the guest's console."""
CONSOLE_LIMIT = 1 << 20
"""Bytes of the console that are searched, the last ones."""
CONSOLE_LINES = 40
"""Lines of the console that are told of a guest that did not start, the last ones."""
END_TIMEOUT = 10.0
"""Seconds for a killed QEMU to be gone; only one that hangs in the kernel takes longer."""
NICENESS = 10
"""QEMU gives way to the VMs of the hypervisor."""
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
CONTROL_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-Z\\-_]|[\x00-\x08\x0b-\x1f\x7f]")
"""Move the cursor of a terminal, or colour its text."""


@dataclass(frozen=True)
class BootResult:
    """How a start ended. C(error) is empty where there was a sign of life."""

    error: str = ""
    console: tuple[str, ...] = ()
    is_backup_fault: bool = True


def this_host(user: User | None) -> Host:
    """Return what this machine has for a throwaway VM of this user."""
    kvm = kvm_works() and (user is None or may_use_kvm(user))
    return Host(kvm, len(os.sched_getaffinity(0)), _available_memory())


def _available_memory() -> int:
    """Return the bytes of memory that programs can get without swapping (proc(5), MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as source:
        found = dict(line.split(":", 1) for line in source)
    return int(found["MemAvailable"].split()[0]) << 10


def kvm_works() -> bool:
    """Return whether this process may use KVM, and the kernel answers."""
    try:
        fd = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, KVM_GET_API_VERSION) == KVM_API_VERSION
    except OSError:
        return False
    finally:
        os.close(fd)


def find_qemu(wanted: str = "") -> str:
    """Return the path of QEMU; Refused where there is none."""
    machine = os.uname().machine
    architecture = {"i686": "i386", "ppc64le": "ppc64", "armv7l": "arm"}.get(machine, machine)
    # Red Hat names it otherwise.
    names = [wanted] if wanted else [f"qemu-system-{architecture}", "/usr/libexec/qemu-kvm"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise Refused("qemu", f"{names[0]} is not installed on this machine; depth boot needs it")
    return found


@contextlib.contextmanager
def work_dir(tmpdir: str) -> Iterator[str]:
    """Create a directory for one throwaway VM, and remove it with its content at the end."""
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
    """Remove the work directories of modules that were killed: their QEMU died with them."""
    for path in glob.glob(os.path.join(glob.escape(tmpdir), PREFIX + "*")):
        owner = re.match(PREFIX + r"(\d+)-(\d+)-(\d+)-", os.path.basename(path))
        # The name of another's directory may begin like ours.
        if (
            owner
            and owner.group(3) == spaces()[PROCESSES]
            and not Process(int(owner.group(1)), int(owner.group(2))).alive
        ):
            shutil.rmtree(path, ignore_errors=True)


async def watch(command: Sequence[str], directory: str, options: BootOptions, fds: Sequence[int] = ()) -> BootResult:
    """Start QEMU, which inherits C(fds), and wait for a sign of life. It is gone when this returns, however it does."""
    log = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *caged(command, options.user, NICENESS),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=fds,
            # A relative name leads nowhere there, and what Ansible has in its environment is no business of QEMU.
            cwd=directory,
            env={"LC_ALL": "C"},
        )
    finally:
        os.close(log)
    # Without the agent as a sign of life nothing listens there, and this never ends by itself.
    answer = asyncio.ensure_future(_wait_for_agent(os.path.join(directory, "agent")))
    try:
        return await _wait(process, answer, directory, options)
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), END_TIMEOUT)


async def _wait_for_agent(path: str) -> None:
    """Return once the agent has answered."""
    while True:
        with contextlib.suppress(AgentError):
            async with Agent(path):
                return
        await asyncio.sleep(INTERVAL)


async def _wait(
    process: asyncio.subprocess.Process, answer: asyncio.Future[None], directory: str, options: BootOptions
) -> BootResult:
    """Return how the start ended: by a sign of life, by the end of QEMU, or by a limit."""
    deadline = time.monotonic() + options.timeout
    while True:
        # This comes before the console is read: what the guest said at its very end counts.
        status = process.returncode
        console = _read(os.path.join(directory, "console"))
        if options.pattern and re.search(options.pattern, console, re.MULTILINE):
            return BootResult()
        if answer.done():
            answer.result()
            return BootResult()
        tail = tuple(console.splitlines()[-CONSOLE_LINES:])
        if status is not None:
            return _early_end(status, _read(os.path.join(directory, "log")), tail)
        if free_bytes(directory) < MIN_FREE:
            error = f"{directory} has only {human(MIN_FREE)} left: the guest was stopped; give a tmpdir with more room"
            return BootResult(error, tail, is_backup_fault=False)
        if time.monotonic() >= deadline:
            return BootResult(_no_sign(options, tail), tail)
        await asyncio.sleep(INTERVAL)


def _early_end(status: int, log: str, tail: tuple[str, ...]) -> BootResult:
    if status == 0:
        return BootResult("the guest switched off or restarted before it gave a sign of life; see its console", tail)
    reason = "; ".join(log.splitlines()[-3:]) or f"status {status}"
    remedy = "give boot_options that fit this machine"
    if NOT_STARTED in reason:
        remedy = "name a user that can start it, such as root in a container that has no other"
    error = f"QEMU ended before the guest gave a sign of life: {reason}; {remedy}"
    return BootResult(error, tail, is_backup_fault=False)


def _no_sign(options: BootOptions, tail: tuple[str, ...]) -> str:
    signs = ["its agent's answer"] if options.agent else []
    signs += [f"{options.pattern!r} on its console"] if options.pattern else []
    hint = "see its console" if tail else "its console said nothing (does the guest use the serial console?)"
    return (
        f"the guest gave no sign of life ({' or '.join(signs)}) within {options.timeout:g} s: {hint}. Give a slow"
        " guest a longer boot_timeout, and a guest that lacks something boot_options"
    )


def _read(path: str) -> str:
    """Return the end of a text that the guest or QEMU writes, without what is for terminals only."""
    try:
        with open(path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            source.seek(max(0, size - CONSOLE_LIMIT))
            content = source.read(CONSOLE_LIMIT)
    except FileNotFoundError:
        return ""
    return CONTROL_SEQUENCES.sub("", content.decode("utf-8", "replace").replace("\r\n", "\n"))

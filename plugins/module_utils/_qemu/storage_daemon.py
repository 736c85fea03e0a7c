# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a qemu-storage-daemon that copies the disks of a VM that is off: start it, find it again, look at it, end it.

It outlives the process that has started it, as a QEMU does. It has the disks open to read them, and holds them: a VM
that is started meanwhile fails at QEMU's lock. The new images it has as descriptors from its start on, as it takes none
later (no add-fd in QEMU 7.2 to 11.1): what stands at a path of the repository is never opened.

Reference: QEMU 7.2, docs/tools/qemu-storage-daemon.rst, and its QMP reference manual.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, MonitorGone, ToolError
from .._common.fields import NAME, TEXT, DocumentError, Several, holds, load, part
from .._common.redaction import redact_text
from .._host.directory import Directory
from .answers import Odd
from .daemon_place import monitor_in
from .disk_file import DiskFile
from .graph import query_graph
from .image_files import node_name, options
from .jobs import merge_jobs
from .model import OFF, TARGET_NODE, Disk, Vm
from .monitor import Monitor
from .qemu_img import shorten
from .query import disks_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .._host.process import Process
    from .address import Address


PROGRAM = "qemu-storage-daemon"
PID, LOG, NOTE = "pid", "log", "note.json"
START_TIMEOUT = 30.0
"""Seconds until its monitor has to answer: it takes milliseconds."""
END_TIMEOUT = 30.0
"""Seconds that it gets to end: it cancels its jobs, and only one with a target that hangs takes longer."""
INTERVAL = 0.01
LONGEST_NOTE = 1 << 22
GRACE = 60.0
"""Seconds beyond its time until it ends by itself: whoever looks after its jobs comes first, where there is one."""
_started: list[subprocess.Popen[bytes]] = []
"""Those that this process has started. Whoever ends before it has to be waited for."""


@dataclass(frozen=True)
class DaemonNote:
    """For which attempt, and with which disks, a storage daemon was started. A disk's place gives its node a name."""

    attempt: str = field(metadata=TEXT)
    vm: str = field(metadata=NAME)
    disks: tuple[DiskFile, ...] = field(metadata=holds(Several(part(DiskFile), 1)))


def require_storage_daemon() -> None:
    """Raise ToolError where there is none: better now than after the first VM."""
    sources = {
        PROGRAM: "Debian 12: qemu-system-common, Debian from 13 on: qemu-utils, Red Hat: qemu-img",
        "timeout": "coreutils",
    }
    for program, packages in sources.items():
        if shutil.which(program) is None:
            raise ToolError(
                f"{program} is not installed on this hypervisor ({packages}); it is needed for VMs that are off"
                " (offline: backup)"
            )


# To start


async def start(place: str, note: DaemonNote, fds: Sequence[int], bound: float) -> Address:
    """Start a storage daemon, and return its monitor. C(fds) are the new images, which it has under the same numbers.

    After C(bound) seconds it ends by itself, be anybody there to end it or not; 0 sets no limit.
    """
    address = monitor_in(place)
    _prepare(place, note)
    command = [
        *(["timeout", "--signal=TERM", f"{bound + GRACE:.0f}"] if bound else []),
        PROGRAM,
        *("--pidfile", os.path.join(place, PID)),
        *("--chardev", f"socket,id=monitor,path={address.path.replace(',', ',,')},server=on,wait=off"),
        *("--monitor", "chardev=monitor"),
    ]
    log = os.open(os.path.join(place, LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # In a session of its own: what ends this process and its terminal does not end it. Nobody waits for it here.
        process = subprocess.Popen(  # noqa: ASYNC220
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=tuple(fds),
            start_new_session=True,
            cwd="/",
            env={**os.environ, "LC_ALL": "C"},
        )
    finally:
        os.close(log)
    _started.append(process)
    try:
        await _wait_for_monitor(process, address, place)
    except BaseException:
        # It has no disk open yet.
        process.terminate()
        raise
    return address


async def _wait_for_monitor(process: subprocess.Popen[bytes], address: Address, place: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BackupError(
                f"{PROGRAM} did not start: {_said(place) or f'it ended with status {process.returncode}'}"
            )
        # It writes that when all is ready: a client that comes before may get no greeting.
        if os.path.exists(os.path.join(place, PID)):
            async with Monitor(address):
                return
        await asyncio.sleep(INTERVAL)
    raise BackupError(f"{PROGRAM} has not opened its monitor within {START_TIMEOUT:g} s: {_said(place)}")


def _prepare(place: str, note: DaemonNote) -> None:
    above, own = os.path.split(place)
    with Directory.at(above) as directory:
        if not directory.is_directory(own):
            directory.make(own)
        with directory.directory(own) as room:
            # What one has left that was killed.
            for name in room.names():
                room.remove(name)
            room.write(NOTE, json.dumps(asdict(note)).encode())


def _said(place: str) -> str:
    """Return what it has written to its log."""
    with open(os.path.join(place, LOG), "rb") as source:
        return shorten(redact_text(source.read(1 << 16).decode("utf-8", "replace")))


async def open_disks(monitor: Monitor, disks: Sequence[DiskFile], besides: Collection[str] = ()) -> None:
    """Have a storage daemon open the disks of its VM. CommandError where a VM has one open, or it is no such image.

    C(besides) are the nodes of those that it could not open.

    All of them, also those that are not copied: a VM that fails at its first disk has opened no other. QEMU does not
    close one that it has opened, and the bitmaps in that would count as lost.
    """
    for node, disk in zip(map(node_name, itertools.count()), disks):
        if node not in besides:
            await monitor.execute("blockdev-add", await options(disk, node))


# To look


async def inspect(monitor: Monitor, name: str, uuid: str, address: str) -> Vm:
    """Ask a storage daemon about its VM, whose identity is left open without a C(uuid).

    C(address) is where it listens when it is on.
    """
    try:
        return await monitor.within(_inspect(monitor, name, uuid, address))
    except Odd as odd:
        raise monitor.senseless("query-named-block-nodes", str(odd)) from None


async def _inspect(monitor: Monitor, name: str, uuid: str, address: str) -> Vm:
    note = read_note(os.path.dirname(monitor.address.path))
    graph, block_jobs, jobs = await asyncio.gather(
        query_graph(monitor), monitor.execute("query-block-jobs"), monitor.execute("query-jobs")
    )
    known = {node_name(number): file for number, file in enumerate(note.disks)}
    for node in known.keys() & graph.nodes.keys():
        # It has them open to read them; their VM writes to them.
        graph.nodes[node]["ro"] = False
    disks, others = disks_of(graph)
    opened = {disk.node: disk for disk in disks}
    return Vm(
        name=name or note.vm,
        uuid=uuid,
        identity=uuid,
        status=OFF,
        version=monitor.version,
        disks=tuple(
            # One whose opener was killed may lack some.
            replace(opened.get(node, Disk(file.name, node, file.format)), name=file.name, file=file.file)
            for node, file in known.items()
        ),
        other_nodes=others,
        empty=(),
        jobs=merge_jobs(block_jobs, jobs),
        fdsets={},
        process=monitor.process,
        monitor=address,
        target_nodes=tuple(node for node in graph.nodes if TARGET_NODE.fullmatch(node)),
        daemon=note.attempt,
    )


def read_note(place: str) -> DaemonNote:
    """Read for what a storage daemon was started."""
    path = os.path.join(place, NOTE)
    try:
        with Directory.at(place) as room:
            note: DaemonNote = part(DaemonNote).read(load(room.read(NOTE, LONGEST_NOTE)))
    except (OSError, DocumentError) as error:
        raise BackupError(f"{path} cannot be read ({error}); end the {PROGRAM} of {place}/{PID}") from error
    return note


# To end


async def end(place: str, monitor: Monitor | None = None) -> None:
    """End the storage daemon of a place, and remove what belongs to it; where there is none, there is none to end.

    Only ever by the word C(quit): its jobs are cancelled. C(monitor) is a connection to it, where one is open: it
    serves one at a time. BackupError where it does not end.
    """
    try:
        if monitor:
            await _quit(monitor, place)
        else:
            async with Monitor(monitor_in(place)) as own:
                await _quit(own, place)
    except MonitorGone:
        # It was killed, or has never been there.
        pass
    _started[:] = [process for process in _started if process.poll() is None]
    _clear(place)


async def _quit(monitor: Monitor, place: str) -> None:
    process = monitor.process
    # It may be gone before its answer has come.
    with contextlib.suppress(MonitorGone):
        await monitor.execute("quit")
    await _wait_for_end(process, place)


async def _wait_for_end(process: Process | None, place: str) -> None:
    deadline = time.monotonic() + END_TIMEOUT
    pid = os.path.join(place, PID)
    while process.alive if process else os.path.exists(pid):
        if time.monotonic() >= deadline:
            raise BackupError(
                f"{PROGRAM} of {pid} does not end within {END_TIMEOUT:g} s: the target of a job hangs. Repair the"
                " target; the VM cannot be started before that"
            )
        await asyncio.sleep(INTERVAL)


def _clear(place: str) -> None:
    above, own = os.path.split(place)
    if not os.path.lexists(place):
        return
    with Directory.at(above) as directory:
        with directory.directory(own) as room:
            for name in room.names():
                room.remove(name)
        directory.remove_directory(own)

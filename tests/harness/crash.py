# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Kills a module, or others with it, at a point of its choice where it touches the world.

The world is what outlives the module: files, QEMU, the guest, child processes. It is touched by steps, and what changes
nothing (a query, a file that is read) is none. A step's point has a name that says what is done, and where in the
collection that was asked for: `publish > sync directory: fsync`. The steps are seen from outside,
by Python's own audit events (PEP 578) and a few functions that are replaced in the module's process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import worker
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import libvirt_client
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import monitor as qemu_monitor

if t.TYPE_CHECKING:
    from types import CodeType, FrameType

MODULE = 0
ASKER = -1
WORKER = -3
"""Stand among the victims for the module, for the one whose step it is (the module, its worker, or the guard of its
guest), and for the worker to which the module leaves the sets, with its child that works; before that, the module."""

BEFORE = "before"
AFTER = "after"
"""Right after is another moment than right before the next step where others act by themselves from then on."""

STEPS = {
    "_backup/board": {"_write_later": "tell", "note": "tell", "open": "tell"},
    "_backup/worker": {"leave": "leave"},
    "_backup/worker_place": {"take": "take place"},
    "_host/directory": {"remove": "remove", "sync": "sync directory"},
    "_host/lock": {"locked": "lock", "_open": "open lock", "take_at_once": "open lock"},
    "_host/preallocate": {
        "allocate": "allocate",
        "flush": "flush",
        "flush_open": "flush",
        "keeps_holes": "try holes",
        "punch_hole": "give back",
        "top_up": "allocate",
    },
    "_host/probe": {"probe_if_there": "look", "probe": "probe", "ask": "watch"},
    "_host/target_files": {"remove": "remove", "sync_directory": "sync directory", "take_name": "take name"},
    "_qemu/bitmaps": {"remove_bitmaps": "remove bitmaps"},
    "_qemu/block_jobs": {
        "cancel_jobs": "cancel jobs",
        "close_targets": "close targets",
        "dismiss_jobs": "dismiss jobs",
        "rehearse_backups": "rehearse",
        "remove_fdsets": "remove files",
        "remove_nodes": "remove nodes",
        "resume": "resume",
        "set_speed": "set speed",
        "stop_jobs": "cancel jobs",
        "start_backups": "start",
    },
    "_qemu/guest_agent": {"freeze": "freeze", "thaw": "thaw"},
    "_qemu/guest_freeze": {"Freezer": "hold guest", "thaw": "thaw guest"},
    "_qemu/image_files": {"add_bitmap": "add bitmap", "remove_bitmaps": "remove stored bitmaps"},
    "_qemu/qemu_img": {"run": "run", "run_long": "run"},
    "_qemu/storage_daemon": {"end": "end daemon", "open_disks": "open disks", "start": "start daemon"},
    "_qemu/target_image": {"_make_file": "make file", "create": "make image", "reserve": "reserve"},
    "_repository/access": {"create_repository": "create repository"},
    "_repository/published": {
        "remove_annotations": "remove annotations",
        "remove_note": "remove note",
        "remove_set": "remove set",
        "rewrite_manifest": "rewrite manifest",
        "write_annotation": "write annotation",
        "write_note": "write note",
    },
    "_repository/staging": {
        "begin": "begin",
        "describe": "write manifest",
        "discard": "discard",
        "discard_images": "discard images",
        "publish": "publish",
        "record_failure": "record failure",
        "remove_directory": "remove directory",
        "tidy": "tidy",
        "update": "update intent",
        "write_description": "write description",
    },
    "_drive_backup/owners": {"write_owners": "write owners"},
    "_drive_backup/receipt": {
        "create": "create receipt",
        "discard": "discard receipt",
        "finish": "finish receipt",
        "set_phase": "update receipt",
        "sweep": "sweep receipts",
        "update": "update receipt",
    },
    "_prune/consolidate": {"consolidate": "consolidate", "finish_consolidation": "finish consolidation"},
    "_restore/overlays": {"remove_overlays": "remove overlays"},
    "_restore/pins": {"pinned": "pin", "put_pin": "pin", "remove_other_pins": "unpin", "remove_pins": "unpin"},
    "_restore/restore": {"_restore_disk": "restore disk", "_finish": "finish restore"},
    "_verify/boot": {"work_dir": "work directory", "clear_work_dirs": "clear work directories", "watch": "start VM"},
    "_verify/record": {"annotate": "pin", "record": "record", "remove_pins": "unpin"},
    "_plan/observe": {"SpaceTracker": "track space", "space_in": "measure space"},
}
"""The names of the steps, by the file and the function that take them. They stay when an engine is built anew.

A function that has none here is called by its file and its name.
"""
PASSED_THROUGH = frozenset(
    {
        "_backup/worker",
        "_host/directory",
        "_host/files",
        "_host/target_files",
        "_host/texts",
        "_host/worker",
        "_qemu/connection",
        "_qemu/libvirt_client",
        "_qemu/libvirt_domain",
        "_qemu/monitor",
        "_qemu/qmp_client",
        "_repository/json_file",
        "_repository/repository",
    }
)
"""What takes no step of its own, but where a name above says so."""
JOBS = frozenset({*STEPS["_qemu/block_jobs"].values(), *STEPS["_qemu/bitmaps"].values()})
"""The steps that tell QEMU's block jobs what to do."""

WORKER_BEGINS = ("_backup/worker", "_fork")
CHILD_BEGINS = ("_host/worker", "run_in_worker")
"""Where a worker is forked, and where the process that works is."""

COLLECTION = str(Path(qemu_monitor.__file__).parents[1])

# Names of audit events that begin with "os." and change nothing that outlives the process. All others are steps.
HARMLESS = frozenset(
    f"os.{name}" for name in ("chdir", "getxattr", "listdir", "listxattr", "putenv", "scandir", "unsetenv", "walk")
)
# C functions that change nothing either.
HARMLESS_IN_C = frozenset({"fstatfs", "sync_file_range"})
# What only asks: QEMU, an agent, qemu-img.
QUESTIONS = ("query-", "qom-", "qmp_capabilities", "guest-sync", "guest-info", "guest-fsfreeze-status")
READERS = frozenset({"check", "compare", "info", "map", "measure"})


@dataclasses.dataclass(frozen=True)
class Point:
    """Where to strike: at the n-th hit of the point of this name."""

    name: str
    hit: int = 1
    moment: str = BEFORE

    def __str__(self) -> str:
        return f"{self.moment} {self.name}" + (f" (hit {self.hit})" if self.hit > 1 else "")


def arm(
    at: int | Point = 0,
    victims: t.Sequence[int | Path] = (MODULE,),
    record: Path | None = None,
    deed: t.Callable[[], object] | None = None,
) -> None:
    """Kill the victims right before the n-th step of this process, or at a point; write down every point in `record`.

    A victim that is not there yet is given by the file that will have its process id. `deed` is what this process does
    to the world before that.

    From asyncio.run on: before, there are only imports and the reading of arguments. Where the sets are left to a
    worker, from there on, in the module as well as in the worker.
    """
    run, leave = asyncio.run, worker.leave

    def run_watched(*args: t.Any, **kwargs: t.Any) -> t.Any:
        _Watch(at, victims, record, deed).begin()
        return run(*args, **kwargs)

    def leave_watched(*args: t.Any) -> None:
        asyncio.run = run
        _Watch(at, victims, record, deed).begin()
        leave(*args)

    asyncio.run, worker.leave = run_watched, leave_watched


def read(record: Path) -> list[Point]:
    """The points that were hit, in about their order: of two threads, one may come between the other's two."""
    lines = (line.split(" ", 2) for line in record.read_text().splitlines())
    return [Point(name, int(hit), moment) for moment, hit, name in lines]


class _Watch:
    def __init__(
        self,
        at: int | Point,
        victims: t.Sequence[int | Path],
        record: Path | None,
        deed: t.Callable[[], object] | None,
    ) -> None:
        self._at = at
        self._victims = victims
        self._deed = deed
        self._record = str(record) if record else ""
        self._module = self._worker = os.getpid()
        self._active = True
        self._struck = mmap.mmap(-1, 1)
        """Not 0 once the victims are dead. A guard has this in common with the module, which may do its work then."""
        self._steps = itertools.count(1)
        self._hits: dict[tuple[str, str], t.Iterator[int]] = {}
        self._askers: dict[str, str] = {}
        """Where the QMP commands were asked for that are on their way, by their names: a task of its own sends them."""

    def begin(self) -> None:
        sys.dont_write_bytecode = True
        sys.addaudithook(self._hear)
        os.register_at_fork(after_in_parent=lambda: self._step("fork", AFTER), after_in_child=self._in_child)
        for name in ("fsync", "pwrite"):
            self._announce(os, name)
        self._announce_commands()
        self._announce_calls()
        self._announce_messages("send")
        self._announce_messages("sendall")
        self._announce_programs()

    # What is a step

    def _hear(self, event: str, args: tuple[t.Any, ...]) -> None:
        """An audit event: something is about to be done."""
        if not self._active:
            return
        if event == "open":
            path, _mode, flags = args
            if isinstance(path, str) and flags & (os.O_CREAT | os.O_TRUNC) and path != self._record:
                self._step("create")
        elif event == "ctypes.dlsym":
            # Looked up only to be called at once.
            if args[1] not in HARMLESS_IN_C:
                self._step(str(args[1]))
        elif event == "socket.sendmsg":
            self._step("pass a file")
        elif event.startswith("os.") and event not in HARMLESS:
            self._step(event[len("os.") :])

    def _announce(self, place: t.Any, name: str) -> None:
        function = getattr(place, name)

        def announced(*args: t.Any, **kwargs: t.Any) -> t.Any:
            self._step(name)
            return function(*args, **kwargs)

        setattr(place, name, announced)

    def _announce_commands(self) -> None:
        execute = qemu_monitor.Monitor.execute

        async def announced(monitor: t.Any, command: str, arguments: t.Any = None, fd: t.Any = None) -> t.Any:
            self._askers[command] = _place()
            return await execute(monitor, command, arguments, fd)

        qemu_monitor.Monitor.execute = announced

    def _announce_calls(self) -> None:
        """What is said to QEMU through libvirt. It is a thread of its own that says it."""
        ask = libvirt_client.LibvirtClient._ask

        def announced(client: t.Any, request: str, file: int | None) -> str:
            command = _command(request.encode())
            if not command:
                return ask(client, request, file)
            place = self._askers.get(command)
            self._step(command, place=place)
            said = ask(client, request, file)
            self._step(command, AFTER, place)
            return said

        libvirt_client.LibvirtClient._ask = announced  # type: ignore[method-assign]

    def _announce_messages(self, name: str) -> None:
        """What is said to QEMU and to agents. Behind the message, they do as told, whoever lives to hear the answer."""
        function = getattr(socket.socket, name)

        def announced(connection: socket.socket, data: t.Any, *args: t.Any) -> t.Any:
            command = _command(bytes(data))
            if not command:
                return function(connection, data, *args)
            self._step(command, place=self._askers.get(command))
            sent = function(connection, data, *args)
            self._step(command, AFTER, self._askers.get(command))
            return sent

        setattr(socket.socket, name, announced)

    def _announce_programs(self) -> None:
        """Programs work on by themselves."""
        start = subprocess.Popen.__init__

        def announced(process: t.Any, command: t.Sequence[str], *args: t.Any, **kwargs: t.Any) -> None:
            program = _program(command)
            if program:
                self._step(program)
            start(process, command, *args, **kwargs)
            if program:
                self._step(program, AFTER)

        subprocess.Popen.__init__ = announced

    def _in_child(self) -> None:
        """A guard goes on touching the guest, and a worker everything. What a probe does is seen by nobody."""
        forked_by = _room(sys._getframe(1).f_code)
        if forked_by == WORKER_BEGINS:
            self._worker = os.getpid()
        elif forked_by != CHILD_BEGINS:
            self._active = self._active and "_qemu/guest_freeze" in [room for room, _function in _rooms()[0]]

    # What comes of it

    def _step(self, operation: str, moment: str = BEFORE, place: str | None = None) -> None:
        place = place or _place()
        if not self._active or not place:
            return
        name = f"{place}: {operation}"
        hit = next(self._hits.setdefault((moment, name), itertools.count(1)))
        here: set[int | Point] = {Point(name, hit, moment)}
        if moment == BEFORE and os.getpid() == self._module:
            here.add(next(self._steps))
        if self._record:
            # A guard closes all files but its own: this one cannot be kept open.
            with open(self._record, "a", encoding="utf-8") as record:
                record.write(f"{moment} {hit} {name}\n")
        if self._at in here and not self._struck[0]:
            self._struck[0] = 1
            self._strike()

    def _strike(self) -> None:
        me = os.getpid()
        if self._deed:
            # What it does is no step of the module.
            self._active = False
            self._deed()
            self._active = True
        meant = {ASKER: me, MODULE: self._module, WORKER: self._worker}
        pids = {int(one.read_text()) if isinstance(one, Path) else meant.get(one, one) for one in self._victims}
        for pid in pids - {me}:
            _kill(pid)
        if me in pids:
            os.kill(me, signal.SIGKILL)


def _kill(pid: int) -> None:
    """Kill another process; it is dead when this returns."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)


def _command(data: bytes) -> str:
    """The command in a message to QEMU or an agent; empty where it is none, or asks only."""
    try:
        command = str(json.loads(data.lstrip(b"\xff"))["execute"])
    except (ValueError, KeyError, TypeError):
        return ""
    return "" if command.startswith(QUESTIONS) else command


def _program(command: t.Sequence[str]) -> str:
    """What is run; empty for what only reads."""
    words = [os.path.basename(word) for word in command]
    if "qemu-img" not in words:
        return words[0]
    verb = words[words.index("qemu-img") + 1]
    return "" if verb in READERS or "help" in words else f"qemu-img {verb}"


def _place() -> str:
    """The steps that one comes through to this place, as they are named above; empty outside of the collection.

    Where an engine takes a step itself, it is that function of the engine.
    """
    rooms, engine = _rooms()
    return " > ".join(STEPS[room].get(function, f"{room}.{function}") for room, function in rooms) or engine


def _rooms() -> tuple[list[tuple[str, str]], str]:
    """The files that one comes through, each with the function by which it was entered, and the engine before them."""
    rooms: list[tuple[str, str]] = []
    frame: FrameType | None = sys._getframe(2)
    engine = ""
    while frame:
        room, function = _room(frame.f_code)
        if (room, function) == CHILD_BEGINS:
            # The process that waits for the one that works does nothing of its own.
            break
        if room in STEPS and (function in STEPS[room] or room not in PASSED_THROUGH):
            if rooms and rooms[-1][0] == room:
                rooms.pop()
            rooms.append((room, function))
        elif room and room not in PASSED_THROUGH:
            engine = f"{room}.{function}"
            break
        frame = frame.f_back
    return rooms[::-1], engine


def _room(code: CodeType) -> tuple[str, str]:
    """The file of the collection's module code and its function; empty for all other code, and what has no name."""
    directory, _slash, file = code.co_filename.rpartition("/")
    place, _slash, package = directory.rpartition("/")
    if place != COLLECTION or code.co_name.startswith("<"):
        return "", ""
    # What is special to a class is known by the class: `Freezer`, not `__aenter__`.
    name = code.co_qualname.split(".")[-2] if code.co_name.startswith("__") else code.co_name
    return f"{package}/{file[: -len('.py')]}", name

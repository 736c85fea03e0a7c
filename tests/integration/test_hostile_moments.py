# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A pipe, a socket or a device takes the place of something while a module is at work: nothing hangs, and nothing is
written into it.

What was looked at a moment ago is another thing by now. test_hostile_entries.py has what stood there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory
from ansible_collections.vmfleet.backup.plugins.module_utils._prune import consolidate, prune
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import block_jobs, target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._restore import restore
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import image_check, verify
from ansible_collections.vmfleet.backup.tests.harness.hostile import (
    NEIGHBOUR,
    ODD,
    Canary,
    Pair,
    ask,
    put_socket,
    put_zeroes,
    said,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, result_of

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage

    Put = Callable[[Path, int], object]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices need root")

KINDS: dict[str, Put] = {
    "pipe": lambda path, _disk: os.mkfifo(path),
    "socket": lambda path, _disk: put_socket(path),
    "device": lambda path, _disk: put_zeroes(path),
    "disk": lambda path, disk: os.mknod(path, 0o600 | stat.S_IFBLK, disk),
}
NEW = "s9"
"""The set that is made."""
GROWING = f".{NEW}.staging"
IMAGE = "drive0.qcow2"
RESTORED = f"restored/{IMAGE}"
PLAN, COPY = "the plan is carried out", "the copies have ended"


class Call(t.NamedTuple):
    """Where to step in: right before a call of a function."""

    place: t.Any
    name: str
    when: Callable[..., bool]
    """Whether it is the call that is meant."""


def concerns(*arguments: t.Any) -> bool:
    """Whether something is asked for the VM of which something becomes odd."""
    return any(ODD in str(getattr(one, "path", one)) for one in arguments)


def of(name: str) -> Callable[..., bool]:
    """Whether something is done to an entry of this name."""
    return lambda place, entry, *_more: ODD in place.path and entry == name


MOMENTS: dict[str, Call] = {
    "its image is made": Call(target_image, "_make_file", concerns),
    "its space is reserved": Call(target_image, "reserve", concerns),
    "it is opened for QEMU": Call(block_jobs, "open_pair", concerns),
    "it is flushed": Call(finish, "finish_image", concerns),
    "the manifest is written": Call(Directory, "write", of("manifest.json")),
    "it gets its name": Call(Directory, "rename", of(GROWING)),
    "its checksum is taken": Call(image_check, "check_all", concerns),
    "its header is read": Call(image_check, "open_chain", concerns),
    "what was found is written down": Call(verify, "record", concerns),
    "it is copied": Call(restore, "_copy", concerns),
    "the copy is flushed": Call(preallocate, "flush_open", lambda *_all: True),
    "the copy gets its name": Call(restore, "_take_name", concerns),
    "a set is removed": Call(prune, "remove_set", concerns),
    "an increment becomes full": Call(consolidate, "_copy_full", concerns),
    "that is written down": Call(consolidate, "write_note", concerns),
    "the manifest is written anew": Call(consolidate, "rewrite_manifest", concerns),
}

# What becomes of it (failed, or done), and whether the thing is named: it need not be where its place is taken back, or
# is of no use any more.
FAILED, TOLD, DONE = (True, True), (False, True), (False, False)

# For each verb: before what something is exchanged, and what becomes of it.
TABLE: dict[str, dict[str, dict[str, tuple[bool, bool]]]] = {
    "set": {
        PLAN: {
            GROWING: FAILED,
            NEW: (True, False),
            ".lock": FAILED,
            "s2": DONE,
            "s2/manifest.json": TOLD,
            f"s2/{IMAGE}": DONE,
        },
        COPY: {
            GROWING: FAILED,
            NEW: FAILED,
            ".lock": FAILED,
            "s2/manifest.json": TOLD,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": FAILED,
            f"{GROWING}/vm.json": FAILED,
            f"{GROWING}/manifest.json": TOLD,
            f"{GROWING}/manifest.json.new": DONE,
        },
        "its image is made": {
            GROWING: FAILED,
            NEW: FAILED,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": DONE,
        },
        "its space is reserved": {
            GROWING: FAILED,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": DONE,
        },
        "it is opened for QEMU": {
            GROWING: FAILED,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": DONE,
        },
        "it is flushed": {
            GROWING: FAILED,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": FAILED,
            f"{GROWING}/vm.json": FAILED,
            f"{GROWING}/manifest.json": TOLD,
            ".lock": FAILED,
        },
        "the manifest is written": {
            GROWING: FAILED,
            f"{GROWING}/{IMAGE}": FAILED,
            f"{GROWING}/intent.json": DONE,
            f"{GROWING}/vm.json": FAILED,
            f"{GROWING}/manifest.json.new": DONE,
            NEW: FAILED,
        },
        "it gets its name": {NEW: FAILED, "s2/manifest.json": TOLD},
    },
    "verify": {
        "its checksum is taken": {f"s2/{IMAGE}": FAILED, f"s1/{IMAGE}": FAILED, "s2": (True, False), ".lock": TOLD},
        "its header is read": {f"s2/{IMAGE}": FAILED, f"s1/{IMAGE}": FAILED, "s1": (True, False)},
        "what was found is written down": {".s2.verified.json": TOLD, ".lock": TOLD, f"s2/{IMAGE}": DONE},
    },
    "restore": {
        "it is copied": {
            f"s2/{IMAGE}": FAILED,
            f"s1/{IMAGE}": FAILED,
            "s2/manifest.json": FAILED,
            "s1": (True, False),
            RESTORED: FAILED,
            f"{RESTORED}.partial": FAILED,
            f"{RESTORED}.restored.json": DONE,
            ".lock": TOLD,
        },
        "the copy is flushed": {RESTORED: FAILED, f"{RESTORED}.partial": FAILED, f"s2/{IMAGE}": DONE},
        "the copy gets its name": {RESTORED: FAILED, f"{RESTORED}.partial": (True, False)},
    },
    "prune": {
        "a set is removed": {"s1": (True, False), "s1/manifest.json": DONE, f"s1/{IMAGE}": DONE},
        "an increment becomes full": {
            "s1": FAILED,
            "s1/manifest.json": FAILED,
            f"s1/{IMAGE}": FAILED,
            "s2": (True, False),
            ".lock": FAILED,
            f"s2/{IMAGE}": FAILED,
            f".s2.{IMAGE}.consolidating": FAILED,
            ".s2.consolidation.json": FAILED,
        },
        "that is written down": {
            "s1": FAILED,
            "s2": FAILED,
            f"s2/{IMAGE}": DONE,
            f".s2.{IMAGE}.consolidating": (True, False),
            "s2/manifest.json": DONE,
            ".s2.consolidation.json": DONE,
        },
        "the manifest is written anew": {"s2": FAILED, "s2/manifest.json": DONE, ".s2.consolidation.json": DONE},
    },
}
ROWS = [
    (verb, moment, place, *expected)
    for verb, moments in TABLE.items()
    for moment, places in moments.items()
    for place, expected in places.items()
]
CASES = [
    pytest.param(*(*row, kind), marks=() if number % len(KINDS) == list(KINDS).index(kind) else pytest.mark.thorough)
    for number, row in enumerate(ROWS)
    for kind in KINDS
]


class Thing:
    """What takes the place of something, which is put aside."""

    def __init__(self, put: Put, path: Path, directory: Path, disk: Path) -> None:
        self.path = path
        self._put = put
        self._aside = directory / "aside"
        self._disk = disk
        self._content = self._digest()

    def put(self) -> None:
        if os.path.lexists(self.path):
            self.path.rename(self._aside)
        self._put(self.path, self._disk.stat().st_rdev)
        self._aside.with_name("exchanged").touch()

    @property
    def exchanged(self) -> bool:
        """Whether it has come to that, in this process or in that of a module."""
        return self._aside.with_name("exchanged").exists()

    def put_before(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(call.place, call.name)
        # Images are flushed side by side.
        one_at_a_time = threading.Lock()

        def exchange_and_call(*arguments: t.Any, **options: t.Any) -> t.Any:
            with one_at_a_time:
                if not self.exchanged and call.when(*arguments):
                    self.put()
            return function(*arguments, **options)

        monkeypatch.setattr(call.place, call.name, exchange_and_call)

    def take_away(self) -> None:
        """Bring back what was there, if its place is still there and free."""
        if os.path.lexists(self.path) and not (self.path.is_dir() or self.path.is_file()):
            self.path.unlink()
        if os.path.lexists(self._aside) and self.path.parent.exists() and not os.path.lexists(self.path):
            self._aside.rename(self.path)

    def assert_unwritten(self) -> None:
        assert self._digest() == self._content

    def _digest(self) -> str:
        return hashlib.sha256(self._disk.read_bytes()).hexdigest()


class Verb:
    """A module at work on the repository."""

    def __init__(self, name: str, pair: Pair, directory: Path) -> None:
        self._name = name
        self._pair = pair
        self._where = directory / "restored"
        self._where.mkdir()
        self._given = {"repository": str(pair.library.path)}
        self._plan: dict[str, t.Any] = {}

    def prepare(self, moment: str, thing: Thing) -> None:
        """Bring about what it begins with."""
        if self._name != "set":
            return
        self._plan = self._planned(**({"speed": SLOW, "level": "full"} if moment == COPY else {}))
        if moment == COPY:
            assert not ask("backup_set", {"plan": self._plan, "state": "started"})["rc"]
        if moment in (PLAN, COPY):
            thing.put()
        self._release()

    def _planned(self, **options: t.Any) -> dict[str, t.Any]:
        monitors = [{"monitor": str(vm.monitor)} for vm in self._pair.vms]
        asked = {**self._given, "id": NEW, "reserve": "0", "vms": monitors, **options}
        plan: dict[str, t.Any] = ask("backup_plan", asked)["plan"]
        return plan

    def _release(self) -> None:
        for vm in self._pair.vms:
            for job in vm.block_jobs:
                # It may have ended.
                with contextlib.suppress(QmpError):
                    vm.qmp.execute("block-job-set-speed", device=job["device"], speed=0)

    def do(self) -> dict[str, t.Any]:
        """Do it, whatever comes of it."""
        if self._name == "set":
            return ask("backup_set", {"plan": self._plan})
        if self._name == "verify":
            return ask("backup_verify", {**self._given, "depth": "image"})
        if self._name == "restore":
            return ask("backup_restore", {**self._given, "vm": ODD, "directory": str(self._where)})
        return ask("backup_prune", {**self._given, "keep_last": 1, "consolidate": True})

    def assert_neighbour_served(self, result: dict[str, t.Any]) -> None:
        """All was done with the healthy VM."""
        if self._name == "prune":
            assert self._pair.library.listed(NEIGHBOUR) == ["s2"]
            assert self._pair.library.manifest(NEIGHBOUR, "s2")["level"] == "full"
            return
        self._pair.assert_neighbour_whole()
        if self._name == "set":
            assert result_of(result, NEIGHBOUR)["state"] == "published"
        elif self._name == "verify":
            assert not [one for one in result["results"] if one["vm"] == NEIGHBOUR and one["error"]]

    def assert_real(self, thing: Thing) -> None:
        """What was made consists of files."""
        made = self._where if self._name == "restore" else self._pair.odd / NEW
        found = [path for path in made.rglob("*") if not stat.S_ISREG(path.lstat().st_mode) and path != thing.path]
        assert not found

    def repeat(self, moment: str) -> dict[str, t.Any]:
        """Do it again: now it has to succeed."""
        if self._name == "set":
            self._plan = self._planned()
            self._release()
        elif self._name == "restore":
            self._where = self._where.with_name(f"again, before {moment}")
            self._where.mkdir()
        return self.do()


@pytest.mark.parametrize(("verb", "moment", "place", "fails", "named", "kind"), CASES)
def test_something_else_takes_its_place(
    pair: Pair,
    canary: Canary,
    directory: Path,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    moment: str,
    place: str,
    fails: bool,
    named: bool,
    kind: str,
) -> None:
    path = directory / place if place.startswith("restored/") else pair.odd / place
    thing = Thing(KINDS[kind], path, directory, storage.loop(16 * MIB))
    work = Verb(verb, pair, directory)
    work.prepare(moment, thing)
    if moment in MOMENTS:
        thing.put_before(MOMENTS[moment], monkeypatch)
    result = work.do()
    monkeypatch.undo()
    print(result.get("msg"), result["warnings"], [vm["error"] for vm in result.get("vms", ())])
    assert thing.exchanged
    assert bool(result["rc"]) == fails, result
    if named:
        assert str(path) in said(result)
    elif fails:
        # By the name that it has got by then, or by the set's.
        assert NEW in said(result) or "s1" in said(result) or "s2" in said(result) or IMAGE in said(result)
    canary.assert_untouched()
    thing.assert_unwritten()
    work.assert_neighbour_served(result)
    if not fails:
        work.assert_real(thing)
    thing.take_away()
    again = work.repeat(moment)
    assert not again["rc"], again

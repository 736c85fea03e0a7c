# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A domain that is shut off is backed up, and something comes in between: the module is killed, its storage daemon or
libvirtd ends, or somebody starts the domain. The next run has what was wanted.

It strikes where the module touches the world for a domain that is off. Each run takes some of these points, one hit of
each; VMFLEET_CRASHES=all is for every hit of all, and for all that may come in between.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import daemon_place
from ansible_collections.vmfleet.backup.tests.harness import crash
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.libvirt import programs
from ansible_collections.vmfleet.backup.tests.harness.matrix import WHOLE, deal, dice
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of
from ansible_collections.vmfleet.backup.tests.harness.turns import Turns

if t.TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

HANDS = 40 if WHOLE else 2
SHARE = 0.2
OFF = (
    *("begin", "add bitmap", "start daemon", "open disks", "update intent", "start:", "end daemon"),
    *("flush", "write manifest", "publish", "tidy", "remove stored bitmaps"),
)
BORN, GONE = "open disks: blockdev-add", "end daemon: quit"
"""Between these the storage daemon lives."""
PID = Path("/run/libvirtd.pid")


# What is done in the module, which is inside, where libvirt is.


def _end(pid: int) -> None:
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGTERM)
    select.select([process], [], [])
    os.close(process)


def end_storage_daemon() -> None:
    """Its images are closed, and their bitmaps stored."""
    for file in Path("/run/vmfleet-locks").glob(f"{daemon_place.PLACE}*/pid"):
        with contextlib.suppress(ProcessLookupError):
            _end(int(file.read_text()))


def restart_libvirt() -> None:
    """As an update of its package does."""
    _end(int(PID.read_text()))
    subprocess.run(programs().start("libvirtd"), check=True, capture_output=True)
    subprocess.run(["virsh", "list"], check=True, capture_output=True)


def start_domain() -> None:
    """That is refused while its disks are copied."""
    subprocess.run(["virsh", "start", "web"], check=False, capture_output=True)


DEEDS: dict[str, tuple[Callable[[], None] | None, tuple[int, ...]]] = {
    "the module is killed": (None, (crash.MODULE,)),
    "libvirtd is restarted": (restart_libvirt, ()),
    "libvirtd is restarted, and the module is killed": (restart_libvirt, (crash.MODULE,)),
    "the domain is started": (start_domain, ()),
    "the domain is started, and the module is killed": (start_domain, (crash.MODULE,)),
}
OF_THE_DAEMON: dict[str, tuple[Callable[[], None] | None, tuple[int, ...]]] = {
    "the storage daemon is ended": (end_storage_daemon, ()),
    "the storage daemon is ended, and the module is killed": (end_storage_daemon, (crash.MODULE,)),
}


class Stage:
    """Makes one set after the other, of a disk that has changed and one that has not, with a blow in between."""

    def __init__(self, turns: Turns, record: Path, start: Callable[..., ModuleProcess]) -> None:
        self._turns = turns
        self._record = record
        self._start = start
        self._number = 0
        turns.back_up("full")

    def play(
        self,
        at: crash.Point | None = None,
        deed: Callable[[], None] | None = None,
        victims: Sequence[int] = (),
    ) -> list[crash.Point]:
        """Make the next set, with a blow at a point; returns the points that were hit before that."""
        turns = self._turns
        self._number += 1
        set_id = f"s{self._number}"
        turns.write(self._number % 255 + 1, self._number % 64 * 65536)
        turns.freeze(set_id)
        plan = turns.plan(set_id, max_chain=1000)
        self._record.unlink(missing_ok=True)
        process = self._start(
            *("backup_set", {"plan": plan}),
            crash_at=at or 0,
            victims=victims,
            deed=deed,
            record=self._record,
            inside=turns.inside,
        )
        process.wait()
        if at:
            assert process.killed == (crash.MODULE in victims)
            if not process.killed:
                told = process.result()
                assert "exception" not in told, told
                print("   ", result_of(told, "web")["state"], result_of(told, "web")["error"], told["warnings"])
            # A run that has failed does not try again: this is another one.
            again = succeed("backup_set", {"plan": turns.plan(set_id, max_chain=1000)}, inside=turns.inside)
            assert result_of(again, "web")["state"] in ("published", "skipped"), again
        turns.assert_released()
        # No change is lost, and so there is no reason for a full image.
        assert turns.sets.levels("web", set_id) == dict.fromkeys(turns.disks, "incremental")
        turns.check(set_id)
        if turns.domain.state != "shut off":
            turns.domain.destroy()
        return crash.read(self._record)


@pytest.mark.parametrize("hand", range(HANDS))
def test_something_comes_in_between(
    libvirt: Libvirt, directory: Path, start_module: Callable[..., ModuleProcess], hand: int
) -> None:
    chance = dice()
    turns = Turns(libvirt, directory)
    stage = Stage(turns, directory / "points", start_module)
    points = stage.play()
    assert not [step for step in OFF if all(step not in point.name for point in points)]
    names = [point.name for point in points]
    alive = points[names.index(BORN) : names.index(GONE) + 1]
    for point in deal([point for point in points if point.name.startswith(OFF)], chance, hand, HANDS, SHARE):
        deeds = {**DEEDS, **OF_THE_DAEMON} if point in alive else DEEDS
        for what in deeds if WHOLE else [chance.choice(list(deeds))]:
            print(f"{point}: {what}")
            stage.play(point, *deeds[what])
    turns.domain.start()
    turns.write(0xA1, 7 * MIB)
    turns.back_up("on")
    assert turns.sets.levels("web", "on") == dict.fromkeys(turns.disks, "incremental")
    turns.check()

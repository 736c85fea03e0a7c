# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How far all hypervisors of a play are, put together by processes that know of one each.

They share a file, in which each hypervisor has a record at its place in the play. It is as good as it can be: where it
cannot be written or read, nothing is told of the fleet, and all else goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import STATES
from ansible_collections.vmfleet.backup.plugins.plugin_utils._progress import Standing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SPOKE = struct.Struct("<d")
"""When the fleet was told of last; at the beginning of the file."""
PHASE = struct.Struct("<q")
MOST = (1 << 63) - 1
RECORD = struct.Struct(f"<{4 + len(STATES)}q")
"""The phase, then bytes copied, bytes in all, whether these are a guess, and how many VMs are in each state."""


class Phase(IntEnum):
    """What is known of a hypervisor. Where the file has no record yet, it reads as C(UNKNOWN)."""

    UNKNOWN = 0
    BEGUN = 1
    """Nobody has looked at it since its sets were begun: it waits for one of Ansible's forks."""
    FOLLOWED = 2
    LOST = 3
    """Nobody follows it any more, because it cannot be reached, or cannot go on."""


class Fleet:
    """The file at C(path), for the record of C(host), which is one of C(hosts)."""

    def __init__(self, path: str, hosts: Sequence[str], host: str) -> None:
        self._path = path
        self._place = SPOKE.size + RECORD.size * hosts.index(host)

    def begin(self, standing: Standing) -> None:
        """Take in what is planned, if nothing is known yet."""
        with contextlib.suppress(OSError), self._open() as fd:
            if not os.pread(fd, PHASE.size, self._place).strip(b"\0"):
                self._write(fd, Phase.BEGUN, standing)

    def note(self, phase: Phase, standing: Standing) -> None:
        """Take in where the VMs of this hypervisor are."""
        with contextlib.suppress(OSError), self._open() as fd:
            self._write(fd, phase, standing)

    def lose(self) -> None:
        """Take in that nobody follows this hypervisor any more; its VMs stay where they were seen last."""
        with contextlib.suppress(OSError), self._open() as fd:
            os.pwrite(fd, PHASE.pack(Phase.LOST), self._place)

    def line(self, now: float, pace: float) -> str:
        """What there is to tell of several hypervisors.

        Empty where one of the processes has told it less than C(pace) seconds before C(now), by the monotonic clock.
        """
        with contextlib.suppress(OSError), self._open() as fd:
            content = os.pread(fd, os.fstat(fd).st_size, 0).ljust(SPOKE.size, b"\0")
            [spoke] = SPOKE.unpack_from(content)
            records = [record for record in _records(content) if record[0] != Phase.UNKNOWN]
            if len(records) > 1 and not (spoke and now - spoke < pace):
                os.pwrite(fd, SPOKE.pack(now), 0)
                return _told(records)
        return ""

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _write(self, fd: int, phase: Phase, standing: Standing) -> None:
        # An estimate can be of any size.
        copied, total = (min(number, MOST) for number in (standing.copied, standing.total))
        record = RECORD.pack(phase, copied, total, standing.guessed, *standing.states)
        os.pwrite(fd, record, self._place)


def _records(content: bytes) -> Iterator[tuple[Phase, Standing]]:
    whole = (len(content) - SPOKE.size) // RECORD.size * RECORD.size
    for phase, copied, total, guessed, *states in RECORD.iter_unpack(content[SPOKE.size : SPOKE.size + whole]):
        yield Phase(phase), Standing(tuple(states), copied, total, bool(guessed))


def _told(records: Sequence[tuple[Phase, Standing]]) -> str:
    unfinished = [phase for phase, standing in records if standing.unfinished]
    lost, waiting = unfinished.count(Phase.LOST), unfinished.count(Phase.BEGUN)
    hypervisors = [
        f"{len(records) - len(unfinished)} of {len(records)} hypervisors done",
        *([f"{lost} lost"] if lost else []),
        *([f"{waiting} not followed yet"] if waiting else []),
    ]
    in_all = Standing.sum(standing for _phase, standing in records)
    return "; ".join(part for part in (in_all.counts, in_all.amount, ", ".join(hypervisors)) if part)

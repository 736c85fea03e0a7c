# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down how far the VMs of a run are, for those who follow a worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from typing import TYPE_CHECKING

from .._common.printable import printable_result
from .outcome import Outcome, VmState, results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


INTERVAL = 2.0
"""Seconds between two writings. What all wait for, which is that every VM has been looked at, is written at once."""


class Board:
    """The file at C(path), which is in nobody else's directory; without a path, nothing is written.

    C(key) is the name of the worker that writes it, and C(opened) is called with the uuid of its repository: where it
    raises, nothing is begun.
    """

    def __init__(self, path: str = "", key: str = "", opened: Callable[[str], None] | None = None) -> None:
        self._path = path
        self._key = key
        self._opened = opened
        self._repository = ""
        self._begun = False
        self._outcomes: dict[int, Outcome] = {}
        self._unknown: set[int] = set()
        self._writing: asyncio.Task[None] | None = None

    def open(self, uuid: str) -> None:
        """Put up which repository it is, before anything is begun there: it may have other paths."""
        self._repository = uuid
        if self._path:
            self._write()
        if self._opened:
            self._opened(uuid)
        self._begun = True
        if self._path:
            self._write()

    def begin(self, set_id: str, names: Sequence[str]) -> None:
        """Put up the VMs, of which nothing is known yet."""
        reason = "it is about to be looked at"
        outcomes = (Outcome(name, set_id, VmState.QUEUED, reason=reason) for name in names)
        self._outcomes = dict(enumerate(outcomes))
        self._unknown = set(self._outcomes)
        self._change()

    def note(self, place: int, outcome: Outcome) -> None:
        """Put up where the VM at this place of the plan is now."""
        self._outcomes[place] = outcome
        if place in self._unknown:
            self._unknown.discard(place)
            if not self._unknown and self._path:
                self._write()
        self._change()

    def _change(self) -> None:
        if self._path and self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_later())

    async def _write_later(self) -> None:
        await asyncio.sleep(INTERVAL)
        self._writing = None
        self._write()

    def _write(self) -> None:
        vms = results(self._outcomes.values())
        known = bool(self._outcomes) and not self._unknown
        opened = {"repository": self._repository, "begun": self._begun}
        content = printable_result({"key": self._key, **opened, "known": known, "vms": vms})
        temporary = f"{self._path}.new"
        # The sets are made, too, where nobody can be told how far they are.
        with contextlib.suppress(OSError):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, self._path)

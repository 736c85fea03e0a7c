# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether the QEMU of an attempt has ended, as seen from where it was begun, and from elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import PATHS, PORTS, PROCESSES, spaces
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Origin
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID

ALIVE, DEAD = builders.own_process(), builders.dead_process()
MONITOR = "unix:/run/web01.qmp"
CONTAINER = {PROCESSES: "1", PATHS: "2", PORTS: "3"}
"""The name spaces of a container on this machine."""


def vm(**values: Any) -> Any:
    return builders.vm(**{"monitor": MONITOR, **values})


def origin(**values: Any) -> Origin:
    """Return where an attempt was begun: here, unless values say otherwise."""
    return Origin(**{"identity": UUID, "monitor": MONITOR, "process": (), "spaces": spaces(), **values})


class TestHasEnded:
    def test_what_has_its_jobs_has_not(self) -> None:
        assert origin(process=(DEAD.pid, DEAD.start)).has_ended(vm(), False, has_traces=True) is False

    @pytest.mark.parametrize("recorded", [spaces(), {}])
    def test_its_process_is_known(self, recorded: dict[str, str]) -> None:
        for off in (False, True):
            for answers in (None, vm()):
                alive = origin(process=(ALIVE.pid, ALIVE.start), spaces=recorded)
                assert alive.has_ended(answers, off, has_traces=False) is False
                dead = origin(process=(DEAD.pid, DEAD.start), spaces=recorded)
                assert dead.has_ended(answers, off, has_traces=False) is True

    @pytest.mark.parametrize(
        ("begun", "answers", "ended"),
        [
            (origin(), vm(), False),
            (origin(), vm(uuid="", identity="m:web01"), None),
            (origin(spaces={}), vm(monitor="unix:/run/other.qmp"), False),
            # The same VM at another monitor may be a copy of it.
            (origin(), vm(monitor="unix:/run/other.qmp"), None),
            (origin(spaces=CONTAINER), vm(), False),
            # Without a uuid, VMs of two containers can have one name, and one path for their sockets.
            (origin(identity="m:web01"), vm(uuid="", identity="m:web01"), False),
            (origin(identity="m:web01", spaces=CONTAINER), vm(uuid="", identity="m:web01"), None),
        ],
    )
    def test_a_vm_answers_at_its_monitor(self, begun: Origin, answers: Any, ended: bool | None) -> None:
        assert begun.has_ended(answers, False, has_traces=False) is ended

    @pytest.mark.parametrize(
        ("monitor", "recorded", "ended"),
        [
            (MONITOR, spaces(), True),
            (MONITOR, {**spaces(), PORTS: "3"}, True),
            (MONITOR, {**spaces(), PATHS: "2"}, None),
            ("tcp:127.0.0.1:4444", {**spaces(), PATHS: "2"}, True),
            ("tcp:127.0.0.1:4444", {**spaces(), PORTS: "3"}, None),
            ("libvirt:web01", {**spaces(), PORTS: "3"}, True),
            ("libvirt:web01", {**spaces(), PATHS: "2"}, None),
            ("", {}, True),
        ],
    )
    def test_nobody_is_at_its_monitor(self, monitor: str, recorded: dict[str, str], ended: bool | None) -> None:
        begun = origin(monitor=monitor, spaces=recorded)
        assert begun.has_ended(None, True, has_traces=False) is ended
        # One that does not answer is not off.
        assert begun.has_ended(None, False, has_traces=False) is False


class TestPlace:
    def test_here_and_elsewhere(self) -> None:
        assert origin().is_from_here
        assert not origin(spaces={**spaces(), PORTS: "3"}).is_from_here
        assert not origin(spaces=CONTAINER).is_from_here

    def test_another_process_answers(self) -> None:
        begun = origin(process=(DEAD.pid, DEAD.start))
        assert begun.is_other_process(vm(process=ALIVE))
        assert not begun.is_other_process(vm(process=DEAD))
        assert not begun.is_other_process(vm(process=None))
        assert not origin(process=(DEAD.pid, DEAD.start), spaces=CONTAINER).is_other_process(vm(process=ALIVE))
        assert not origin().is_other_process(vm(process=ALIVE))

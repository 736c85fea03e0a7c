# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Has the module backup_set wait in slices, and tells between them how far it is."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from multiprocessing import get_context
from typing import TYPE_CHECKING

from ansible import constants
from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome, VmState, outcome_of
from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable
from ansible_collections.vmfleet.backup.plugins.plugin_utils._fleet import Fleet, Phase
from ansible_collections.vmfleet.backup.plugins.plugin_utils._progress import Progress, standing_of
from ansible_collections.vmfleet.backup.plugins.plugin_utils._slices import UNWATCHED, WATCHED, Slices

if TYPE_CHECKING:
    from typing import Any

    from ansible.playbook.task import Task
    from ansible.utils.display import Display

QUIET_PACE = 60.0
"""Seconds between two lines where nobody watches."""

FLEET_PACE = 10.0
"""Seconds between two lines about all hypervisors where somebody looks on: each of them has lines of its own."""

MANY = 12
"""Running VMs of all hypervisors together beyond which nobody could follow a bar for each."""

MODULE = "vmfleet.backup.backup_set"
FOLLOW = "vmfleet.backup.backup_follow"

WORKERS = 3
"""How often the sets are left to a worker, before they are made without."""

HOW_TO_GO_ON = (
    "The copies continue after Ctrl-C, and without a connection.\n"
    "To follow them again, run the same playbook with -e vm_backup_id={}. To stop them, run vmfleet.backup.cancel.\n"
)

# Ansible loads this file before it forks a worker process for every host. A worker has no terminal of its own, and
# shares nothing with the others but what was there before: whoever gets the lock says what is to be said once.
ON_TERMINAL = sys.stdout.isatty()
FIRST_TO_SPEAK = get_context("fork").Lock()


class ActionModule(ActionBase):
    """Calls the module once, or slice by slice where it has to wait."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        found = self._in_slices(task_vars or {}) if self._waits() else self._once(task_vars or {})
        return {**result, **found}

    def _waits(self) -> bool:
        """Whether there may be something to show; whatever is wrong with the arguments, the module says."""
        state = self._task.args.get("state")
        return self._is_followed() and self._task.args.get("slice") is None and state in (None, "completed")

    def _is_followed(self) -> bool:
        """Whether somebody may want to know how far the sets of a plan are."""
        plan = self._task.args.get("plan")
        return (
            not self._task.async_val
            and not self._task.check_mode
            and isinstance(plan, dict)
            and {"id", "repository"} <= plan.keys()
            and isinstance(plan.get("vms"), list)
            and all(isinstance(vm, dict) and "name" in vm and isinstance(vm.get("bytes", 0), int) for vm in plan["vms"])
        )

    def _once(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        wrap_async = bool(self._task.async_val) and not self._connection.has_native_async
        found: dict[str, Any] = self._execute_module(task_vars=task_vars, wrap_async=wrap_async)
        if self._task.args.get("state") == "started" and self._is_followed() and "vms" in found:
            # Others tell of the fleet until this hypervisor has its turn to be followed.
            outcomes = list(map(outcome_of, found["vms"]))
            _fleet(self._task, task_vars).note(Phase.BEGUN, standing_of(_expected(self._task), outcomes))
        return found

    def _in_slices(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        quiet = self._task.args.get("progress") in ("quiet", "none") or not ON_TERMINAL
        slices = Slices(self._task.args["plan"], UNWATCHED if quiet else WATCHED)
        calls = _Calls(self._task.args, slices)
        speaker = _Speaker(self._display, self._task, slices, task_vars, quiet)
        while True:
            name, arguments = calls.next()
            try:
                found = self._execute_module(module_name=name, module_args=arguments, task_vars=task_vars)
            except AnsibleConnectionFailure:
                speaker.give_up()
                raise
            if calls.is_lost(found):
                continue
            if "vms" not in found:
                speaker.lose()
                return slices.broken_off(found)
            slices.note(found)
            if not slices.unfinished:
                speaker.end()
                return slices.result()
            speaker.speak()


def _expected(task: Task) -> list[int]:
    """The bytes that the plan has for each VM."""
    return [vm.get("bytes", 0) for vm in task.args["plan"]["vms"]]


def _fleet(task: Task, task_vars: dict[str, Any]) -> Fleet:
    """What the hypervisors of this play have in common, for the sets of one id and one use of a role."""
    host = task_vars["inventory_hostname"]
    hosts = task_vars.get("ansible_play_hosts_all", [])
    hosts = hosts if host in hosts else [host]
    use = (task.args["plan"]["id"], getattr(getattr(task, "_role", None), "_uuid", ""), *hosts)
    digest = hashlib.sha256(repr(tuple(map(str, use))).encode()).hexdigest()[:16]
    # Every run of Ansible has a directory of its own, which it removes.
    directory: str = constants.DEFAULT_LOCAL_TMP  # type: ignore[attr-defined]
    return Fleet(os.path.join(directory, f"vmfleet-{digest}"), hosts, host)


class _Calls:
    """The modules that are called until the sets of a plan are at their end.

    Where the task has C(detach), a worker makes them, and is followed; one that dies is replaced. Where there is none
    after so many times, the module makes them itself, slice by slice.
    """

    def __init__(self, arguments: dict[str, Any], slices: Slices) -> None:
        self._arguments = arguments
        self._slices = slices
        # What is only to be gone on with needs nobody who begins sets.
        detaches = arguments.get("detach") in ("preferred", "required") and boolean(arguments.get("begin", True), False)
        self._workers_left = WORKERS if detaches else 0
        self._worker = arguments.get("worker") or ""

    def next(self) -> tuple[str, dict[str, Any]]:
        """What is to be called now, and with which arguments."""
        if self._worker:
            wanted = {"repository": self._arguments["plan"]["repository"], "worker": self._worker}
            return FOLLOW, {**wanted, "wait": self._slices.length}
        arguments = {**self._arguments, **self._slices.arguments, "detach": "never"}
        arguments.pop("worker", None)
        if self._workers_left:
            self._workers_left -= 1
            arguments.update(state="started", detach="preferred", unattended=True)
        return MODULE, arguments

    def is_lost(self, found: dict[str, Any]) -> bool:
        """Take in what has been returned, and tell whether nothing has, because the worker has died."""
        if self._worker:
            ended = not found.get("running")
            self._worker = "" if ended else self._worker
            return ended and "vms" not in found and not found.get("failed")
        self._worker = found.get("worker", "")
        return False


class _Speaker:
    """Tells how far the sets of one hypervisor are, as often as it is wanted."""

    def __init__(self, display: Display, task: Task, slices: Slices, task_vars: dict[str, Any], quiet: bool) -> None:
        hosts = task_vars.get("ansible_play_batch") or [task_vars["inventory_hostname"]]
        width = max(len(host) for host in hosts) + 1
        self._display = display
        self._slices = slices
        self._progress = Progress(f"{task_vars['inventory_hostname']}:".ljust(width), _expected(task))
        self._fleet = _fleet(task, task_vars)
        queued = [Outcome(vm["name"], slices.id, VmState.QUEUED) for vm in task.args["plan"]["vms"]]
        self._fleet.begin(standing_of(_expected(task), queued))
        self._hosts = len(hosts)
        self._silent = task.args.get("progress") == "none" or task.no_log
        self._quiet = quiet
        self._spoke: float | None = None

    def speak(self) -> None:
        """Tell where they are, if it is time for it."""
        now = self._note()
        if self._silent or (self._quiet and self._spoke is not None and now - self._spoke < QUIET_PACE):
            return
        running = sum(outcome.state == VmState.RUNNING for outcome in self._slices.outcomes)
        few = running * self._hosts <= MANY or self._display.verbosity > 0
        lines = self._progress.lines(bars=few and not self._quiet)
        if self._spoke is None and FIRST_TO_SPEAK.acquire(block=False):
            lines[:0] = HOW_TO_GO_ON.format(self._slices.id).splitlines()
        self._spoke = now
        self._say([*lines, *self._of_fleet(now)])

    def end(self) -> None:
        """Tell that they are at their end, where somebody has been watching."""
        now = self._note()
        if self._spoke is not None and not self._quiet:
            self._say([*self._progress.lines(bars=False), *self._of_fleet(now)])

    def lose(self) -> None:
        """Have it known that nobody follows them any more."""
        self._fleet.lose()

    def give_up(self) -> None:
        """Tell what becomes of them when the hypervisor cannot be reached any more."""
        self.lose()
        if self._slices.unfinished and not self._silent:
            self._say([self._progress.about(self._slices.how_to_go_on())])

    def _note(self) -> float:
        now = time.monotonic()
        self._progress.note(now, self._slices.outcomes)
        self._fleet.note(Phase.FOLLOWED, self._progress.standing)
        return now

    def _of_fleet(self, now: float) -> list[str]:
        """What is to be told now of all hypervisors: nothing where there is but one."""
        line = self._fleet.line(now, QUIET_PACE if self._quiet else FLEET_PACE)
        return [f"fleet: {line}"] if line else []

    def _say(self, lines: list[str]) -> None:
        # Ctrl-C ends a worker wherever it is. In the middle of this it would keep the lock of the queue to the main
        # process for ever, which then hangs.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            # In one piece: nothing of another hypervisor gets in between, and it is one event of ansible-runner.
            self._display.display("\n".join(map(printable, lines)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

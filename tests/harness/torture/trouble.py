# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What comes in between while a set is made: writes, kills, cancelled jobs, and a repository that is full."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace
from ansible_collections.vmfleet.backup.tests.harness.crash import MODULE
from ansible_collections.vmfleet.backup.tests.harness.qemu import QmpError, wait_until
from ansible_collections.vmfleet.backup.tests.harness.torture.backups import LEFT_TO_A_WORKER
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
    from ansible_collections.vmfleet.backup.tests.harness.torture.backups import Backups

ROOM = 1 << 30

# Slow enough for something to happen to a job, and no slower: what has much to copy is let go in the end.
SLOW = "2M"

# About what one execution takes: killed at a later step, it has come to its end before.
STEPS = 100


class Trouble:
    """Sets that are not made undisturbed, and the next run, which needs no help."""

    def __init__(
        self,
        backups: Backups,
        meanwhile: dict[Callable[[], None], int],
        start: Callable[..., ModuleProcess],
        mount: FileSystem | None = None,
    ) -> None:
        """`meanwhile` is what can happen to the VM while a set is made, and how often."""
        self.backups = backups
        self.machine = backups.machine
        self.truth = backups.truth
        self.vm = backups.machine.vm
        self._meanwhile = meanwhile
        self._mount = mount
        self._start = start

    def disturb(self) -> None:
        """Things happen to the VM, to its jobs and to the module while a set is made slowly."""
        self.backups.draw_wish()
        set_id = self.backups.next_id()
        process = self._begin_slowly(set_id)
        for action in self.machine.chance.choices(list(self._meanwhile), list(self._meanwhile.values()), k=2):
            print(f"  meanwhile {action.__name__}")
            action()
        self.machine.chance.choice(self.endings())(process)
        if process:
            self._wait(process)
            if not process.killed:
                self.backups.told(process.result())
        self.truth.note()
        self.backups.recover(set_id)

    def endings(self) -> list[Callable[[ModuleProcess | None], None]]:
        """Return what may become of a set that is made slowly."""
        return [self._let_go, self._let_go, self._cancel_jobs, self._dismiss_jobs, self._cancel, self._kill, self._kill]

    def _begin_slowly(self, set_id: str) -> ModuleProcess | None:
        """Start the jobs of a set, or those of an older one; returns the module that follows them, where one does."""
        quiet = not self.truth.unfinished()
        if not quiet or not self.vm.alive or self.machine.chance.random() < 0.5:
            # Where another set comes to its end first, ours would be of a moment that nobody knows.
            self.backups.execute(set_id, "started", speed=SLOW)
            return None
        planned = self.backups.plan(set_id, speed=SLOW)
        # A killed module may have left jobs of a set that it had published.
        left = self._jobs()
        process = self._run(planned)
        wait_until(lambda: self._jobs() - left or not process.running, "the jobs")
        return process

    def _run(self, planned: dict[str, t.Any], **options: t.Any) -> ModuleProcess:
        return self._start("backup_set", {"plan": planned["plan"]}, inside=self.backups.sets.inside, **options)

    def _wait(self, process: ModuleProcess) -> None:
        process.wait()

    def _jobs(self) -> set[str]:
        return {job["device"] for job in self.vm.block_jobs}

    def _let_go(self, _process: ModuleProcess | None) -> None:
        print("  the jobs run on")
        self.machine.release()

    def _cancel_jobs(self, _process: ModuleProcess | None) -> None:
        print("  somebody cancels a job")
        for job in self.vm.block_jobs[: self.machine.chance.randint(1, 3)]:
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block-job-cancel", device=job["device"], force=True)
        self.machine.release()

    def _dismiss_jobs(self, _process: ModuleProcess | None) -> None:
        print("  somebody dismisses a job")
        self.machine.release()
        for job in self.vm.block_jobs[:1]:
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("job-dismiss", id=job["device"])

    def _cancel(self, _process: ModuleProcess | None) -> None:
        print("  somebody cancels the set")
        self.backups.bring_to("cancelled")
        self.machine.release()

    def _kill(self, process: ModuleProcess | None) -> None:
        """QEMU ends, the module, or both."""
        if process and self.machine.chance.random() < 0.6:
            print("  the module is killed")
            process.kill()
        if not process or process.killed is False or self.machine.chance.random() < 0.5:
            self.machine.end()

    def crash(self) -> None:
        """The module is killed at one of its steps, QEMU, or both."""
        self.backups.draw_wish()
        set_id = self.backups.next_id()
        self.machine.release()
        step = self.machine.chance.randint(1, STEPS)
        others = self.machine.victims()
        name = self.machine.chance.choice(list(others)) if self.machine.chance.random() < 0.3 else "the module"
        print(f"  {name} is killed at step {step}")
        victim = others.get(name, MODULE)
        process = self._run(self.backups.plan(set_id), crash_at=step, victims=[victim])
        self._wait(process)
        if not process.killed:
            self.backups.told(process.result())
        self.truth.note()
        if victim == MODULE and self.machine.chance.random() < 0.3:
            self.machine.end(kill=True)
        self.backups.recover(set_id)

    def crash_worker(self) -> None:
        """The worker is killed at any moment, or its QEMU, or both."""
        self.backups.draw_wish()
        set_id = self.backups.next_id()
        self.machine.release()
        place = WorkerPlace.of(str(self.backups.sets.path))
        arguments = {"plan": self.backups.plan(set_id)["plan"], **LEFT_TO_A_WORKER}
        process = self._start("backup_set", arguments, inside=self.backups.sets.inside)
        wait_until(lambda: place.is_held() or not process.running, "the worker")
        time.sleep(self.machine.chance.uniform(0, 1))
        who = place.who()
        if who and place.is_held() and self.machine.chance.random() < 0.8:
            print("  the worker is killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(who.pid, signal.SIGKILL)
        if self.machine.chance.random() < 0.3:
            self.machine.end(kill=True)
        self._wait(process)
        self.backups.told(process.result())
        wait_until(lambda: not place.is_held(), "the end of the worker")
        self.truth.note()
        self.backups.recover(set_id)

    def back_up_into_little(self) -> None:
        """There is hardly any room, or none, and then there is."""
        self.backups.draw_wish()
        set_id = self.backups.next_id()
        self.machine.release()
        self._squeeze(self.machine.chance.choice([0, 1 << 14, 1 << 20, 3 << 20]))
        self.backups.execute(set_id)
        self.truth.check()
        self._widen()
        self.backups.recover(set_id)

    def starve(self) -> None:
        """Jobs run, and the repository fills up; in some cases it could not reserve the space for them."""
        self.backups.draw_wish()
        set_id = self.backups.next_id()
        self.machine.release()
        self.backups.execute(set_id, "started", speed=SLOW)
        if self.machine.chance.random() < 0.6:
            print("  what was reserved is taken")
            for image in (self.backups.sets.path / NAME).glob(".*.staging/*.qcow2"):
                with image.open("r+b") as file:
                    file.truncate(image.stat().st_size)
        self._squeeze(0)
        self.machine.release()
        self.backups.execute(set_id)
        self.truth.check()
        self._widen()
        self.backups.recover(set_id)

    def _squeeze(self, leave: int) -> None:
        assert self._mount
        print(f"  {leave} bytes are left")
        # A file system that is cut short is as full as one that is filled, and that in no time. To a tmpfs, a size of 0
        # is none at all, and cannot be taken back.
        self._mount.grow(max(4096, ROOM - self._mount.free + leave))

    def _widen(self) -> None:
        assert self._mount
        self._mount.grow(ROOM)

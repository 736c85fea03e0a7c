# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: disks of one VM copied to targets at one point in time, and brought to that state from any other.

All memory is in QEMU (the jobs) and beside the targets (records and receipts), so that a step can be taken by any
process, at any time, after any crash: look, decide, act, under the VM's lock; then wait without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._common.errors import BackupError, CommandError, JobFailed, MonitorError, MonitorGone, Refused, after, in_words
from .._common.formats import seconds_since
from .._host import files, preallocate
from .._host.lock import locked
from .._host.machine import boot_id, machine_id
from .._host.namespaces import spaces
from .._qemu import block_jobs, target_image
from .._qemu.losses import lost_in_copy
from .._qemu.model import IO_ERROR
from .._qemu.monitor import Monitor
from .._qemu.query import inspect_vm, query_jobs
from .._qemu.vm_lock import host_lock_path, read_owners, write_owners
from . import preflight, receipt
from .receipt import ReceiptPhase
from .status import CANCELLED, FDSET_PREFIX, CopyState, attempt_of, digest, examine, lost_result, utc_now

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from .._host.process import Process
    from .._qemu.model import Vm
    from .receipt import Record
    from .request import Drive, Request
    from .status import Copy


SHORTEST_POLL = 0.02
LONGEST_POLL = 2.0
"""Seconds between two looks at a job: a twentieth of the time waited so far, within these bounds."""


@dataclass
class DriveBackup:
    """Brings one request to its state. C(commands), C(warnings) and C(changed) tell what it took."""

    request: Request
    commands: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    changed: bool = False

    def __post_init__(self) -> None:
        self._held: dict[str, int] = {}
        self._writebacks: list[preallocate.Writeback] = []

    async def ensure(self) -> list[dict[str, Any]]:
        """Take steps until the asked state is reached; returns the jobs' results."""
        began = time.monotonic()
        # Asked first and on its own: nobody may wait for a lock while holding a monitor.
        async with self._monitor() as monitor:
            process = monitor.process
        followed = ""
        while True:
            if self.request.check_mode:
                return (await self._step(process, followed, ()))[0]
            async with self._lock(process) as lock:
                results, followed = await self._step(process, followed, (lock,))
            if not followed:
                return results
            await self._follow(process, began, followed, results)

    def _monitor(self) -> Monitor:
        return Monitor(self.request.address, self.commands)

    def _lock(self, process: Process | None) -> AbstractAsyncContextManager[int]:
        return locked(host_lock_path(process, self.request.address), str(self.request.address))

    async def _look(self, monitor: Monitor) -> tuple[Vm, list[Copy]]:
        vm = await inspect_vm(monitor)
        owners = read_owners(host_lock_path(vm.process, self.request.address))
        copies = [_with_node(examine(drive, vm, owners), vm) for drive in self.request.drives]
        nodes = [copy.disk.node for copy in copies]
        for copy in copies:
            if nodes.count(copy.disk.node) > 1:
                raise Refused("device", f"{copy.drive.device} is asked for more than once on VM {vm.name}")
        return vm, copies

    # One step, under the VM's lock

    async def _step(
        self, process: Process | None, followed: str, holding: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], str]:
        """Look and act once; returns the results, and the attempt to follow or nothing.

        C(followed) is the attempt that this process has waited for: its end, good or bad, is this call's end.
        """
        try:
            async with self._monitor() as monitor:
                if monitor.process != process:
                    raise MonitorGone(f"{self.request.address}: QEMU was restarted in between")
                vm, copies = await self._look(monitor)
                if not self.request.check_mode:
                    # A process that died in mid-work leaves open files in QEMU, which keep its image locked.
                    await block_jobs.remove_fdsets(monitor, vm, FDSET_PREFIX)
                    if not vm.active_jobs() and await block_jobs.close_targets(monitor, vm, FDSET_PREFIX):
                        vm, copies = await self._look(monitor)
                    for copy in copies:
                        if copy.drive.receipt_path:
                            receipt.sweep(receipt.record_path(copy.drive.receipt_path))
                if self.request.state == "cancelled":
                    return await self._give_up(monitor, copies), ""
                return await self._advance(monitor, vm, copies, followed, holding)
        except MonitorGone as error:
            if followed:
                raise self._lost(followed, str(error)) from error
            raise

    async def _advance(
        self, monitor: Monitor, vm: Vm, copies: list[Copy], followed: str, holding: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], str]:
        if self._is_over(copies):
            await self._bury(monitor, vm, copies, followed)
            if self.request.check_mode:
                self.changed = True
                return [copy.result("planned") for copy in copies], ""
            vm, copies = await self._look(monitor)
        if any(copy.found == CopyState.RUNNING for copy in copies):
            return await self._join(monitor, vm, copies)
        if followed and any(copy.found in (CopyState.ABSENT, CopyState.OCCUPIED) for copy in copies):
            raise self._failed(
                vm,
                copies,
                "its job is gone, and no image was finished: it was cancelled elsewhere, or QEMU was restarted",
            )
        missing = any(copy.found in (CopyState.ABSENT, CopyState.OCCUPIED) for copy in copies)
        if missing and not self.request.check_mode:
            copies = await self._finish(monitor, copies)
        if missing:
            return await self._start(monitor, vm, copies, holding)
        self._refuse_other_moments(vm, copies)
        return await self._publish(monitor, copies), ""

    def _is_over(self, copies: list[Copy]) -> bool:
        """Whether an attempt has come to a bad end: at once where images belong together, else when all have ended."""
        bad = any(copy.failure or copy.found == CopyState.DEAD for copy in copies)
        return bad and (self._together or not any(copy.found == CopyState.RUNNING for copy in copies))

    @property
    def _together(self) -> bool:
        return self.request.completion_mode == "grouped"

    async def _bury(self, monitor: Monitor, vm: Vm, copies: list[Copy], followed: str) -> None:
        """Clean up after a bad end. Raises JobFailed where this call waited for it, or is the first to learn of it."""
        for copy in copies:
            preflight.refuse_lost_increment(copy, self.request.overwrite)
        bad = [copy for copy in copies if copy.failure or copy.found == CopyState.DEAD]
        # A failed copy takes the others of its group along; their cancellation is not the reason.
        causes = [copy for copy in bad if copy.failure != CANCELLED] or bad
        reason = "; ".join(f"{copy.who}: {_in_words(copy)}" for copy in causes)
        if not self.request.check_mode:
            whole = [
                copy for copy in copies if copy.state == "completed" and (not self._together or _irreplaceable(copy))
            ]
            await self._finish(monitor, whole)
            await self._clean(
                monitor,
                [
                    copy
                    for copy in copies
                    if copy.found in (CopyState.RUNNING, CopyState.ENDED, CopyState.COPIED, CopyState.DEAD)
                    and copy not in whole
                ],
            )
        first_to_know = self.request.state == "completed" and any(copy.failure for copy in copies)
        if followed or (first_to_know and not self.request.check_mode):
            raise self._failed(vm, copies, reason)
        self.warnings.append(f"VM {vm.name}: an earlier attempt came to nothing and is replaced: {reason}")

    def _failed(self, vm: Vm, copies: list[Copy], reason: str) -> JobFailed:
        return JobFailed(
            f"VM {vm.name}: the backup failed: {reason}. What it left is removed; repeat the call when the cause is"
            " gone",
            jobs=[copy.result("cancelled" if copy.found == CopyState.RUNNING else "") for copy in copies],
        )

    async def _join(self, monitor: Monitor, vm: Vm, copies: list[Copy]) -> tuple[list[dict[str, Any]], str]:
        """Take up jobs that run already."""
        running = [copy for copy in copies if copy.found == CopyState.RUNNING]
        strangers = [copy for copy in copies if copy.found in (CopyState.ABSENT, CopyState.OCCUPIED)]
        if strangers:
            jobs, rest = ", ".join(copy.job_id for copy in running), ", ".join(copy.who for copy in strangers)
            raise BackupError(
                f"VM {vm.name} is busy with {jobs}, which leaves out {rest}; wait for it or cancel it, then ask for all"
                " together"
            )
        for copy in running:
            if copy.job and copy.drive.speed not in (0, copy.job.speed):
                self.changed = True
                if not self.request.check_mode:
                    await block_jobs.set_speed(monitor, copy.job_id, copy.drive.speed)
        results = [copy.result() for copy in copies]
        if self.request.state == "started":
            return results, ""
        self.changed = True
        return results, "" if self.request.check_mode else attempt_of(copies)

    def _refuse_other_moments(self, vm: Vm, copies: list[Copy]) -> None:
        """Several images of one request belong to one point in time."""
        records = [copy.record for copy in copies if copy.record]
        if self._together and len({record.attempt for record in records}) > 1:
            raise Refused(
                "target",
                "VM {}: the targets are there, but come from different moments: {}; use other targets, or"
                " completion_mode individual".format(
                    vm.name, ", ".join(f"{record.target} ({record.started})" for record in records)
                ),
            )

    # Starting

    async def _start(
        self, monitor: Monitor, vm: Vm, copies: list[Copy], holding: tuple[int, ...]
    ) -> tuple[list[dict[str, Any]], str]:
        """Start what is not there. Everything that can be refused is refused before the first file exists."""
        starting = [copy for copy in copies if self._together or copy.found in (CopyState.ABSENT, CopyState.OCCUPIED)]
        preflight.refuse_busy(vm, starting)
        if self.request.encrypted_source == "refuse":
            preflight.refuse_encrypted(vm, starting)
        self.warnings += [f"VM {vm.name}: {loss}" for loss in lost_in_copy((copy.disk for copy in starting), vm.disks)]
        for copy in starting:
            if not copy.drive.receipt_path:
                self.warnings.append(
                    f"{copy.drive.target} is a block device without a receipt: every call writes it anew; give receipt"
                    " a path to change that"
                )
        targets = [await preflight.prepare_target(vm, copy, self.request.overwrite) for copy in starting]
        self.changed = True
        if self.request.check_mode:
            return [copy.result("planned" if copy in starting else "") for copy in copies], ""
        begun: list[Copy] = []
        attempt = secrets.token_hex(6)
        try:
            for copy, target in zip(starting, targets):
                record = _new_record(copy, vm, attempt, target)
                _claim(copy.drive, record)
                begun.append(replace(copy, found=CopyState.RUNNING, job=None, record=record))
                inode, generation = await self._make(copy, target, holding)
                record = replace(
                    record,
                    inode=inode,
                    generation=generation,
                    reserved=self._reserve(target),
                    phase=ReceiptPhase.COPYING,
                )
                begun[-1] = replace(begun[-1], record=record)
            self._note_owners(vm, begun, holding)
            await self._launch(monitor, begun, targets)
        except MonitorGone as error:
            raise self._lost(attempt, str(error)) from error
        except (BackupError, OSError) as error:
            with after(error):
                await self._clean(monitor, begun)
            if isinstance(error, OSError):
                raise BackupError(f"target: {in_words(error)}") from error
            raise
        by_node = {copy.disk.node: copy for copy in begun}
        results = [by_node.get(copy.disk.node, copy).result() for copy in copies]
        return results, attempt_of(begun) if self.request.state == "completed" else ""

    async def _make(self, copy: Copy, target: target_image.Target, holding: tuple[int, ...]) -> tuple[int, int]:
        """Create the image; returns its identity. One that exists loses its receipt, which is true no more."""
        drive = copy.drive
        if drive.existing:
            if drive.receipt_path:
                receipt.discard(drive.receipt_path)
        else:
            backing = (copy.disk.backing_file, copy.disk.backing_format)
            await target_image.create(target, backing if drive.sync == "top" and backing[0] else None, holding)
        if target.block_device:
            return 0, 0
        # The kernel tells of a failed write-back only those who had the file open by then.
        fd = os.open(target.path, os.O_RDWR | os.O_CLOEXEC)
        self._held[target.path] = fd
        self._writebacks.append(preallocate.Writeback(fd))
        return files.identity(os.path.realpath(target.path))

    def _note_owners(self, vm: Vm, begun: list[Copy], holding: tuple[int, ...]) -> None:
        """Remember whose the jobs are whose ids do not tell it."""
        chosen = {copy.drive.job_id: digest(copy.drive, copy.disk) for copy in begun if copy.drive.job_id}
        if chosen:
            known = read_owners(host_lock_path(vm.process, self.request.address))
            listed = {job.id for job in vm.jobs}
            write_owners(holding[0], {**{name: known[name] for name in known if name in listed}, **chosen})

    def _reserve(self, target: target_image.Target) -> bool:
        if target_image.reserve(target):
            return True
        free = files.free_bytes(target.path)
        if free < target.expected:
            raise BackupError(
                f"target: {target.path}: No space left on device: the backup needs up to {target.expected} bytes there,"
                f" and {free} are free"
            )
        self.warnings.append(
            f"{target.path}: its file system cannot reserve space. If it fills up before the copy has ended, the backup"
            " is cancelled for the guest's sake; only a call with state completed watches for that"
        )
        return False

    async def _launch(self, monitor: Monitor, begun: list[Copy], targets: list[target_image.Target]) -> None:
        await block_jobs.dismiss_jobs(monitor, [copy.job_id for copy in begun])
        starts = [
            block_jobs.BackupStart(copy.job_id, copy.disk.node, target, copy.opaque, copy.drive.arguments())
            for copy, target in zip(begun, targets)
        ]
        for copy in begun:
            # Before the start: a job that nobody knows of can end, and clear its bitmap.
            _write_phase(copy, ReceiptPhase.COPYING)
        try:
            await block_jobs.start_backups(monitor, starts, self.request.completion_mode)
        except CommandError as error:
            disks = ", ".join(copy.who for copy in begun)
            raise BackupError(
                f"{self.request.address}: QEMU did not start the backup of {disks}: {error.description}"
            ) from error

    # Waiting, without the lock

    async def _follow(self, process: Process | None, began: float, attempt: str, known: list[dict[str, Any]]) -> None:
        """Wait until a step can be taken. Raises where the wait ends for another reason, with what is known by then."""
        request = self.request
        now = joined = moved = asked = time.monotonic()
        offsets: dict[str, int] = {}
        while True:
            await asyncio.sleep(min(LONGEST_POLL, max(SHORTEST_POLL, (now - joined) / 20)))
            copies, trouble = await self._glance(process, attempt)
            if not trouble and not any(copy.found == CopyState.RUNNING for copy in copies):
                return
            for writeback in self._writebacks:
                writeback.nudge()
            now = time.monotonic()
            if not trouble:
                asked, known = now, [copy.result() for copy in copies]
            seen = {copy.job_id: copy.job.offset for copy in copies if copy.job}
            if trouble or seen != offsets:
                # What could not be seen does not stall.
                offsets, moved = seen, now
            if request.timeout and now - began >= request.timeout:
                await self._time_out(attempt, known, f"timeout: not done within {request.timeout:g} s", trouble)
                return
            if request.stall_timeout and now - moved >= request.stall_timeout:
                await self._time_out(attempt, known, f"stall_timeout: no progress for {request.stall_timeout:g} s")
                return
            if request.stall_timeout and now - asked >= request.stall_timeout:
                raise JobFailed(
                    f"stall_timeout: the VM could not be asked for {request.stall_timeout:g} s ({trouble}); the job was"
                    " left as it is",
                    jobs=known,
                )

    async def _glance(self, process: Process | None, attempt: str) -> tuple[list[Copy], str]:
        """How the jobs do, or why that could not be seen this time (the monitor may be in use for a while)."""
        try:
            async with self._monitor() as monitor:
                vm, copies = await self._look(monitor)
        except MonitorGone as error:
            if process is None or not process.alive:
                raise self._lost(attempt, str(error)) from error
            return [], str(error)
        except MonitorError as error:
            return [], str(error)
        running = [copy for copy in copies if copy.found == CopyState.RUNNING]
        if running and vm.status == IO_ERROR and not any(_was_stopped(copy) for copy in running):
            await self._save_guest(attempt)
        if any(copy.state == "paused" for copy in running):
            raise _paused(vm, copies)
        return copies, ""

    async def _time_out(self, attempt: str, known: list[dict[str, Any]], reason: str, trouble: str = "") -> None:
        """End the wait: cancel and clean up, or leave the job, as on_timeout says. Returns if it just ended well."""
        if trouble:
            reason = f"{reason} ({trouble})"
        if self.request.on_timeout == "leave":
            raise JobFailed(f"{reason}; the job is left running, as on_timeout says", jobs=known)
        try:
            results = await self._cancel_attempt(attempt, reason)
        except MonitorError as error:
            raise JobFailed(
                f"{reason}; the job could not be cancelled, and was left as it is: {error}", jobs=known
            ) from error
        if not results or any(job["state"] != "completed" for job in results):
            raise JobFailed(f"{reason}; the job is cancelled, and what it left is removed", jobs=results)

    async def _save_guest(self, attempt: str) -> None:
        """The VM was stopped by an I/O error while our jobs ran. The backup goes; the guest goes on if that was us."""
        async with self._monitor() as monitor:
            vm, copies = await self._look(monitor)
        blamed = [copy.drive.target for copy in copies if _blamed(copy)]
        reason = "the guest was stopped by an I/O error while the backup ran"
        results = await self._cancel_attempt(attempt, reason)
        if blamed:
            raise JobFailed(
                f"VM {vm.name}: {reason}: No space left on device, or an error, at {', '.join(blamed)}. The backup is"
                " cancelled, and the guest goes on",
                jobs=results,
            )
        raise JobFailed(
            f"VM {vm.name}: {reason}. The backup is cancelled; its targets show no fault, and so the VM was left as it"
            " is: look at its own disks, then `cont`",
            jobs=results,
        )

    async def _cancel_attempt(self, attempt: str, reason: str) -> list[dict[str, Any]]:
        """Cancel and clean what belongs to C(attempt); returns what has become of it."""
        async with self._monitor() as monitor:
            process = monitor.process
        async with self._lock(process), self._monitor() as monitor:
            copies = (await self._look(monitor))[1]
            # What has ended well of another attempt waits for a call as well, and this is one.
            ours = [copy for copy in copies if copy.belongs_to(attempt) or copy.state == "completed"]
            whole = [copy for copy in ours if copy.state == "completed"]
            done = await self._finish(monitor, whole)
            done += await self._clean(monitor, [copy for copy in ours if copy not in whole])
        return _results(ours, done, reason)

    # Ending

    async def _publish(self, monitor: Monitor, copies: list[Copy]) -> list[dict[str, Any]]:
        """Finish the copies that have ended well, and tell of those that were done before."""
        finished = await self._finish(monitor, copies)
        return [copy.result() for copy in finished]

    async def _finish(self, monitor: Monitor, copies: list[Copy]) -> list[Copy]:
        """Make finished copies last. After a crash between any two steps the next call goes on from there."""
        open_ended = [copy for copy in copies if copy.found in (CopyState.ENDED, CopyState.COPIED)]
        self.changed = self.changed or bool(open_ended)
        if self.request.check_mode:
            return copies
        await block_jobs.remove_nodes(monitor, (copy.open_node for copy in open_ended if copy.open_node))
        try:
            # All of a group are safe before the first takes its name: no crash can then take one away from the others.
            safe = [self._flush(copy) for copy in copies]
            done = [_take_name(copy) for copy in safe]
        except OSError as error:
            raise JobFailed(
                f"the copy ended, but its image could not be made safe: {in_words(error)}; repeat the call when the"
                " cause is gone",
                jobs=[copy.result("failed" if copy in open_ended else "", in_words(error)) for copy in copies],
            ) from error
        if any(copy.job and _blamed(copy) for copy in copies) and not any(_was_stopped(copy) for copy in copies):
            await block_jobs.resume(monitor)
        await block_jobs.dismiss_jobs(monitor, [copy.job_id for copy in copies if copy.job])
        return done

    def _flush(self, copy: Copy) -> Copy:
        """Bring an ended copy onto stable storage, and its outcome with it: QEMU forgets that with the job."""
        if copy.found != CopyState.ENDED:
            return copy
        try:
            status = preallocate.flush(copy.drive.image_path, self._held.get(copy.drive.image_path))
        except OSError:
            # A second fsync may succeed where the first has failed, and mean nothing.
            with contextlib.suppress(OSError):
                _write_phase(copy, ReceiptPhase.CANCELLING)
            raise
        if copy.record is None:
            return replace(copy, found=CopyState.DONE)
        record = copy.record.copied(status, utc_now(), seconds_since(copy.record.started))
        receipt.update(receipt.record_path(copy.drive.receipt_path), record)
        return replace(copy, found=CopyState.COPIED, record=record)

    async def _clean(self, monitor: Monitor, copies: list[Copy]) -> list[Copy]:
        """Remove every trace of these copies: job, image, record, in this order. The guest comes before all files.

        Returns those that were finished instead: they ended well just now, and cleared their bitmaps.
        """
        if not copies:
            return []
        self.changed = True
        job_ids = [copy.job_id for copy in copies if copy.job or copy.found == CopyState.RUNNING]
        stubborn = await block_jobs.cancel_jobs(monitor, job_ids)
        if stubborn:
            raise JobFailed(
                "{}: job {} does not end after block-job-cancel: its target hangs. Bring the target back; the next call"
                " removes what is left".format(self.request.address, ", ".join(job.id for job in stubborn))
            )
        if any(_blamed(copy) for copy in copies) and not any(_was_stopped(copy) for copy in copies):
            await block_jobs.resume(monitor)
        await block_jobs.remove_nodes(monitor, (copy.open_node for copy in copies if copy.open_node))
        now = {job.id: job for job in await query_jobs(monitor)}
        ended = [
            replace(copy, found=CopyState.ENDED, job=now[copy.job_id], open_node="")
            for copy in copies
            if copy.found == CopyState.RUNNING and copy.job_id in now
        ]
        kept = [copy for copy in ended if not copy.failure and _irreplaceable(copy)]
        lost = [copy for copy in copies if copy.job_id not in {one.job_id for one in kept}]
        for copy in lost:
            # The mark only tells the next call what to think of a cancelled job: without it that one says a word more.
            with contextlib.suppress(OSError):
                _write_phase(copy, ReceiptPhase.CANCELLING)
        await block_jobs.dismiss_jobs(monitor, [copy.job_id for copy in lost if copy.job_id in job_ids])
        for copy in lost:
            _remove_files(copy)
        return await self._finish(monitor, kept)

    async def _give_up(self, monitor: Monitor, copies: list[Copy]) -> list[dict[str, Any]]:
        """state cancelled: running copies are stopped. One that has ended well is whole, and is finished instead."""
        going = [copy for copy in copies if copy.found in (CopyState.RUNNING, CopyState.DEAD) or copy.failure]
        for copy in going:
            preflight.refuse_lost_increment(copy, self.request.overwrite)
        done = await self._finish(monitor, [copy for copy in copies if copy not in going])
        self.changed = self.changed or bool(going)
        if not self.request.check_mode:
            done += await self._clean(monitor, going)
        return _results(copies, done)

    def _lost(self, attempt: str, reason: str) -> JobFailed:
        """QEMU has ended while this process waited: its jobs are gone, and what they left is no backup."""
        results = []
        for drive in self.request.drives:
            record = receipt.read(receipt.record_path(drive.receipt_path)) if drive.receipt_path else None
            if record and record.attempt == attempt and not record.whole:
                results.append(lost_result(drive, record, reason))
        return JobFailed(
            f"{reason}. QEMU has ended, and the backup with it; repeat the call when the VM is up: it removes what is"
            " left, and starts anew",
            jobs=results,
        )


def _with_node(copy: Copy, vm: Vm) -> Copy:
    node = block_jobs.target_nodes(copy.opaque)
    return replace(copy, open_node=node) if node in vm.target_nodes else copy


def _in_words(copy: Copy) -> str:
    if copy.failure == CANCELLED:
        return f"job {copy.job_id} was cancelled, and not by this collection ({CANCELLED})"
    return copy.failure or copy.reason


def _paused(vm: Vm, copies: list[Copy]) -> JobFailed:
    """A job that on_target_error or on_source_error has paused waits for a person: say so at once, and leave it."""
    advice = []
    for copy in copies:
        if copy.job and copy.job.stuck:
            full = copy.job.io_status == "nospace"
            remedy = "No space left on device: free some" if full else "after an I/O error: mend its cause"
            advice.append(f"{copy.who}: job {copy.job_id} is paused, {remedy}")
    return JobFailed(
        f"VM {vm.name}: {'; '.join(advice)}; then let it go on (block_job with state running), and repeat this call."
        " State cancelled gives it up",
        jobs=[copy.result() for copy in copies],
    )


def _results(copies: list[Copy], done: list[Copy], error: str = "") -> list[dict[str, Any]]:
    """What has become of copies that were given up, except for those that were done after all."""
    by_node = {copy.disk.node: copy for copy in done}
    return [
        by_node[copy.disk.node].result() if copy.disk.node in by_node else copy.result("cancelled", error)
        for copy in copies
    ]


def _irreplaceable(copy: Copy) -> bool:
    """Whether nothing else knows the changes that this image holds."""
    return copy.record is not None and copy.record.consumes_bitmap


def _was_stopped(copy: Copy) -> bool:
    """Whether the guest had been stopped before we began."""
    return copy.record is not None and copy.record.guest == IO_ERROR


def _blamed(copy: Copy) -> bool:
    """Whether this copy's target is why the guest's writes fail."""
    if copy.job and (copy.job.error or copy.job.io_status != "ok"):
        return True
    # One whose space is not reserved may have been full for a moment, of which nothing tells later.
    return copy.record is None or not copy.record.reserved


def _claim(drive: Drive, record: Record) -> None:
    """Take the target's name before anything stands there."""
    if drive.receipt_path:
        path = receipt.record_path(drive.receipt_path)
        try:
            receipt.create(path, record)
        except FileExistsError:
            raise BackupError(
                f"target: {drive.target}: another process began to make it this moment ({path})"
            ) from None


def _new_record(copy: Copy, vm: Vm, attempt: str, target: target_image.Target) -> Record:
    return receipt.Record(
        phase=ReceiptPhase.PREPARING,
        attempt=attempt,
        job=copy.job_id,
        vm=vm.name,
        identity=vm.identity,
        hypervisor=machine_id(),
        process=[vm.process.pid, vm.process.start] if vm.process else [],
        device=copy.disk.name,
        sync=copy.drive.sync,
        bitmap=copy.drive.bitmap,
        bitmap_mode=copy.drive.bitmap_mode,
        target=copy.drive.target,
        format=target.format,
        virtual_size=copy.disk.virtual_size,
        started=utc_now(),
        guest=vm.status,
        reserved=False,
        replaces=list(files.identity(copy.drive.target)),
        boot=boot_id(),
        monitor=vm.monitor,
        spaces=spaces(),
    )


def _write_phase(copy: Copy, phase: str) -> None:
    if copy.drive.receipt_path and copy.record:
        receipt.update(receipt.record_path(copy.drive.receipt_path), replace(copy.record, phase=phase))


def _take_name(copy: Copy) -> Copy:
    """Give a finished image its name, and turn its record into the receipt."""
    drive, record = copy.drive, copy.record
    if copy.found != CopyState.COPIED or record is None:
        return copy
    growing = not drive.existing and os.path.lexists(drive.image_path)
    path = drive.image_path if growing else drive.target
    if not record.matches(os.stat(path), files.is_block_device(path)):
        raise OSError(f"{path} is not the image that was finished: somebody moved or changed it")
    if growing:
        files.take_name(drive.image_path, drive.target, (record.replaces[0], record.replaces[1]))
    receipt.finish(receipt.record_path(drive.receipt_path), drive.receipt_path)
    return replace(copy, found=CopyState.DONE)


def _remove_files(copy: Copy) -> None:
    """Remove a growing image and its record."""
    drive, record = copy.drive, copy.record
    if not drive.existing:
        files.remove(drive.image_path)
    if not drive.receipt_path or record is None:
        return
    path = receipt.record_path(drive.receipt_path)
    if drive.existing and record.phase != ReceiptPhase.PREPARING:
        # The image was there before and stays. That it is not whole must be known: by this the next call may write it.
        preallocate.flush(drive.target)
        receipt.finish(path, drive.receipt_path)
    else:
        receipt.discard(path)

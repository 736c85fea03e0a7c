# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down that a VM has failed before its set was begun: status shows it until the VM has its next set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import BackupError, in_words
from .._common.formats import utc_now
from .._repository.documents import Failure
from .._repository.staging import remove_failure
from . import results
from .outcome import VmState

if TYPE_CHECKING:
    from .._qemu.model import Vm
    from .._repository.repository import Repository, VmRecords
    from .outcome import Outcome
    from .run import BackupRun
    from .session import VmSession, VmTask


async def refuse(session: VmSession, error: str) -> Outcome:
    """Report a VM that fails before its set is begun, and write that down."""
    await _record(session.run, session.task, error, session.seen.vm)
    return results.failed(session, error)


async def refuse_unseen(run: BackupRun, task: VmTask) -> Outcome:
    """Report a VM that the plan has refused, and at which nobody is to look again, and write that down."""
    error = task.planned.reason
    await _record(run, task, error, None)
    return results.outcome(run, task, VmState.FAILED, error=error)


async def _record(run: BackupRun, task: VmTask, error: str, vm: Vm | None) -> None:
    # A call that begins nothing tells what an earlier one has written.
    if run.settings.check_mode or not run.settings.begin or not run.repository.uuid:
        return
    try:
        # To take the lock would make the directory of a VM that is to have none.
        if not may_record(run, task, vm, await run.repository.records(task.name)):
            return
        async with run.repository.lock(task.name):
            records = await run.repository.records(task.name)
            if may_record(run, task, vm, records):
                now = utc_now()
                failure = Failure(run.plan.run, "", run.plan.id, VmState.FAILED, error, now, now)
                await run.repository.record_failure(task.name, failure)
                await run.repository.run(_remove_older, task.name, records, run.plan.id)
    except (BackupError, OSError) as trouble:
        # Why the VM has failed is told all the same.
        task.warn(f"the failure of this VM could not be recorded, so the status does not show it: {in_words(trouble)}")


def may_record(run: BackupRun, task: VmTask, vm: Vm | None, records: VmRecords) -> bool:
    """Tell whether the directory is this VM's, and holds nothing that tells more. C(vm) is None where none was seen."""
    failure = records.failure(run.plan.id)
    is_told = failure is not None and failure.run == run.plan.run
    if is_told or records.published(run.plan.id) or records.intents or records.barred:
        return False
    if vm:
        return not records.sets or records.sets[-1].vm.identity == vm.identity
    # A monitor that does not answer has given its VM no name: after its socket, another VM may be called.
    address, names = task.request.address, [planned.name for planned in run.plan.vms]
    is_named = bool(address.domain) or task.name != address.stem
    is_known = any(manifest.monitor == task.planned.monitor for manifest in records.sets)
    return names.count(task.name) == 1 and (is_named or is_known)


def _remove_older(repository: Repository, vm: str, records: VmRecords, set_id: str) -> None:
    """Remove what was written down in the same way before: a VM that is off for months is told of once."""
    for failure in records.failures:
        if not failure.attempt and failure.id != set_id:
            remove_failure(repository, vm, failure)

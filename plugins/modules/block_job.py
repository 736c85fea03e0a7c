#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: block_job
short_description: Control a block job of a running VM
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Brings a block job into a state. Does nothing if the job is already in that state.
  - Waits a moment for the job to reach the state, and fails if it does not.
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_monitor
  - vmfleet.backup.monitor
  - vmfleet.backup.libvirt
options:
  job_id:
    description: The job's id, as M(vmfleet.backup.block_job_info) and C(query-block-jobs) (C(device)) tell it.
    type: str
    required: true
  state:
    description:
      - V(cancelled) stops the job (C(block-job-cancel) with C(force)). Does nothing if the job has ended or is not
        listed.
      - V(paused) and V(running) pause the job and let it go on (C(job-pause), C(job-resume)), also after an error had
        paused it.
      - V(finalized) lets a pending job take effect.
      - V(dismissed) removes an ended job from QEMU's list, together with its result. A job of
        M(vmfleet.backup.drive_backup) is dismissed by that module.
    type: str
    choices: [cancelled, paused, running, finalized, dismissed]
  speed:
    description: A new limit of the job's rate in bytes per second, also as V(50M). V(0) is unlimited.
    type: bytes
seealso:
  - module: vmfleet.backup.block_job_info
  - module: vmfleet.backup.drive_backup
"""

EXAMPLES = r"""
- name: Go on with a backup that ran out of space, now that there is some
  vmfleet.backup.block_job:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    job_id: vmfleet.db.5f1d2c0b9a3e
    state: running

- name: Slow a backup down for the working hours
  vmfleet.backup.block_job:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    job_id: vmfleet.db.5f1d2c0b9a3e
    speed: 20M
"""

RETURN = r"""
msg:
  description: That there is no such job.
  returned: with O(state=cancelled) and O(state=dismissed), where there is none
  type: str
  sample: nightly is no job of this VM, and so there was nothing to do
job:
  description:
    - The job afterwards (in check mode, now), with the keys of RV(vmfleet.backup.block_job_info#module:jobs).
    - Empty where it is not listed.
  returned: success
  type: dict
  sample:
    id: nightly
    type: backup
    status: paused
    offset: 3145728
    len: 67108864
    speed: 1048576
    paused: true
    busy: false
    io_status: ok
    error: ""
    percent: 4.7
qmp:
  description: The QMP commands that were sent, in order, queries left out.
  returned: always
  type: list
  elements: dict
  sample:
    - execute: job-pause
      arguments:
        id: nightly
"""

import asyncio
import time
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import monitor_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, CommandError
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp

if TYPE_CHECKING:
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job

SETTLE_TIMEOUT = 10.0
"""Seconds that a job gets to reach the asked state."""

COMMANDS = {
    "cancelled": ("block-job-cancel", {"force": True}),
    "paused": ("job-pause", {}),
    "running": ("job-resume", {}),
    "finalized": ("job-finalize", {}),
    "dismissed": ("job-dismiss", {}),
}


def reached(job: Job | None, state: str | None) -> bool:
    """Whether the job is where it should be. Only what is gone can be cancelled or dismissed without being listed."""
    if state is None:
        return True
    if job is None:
        return state in ("cancelled", "dismissed")
    if state == "cancelled":
        return job.ended
    if state == "paused":
        return job.paused and not job.ended
    if state == "running":
        return not job.paused and not job.ended
    return state == "finalized" and job.ended


def command(job_id: str, state: str) -> tuple[str, dict[str, Any]]:
    """The QMP command that leads to C(state). The older commands name the job C(device), the general ones C(id)."""
    name, arguments = COMMANDS[state]
    return name, {("device" if name.startswith("block-job-") else "id"): job_id, **arguments}


async def find(monitor: Monitor, job_id: str) -> Job | None:
    return next((job for job in await query_jobs(monitor) if job.id == job_id), None)


async def settle(monitor: Monitor, job_id: str, state: str) -> Job | None:
    """Wait until the job is in C(state); raises BackupError where it does not get there."""
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while True:
        job = await find(monitor, job_id)
        if reached(job, state):
            return job
        # A job that was let go on can end before the first look at it.
        if state == "running" and job and job.ended and not job.error:
            return job
        if state == "running" and (job is None or job.ended):
            raise BackupError(f"job_id: {job_id} ended at once: {job.error if job else 'it is not listed any more'}")
        if time.monotonic() >= deadline:
            raise BackupError(
                "job_id: {} is {} and not {} after {:g} s".format(
                    job_id, job.status if job else "gone", state, SETTLE_TIMEOUT
                )
            )
        await asyncio.sleep(0.02)


async def apply(monitor: Monitor, module: AnsibleModule) -> dict[str, Any]:
    job_id, state, speed = (module.params[name] for name in ("job_id", "state", "speed"))
    before = job = await find(monitor, job_id)
    slower = speed is not None and (job is None or job.speed != speed)
    moving = not reached(job, state)
    if (job is None or job.ended) and (slower or (moving and state != "dismissed")):
        known = ", ".join(other.id for other in await query_jobs(monitor)) or "none"
        raise BackupError(
            "job_id: {} {}; the VM's jobs: {}".format(
                job_id, "is not a job of this VM" if job is None else "has ended", known
            )
        )
    if not module.check_mode:
        if slower:
            await monitor.execute("block-job-set-speed", {"device": job_id, "speed": speed})
        if moving:
            try:
                await monitor.execute(*command(job_id, state))
            except CommandError:
                # It may have got there by itself since we looked; else the refusal stands.
                if not reached(await find(monitor, job_id), state):
                    raise
            job = await settle(monitor, job_id, state)
        elif slower:
            job = await find(monitor, job_id)
    after = {"job": job_id, "state": state or "unchanged", "speed": "unchanged" if speed is None else speed}
    old = {"job": job_id, "state": before.status if before else "absent", "speed": before.speed if before else 0}
    changed = slower or moving
    said = "" if before or changed else f"{job_id} is no job of this VM, and so there was nothing to do"
    return {
        "changed": changed,
        **({"msg": said} if said else {}),
        "job": job.as_dict() if job else {},
        "diff": {"before": old if changed else after, "after": after},
    }


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    commands: list[dict[str, Any]] = []
    try:
        async with Monitor(
            parse_address(module.params["monitor"], libvirt_uri=module.params["libvirt_uri"]), commands
        ) as monitor:
            return {**await apply(monitor, module), "qmp": commands}
    except BackupError as error:
        error.details["qmp"] = commands
        raise


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **monitor_argument_spec(),
            "job_id": {"type": "str", "required": True},
            "state": {"type": "str", "choices": list(COMMANDS)},
            "speed": {"type": "bytes"},
        },
        required_one_of=[("state", "speed")],
        supports_check_mode=True,
    )
    require_qmp(module)
    run_module(module, main_task)


if __name__ == "__main__":
    main()

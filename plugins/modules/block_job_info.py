#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: block_job_info
short_description: List the block jobs of a running VM
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Lists a VM's block jobs with what the QMP commands C(query-block-jobs) and C(query-jobs) tell of them.
extends_documentation_fragment:
  - vmfleet.backup.attributes.info
  - vmfleet.backup.attributes.actiongroup_monitor
  - vmfleet.backup.monitor
  - vmfleet.backup.libvirt
options:
  type:
    description: List jobs of this type only, V(backup) for those of C(drive-backup).
    type: str
    choices: [backup, commit, create, mirror, stream]
  job_id:
    description: List the job with this id only.
    type: str
seealso:
  - module: vmfleet.backup.block_job
  - module: vmfleet.backup.drive_backup
"""

EXAMPLES = r"""
- name: See how far the backups of a VM are
  vmfleet.backup.block_job_info:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    type: backup
  register: backups

- name: Show it
  ansible.builtin.debug:
    msg: "{{ item.id }}: {{ item.percent }} % ({{ item.status }})"
  loop: "{{ backups.jobs }}"
"""

RETURN = r"""
jobs:
  description:
    - The jobs, in QEMU's order. A job that has been dismissed, or that QEMU has dismissed itself, is not listed.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: The job's id (C(device) in C(query-block-jobs)).
      type: str
    type:
      description: What kind of job it is.
      type: str
      sample: backup
    status:
      description: QEMU's word for its state, such as V(running), V(paused), V(concluded).
      type: str
    offset:
      description: Bytes that the job has worked through.
      type: int
    len:
      description: Bytes that the job has to work through.
      type: int
    percent:
      description: Progress.
      type: float
    speed:
      description: The limit in bytes per second, V(0) for none.
      type: int
    paused:
      description: Whether the job is paused, by a user, by an error, or for a moment by QEMU itself.
      type: bool
    busy:
      description: Whether the job is at work in this moment.
      type: bool
    io_status:
      description: V(ok), or why an error has paused it, V(nospace) or V(failed).
      type: str
    error:
      description: Why it failed, empty otherwise.
      type: str
  sample:
    - id: nightly
      type: backup
      status: running
      offset: 2097152
      len: 67108864
      speed: 1048576
      paused: false
      busy: false
      io_status: ok
      error: ""
      percent: 3.1
"""

from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import monitor_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import query_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp

if TYPE_CHECKING:
    from typing import Any


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    async with Monitor(parse_address(module.params["monitor"], libvirt_uri=module.params["libvirt_uri"])) as monitor:
        jobs = await query_jobs(monitor)
    wanted = [
        job.as_dict()
        for job in jobs
        if module.params["type"] in (None, job.type) and module.params["job_id"] in (None, job.id)
    ]
    return {"changed": False, "jobs": wanted}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **monitor_argument_spec(),
            "type": {"type": "str", "choices": ["backup", "commit", "create", "mirror", "stream"]},
            "job_id": {"type": "str"},
        },
        supports_check_mode=True,
    )
    require_qmp(module)
    run_module(module, main_task)


if __name__ == "__main__":
    main()

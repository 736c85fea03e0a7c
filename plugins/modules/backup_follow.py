#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_follow
short_description: Follow the worker that makes backup sets
version_added: 0.1.0
description:
  - A worker is the process on a hypervisor to which M(vmfleet.backup.backup_set) leaves the sets of a plan
    (O(vmfleet.backup.backup_set#module:detach)). This module reads the notes of the worker of a repository, and waits
    until it ends.
  - It reads a few files in V(/run/vmfleet-locks). It asks neither QEMU nor the repository, and needs no library.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
attributes:
  check_mode:
    description: Can run in C(check_mode), with the same result.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
  idempotent:
    description: Only reads. It can be run at any time, any number of times.
    support: full
options:
  repository:
    description: The directory of the repository, spelled as in the call that started the worker.
    type: path
    required: true
  worker:
    description:
      - The worker to follow, as RV(vmfleet.backup.backup_set#module:worker) says. Without it, the module reports the
        present worker, and does not wait.
    type: str
  wait:
    description: The longest time to wait for the end of the worker, in seconds.
    type: float
    default: 0
seealso:
  - module: vmfleet.backup.backup_set
"""

EXAMPLES = r"""
- name: See how far the backup is
  vmfleet.backup.backup_follow:
    repository: /srv/backup
  register: worker
"""

RETURN = r"""
running:
  description:
    - Whether the worker is at work. If V(false), and there is no RV(vms), the worker is unknown here, or was killed.
      If the worker has ended normally, all return values are those that M(vmfleet.backup.backup_set) returns for its
      sets.
  returned: unless the worker has ended normally
  type: bool
  sample: true
pid:
  description: The process id of the worker.
  returned: if RV(running=true)
  type: int
  sample: 4711
id:
  description: The id of its sets.
  returned: if RV(running=true)
  type: str
  sample: "2026-11-30"
since:
  description: When it began, in ISO 8601.
  returned: if RV(running=true)
  type: str
  sample: "2026-11-30T01:00:05Z"
vms:
  description: The VMs of its plan and how far they are, as RV(vmfleet.backup.backup_set#module:vms).
  returned: if RV(running=true)
  type: list
  elements: dict
  sample:
    - name: web01
      id: "2026-11-30"
      state: running
      level: incremental
      offset: 1048576
      len: 4194304
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_place import WorkerPlace, print_result
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, why
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import check_options


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "repository": {"type": "path", "required": True},
            "worker": {"type": "str"},
            "wait": {"type": "float", "default": 0},
        },
        supports_check_mode=True,
    )
    key = module.params["worker"]
    try:
        check_options(module.argument_spec, module.params)
        place = WorkerPlace.of(module.params["repository"])
        found = place.follow(key, module.params["wait"]) if key else place.look()
    except BackupError as error:
        module.fail_json(msg=str(error))
        raise
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'the files of the worker'}: {why(error)}")
        raise
    if key and found.result:
        print_result(found.result)
    # One that has only just begun has not said who it is.
    if not found.running or found.who is None:
        module.exit_json(running=False)
    else:
        who = found.who
        module.exit_json(running=True, pid=who.pid, id=who.id, since=who.since, vms=found.vms)


if __name__ == "__main__":
    main()

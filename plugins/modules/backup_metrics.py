#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_metrics
short_description: Write backup metrics for Prometheus
version_added: 0.1.0
description:
  - Combines the results of a run with the sets in the repository, such as the newest good set of a VM whose backup has
    failed today.
  - With O(directory), writes this as a file for the textfile collector of Prometheus' node_exporter. There is one file
    for each repository, C(vmfleet_backup_REPOSITORY_HASH.prom).
  - M(vmfleet.backup.backup_report) makes the page of a run from this result.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
attributes:
  idempotent:
    description: The file says when it was written.
    support: none
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  id:
    description: The id of the run's sets.
    type: str
    required: true
  results:
    description: What M(vmfleet.backup.backup_set) has returned as RV(vmfleet.backup.backup_set#module:vms).
    type: list
    elements: dict
    default: []
  identities:
    description:
      - By the names of VMs, their C(identity) in RV(vmfleet.backup.backup_plan#module:plan). Sets of another VM that
        has had the name of one of them do not count for it.
      - Of a VM that is not here, all sets of its name count.
    type: dict
    default: {}
  directory:
    description:
      - The directory of the files for node_exporter, as in its option C(--collector.textfile.directory). It must exist,
        and may belong to the user of node_exporter.
      - By default no file is written.
    type: path
seealso:
  - module: vmfleet.backup.backup_report
  - module: vmfleet.backup.backup_set
  - ref: ansible_collections.vmfleet.backup.docsite.guide_reports
    description: What each metric says, with rules for alerts.
"""

EXAMPLES = r"""
- name: Back up
  vmfleet.backup.backup_set:
    plan: "{{ planned.plan }}"
  register: done
  ignore_errors: true

- name: Let Prometheus know
  vmfleet.backup.backup_metrics:
    repository: /srv/backup
    id: "{{ planned.plan.id }}"
    results: "{{ done.vms }}"
    directory: /var/lib/prometheus/node-exporter
"""

RETURN = r"""
hypervisor:
  description: What M(vmfleet.backup.backup_report) takes.
  returned: always, also where a VM could not be read
  type: dict
  contains:
    repository:
      description: The directory of the repository.
      type: str
    id:
      description: The id of the run's sets.
      type: str
    written:
      description: When this was told (UTC).
      type: str
    error:
      description: What could not be read or written.
      type: str
    vms:
      description: >-
        The VMs, with C(name), C(state), C(changed), C(error), C(reason), C(warnings), C(consistency_reason),
        C(frozen_ms) and C(path) as M(vmfleet.backup.backup_set) has them. C(set) is the set of this id, C(last) the
        newest good one, each with C(id), C(started), C(duration), C(bytes), C(level), C(consistency), C(chain) (how
        many images it needs) and C(verified) (the depth, or empty); null where there is none. C(damage) is what is
        wrong with the newest set of all, C(verified_at) when a set was last found to be good.
      type: list
      elements: dict
  sample:
    repository: /srv/backup
    id: "2026-11-30"
    written: "2026-11-30T10:49:04Z"
    error: ""
    vms:
      - name: web01
        state: published
        changed: true
        error: ""
        reason: ""
        warnings: []
        consistency_reason: freezing the guest was not asked for when the set was made
        frozen_ms: 0
        path: /srv/backup/web01/2026-11-30
        set:
          id: "2026-11-30"
          started: "2026-11-30T10:48:42Z"
          duration: 9.058
          bytes: 67764224
          level: full
          consistency: crash
          chain: 1
          verified: ""
        last:
          id: "2026-11-30"
          started: "2026-11-30T10:48:42Z"
          duration: 9.058
          bytes: 67764224
          level: full
          consistency: crash
          chain: 1
          verified: ""
        damage: ""
        verified_at: ""
path:
  description: The file. Empty where none is written.
  returned: success
  type: str
  sample: /var/lib/node_exporter/vmfleet_backup_srv_backup_4f4dba3b.prom
"""

import contextlib
import os
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import parse_time, utc_now
from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable_lines
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.texts import read_text, write_text
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._report.prometheus import file_name, metrics, vms_in
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import (
    made_here,
    status_from_repository,
    status_from_result,
    status_of_absent,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import check_set_id, refuse_inside
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository

if TYPE_CHECKING:
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def add_sets(repository: Repository, set_id: str, vms: list[dict[str, Any]], identities: dict[str, Any]) -> list[str]:
    """Add to each VM what the repository says of it; return what cannot be read."""
    errors: list[str] = []
    for vm in vms:
        try:
            vm.update(status_from_repository(repository, vm["name"], set_id, str(identities.get(vm["name"], ""))))
        except (BackupError, OSError) as error:
            vm["damage"] = f"its sets cannot be read: {in_words(error)}"
            errors.append("VM {}: {}".format(vm["name"], vm["damage"]))
    return errors


def absent_vms(repository: Repository, names: list[str]) -> list[dict[str, Any]]:
    """Return those VMs of earlier runs whose newest set this hypervisor has made."""
    found = []
    for name in names:
        with contextlib.suppress(BackupError, OSError):
            if not made_here(repository, name):
                continue
        # One whose sets cannot be read stays in the metrics, as damaged.
        found.append(status_of_absent(name))
    return found


def metrics_path(directory: str, repository: str) -> str:
    """Return the path of the metrics of a repository."""
    refuse_inside("directory", directory)
    if not os.path.isdir(directory):
        raise Refused(
            "directory",
            f"{directory} is no directory; make it, and name it in --collector.textfile.directory of node_exporter",
        )
    return os.path.join(directory, file_name(repository))


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    location = os.path.normpath(params["repository"])
    now = utc_now()
    vms = [status_from_result(result) for result in params["results"]]
    record = {"repository": location, "id": check_set_id(params["id"]), "written": now, "error": "", "vms": vms}
    path = before = after = ""
    try:
        await probe_if_there(location)
        repository = open_repository(location)
        errors = add_sets(repository, params["id"], vms, params["identities"])
        if params["directory"]:
            path = metrics_path(params["directory"], location)
            before = read_text(path)
            in_run = {printable_lines(vm["name"]) for vm in vms}
            absent = absent_vms(repository, [name for name in vms_in(before) if name not in in_run])
            errors += add_sets(repository, params["id"], absent, {})
            after = metrics(location, [*vms, *absent], int(parse_time(now).timestamp()))
            if not module.check_mode:
                write_text(path, after)
        if errors:
            raise BackupError("; ".join(errors))
    except BackupError as error:
        # The report needs what the run itself says all the same.
        raise BackupError(str(error), hypervisor={**record, "error": str(error)}) from error
    except OSError as error:
        said = f"{error.filename or path}: {error.strerror}"
        raise BackupError(said, hypervisor={**record, "error": said}) from error
    diff = {"before_header": path, "after_header": path, "before": before, "after": after} if path else {}
    return {"changed": bool(path), "hypervisor": record, "path": path, "diff": diff}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "repository": {"type": "path", "required": True},
            "id": {"type": "str", "required": True},
            "results": {"type": "list", "elements": "dict", "default": []},
            "identities": {"type": "dict", "default": {}},
            "directory": {"type": "path"},
        },
        supports_check_mode=True,
    )
    run_in_worker(module, main_task, module.params["repository"])


if __name__ == "__main__":
    main()

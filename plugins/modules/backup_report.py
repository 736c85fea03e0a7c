#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_report
short_description: Write the report of a backup run
version_added: 0.1.0
description:
  - Writes C(ID.html), a page that loads no other file, and C(ID.json), the same as data. C(index.html) is the page of
    the newest run that is there, and C(_runs.html) the list of all runs.
  - The pages of the runs before and after this one are written again, so that each page leads to its neighbours.
  - A second run with the same id replaces the report of the first one, but keeps the results of hypervisors that have
    no new ones.
  - It is meant to be run once, on the controller, with what M(vmfleet.backup.backup_metrics) has returned on each
    hypervisor. The role P(vmfleet.backup.vm_backup#role) does it where C(vm_backup_report_dir) is set.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_backup
  - vmfleet.backup.trust_others
attributes:
  diff_mode:
    description: Shows the summary before and after.
    support: full
  idempotent:
    description: The report says when it was written.
    support: none
options:
  directory:
    description:
      - The directory of the reports. The module makes a missing directory with mode 0750, so its owner can write and
        its group can read. It does not change an existing one.
    type: path
    required: true
  id:
    description: The id of the run's sets.
    type: str
    required: true
  hypervisors:
    description:
      - By the name of each hypervisor of the run, what M(vmfleet.backup.backup_metrics) has returned as
        RV(vmfleet.backup.backup_metrics#module:hypervisor). Empty for a hypervisor without a result.
    type: dict
    required: true
  errors:
    description: By the name of each hypervisor without a result, the reason.
    type: dict
    default: {}
  pending:
    description:
      - The hypervisors that may still get a result, such as those of later batches (C(serial)). Any other one without
        a result counts as failed.
    type: list
    elements: str
    default: []
seealso:
  - module: vmfleet.backup.backup_metrics
  - ref: ansible_collections.vmfleet.backup.docsite.guide_reports
    description: What the page shows, and what the data holds.
"""

EXAMPLES = r"""
- name: Write the report of all hypervisors
  vmfleet.backup.backup_report:
    directory: /var/www/backup
    id: "2026-11-22"
    hypervisors: "{{ dict(ansible_play_hosts_all | zip(ansible_play_hosts_all | map('extract', hostvars)
      | map(attribute='told.hypervisor', default={}))) }}"
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
page:
  description: The page.
  returned: success
  type: str
  sample: /srv/reports/2026-11-30.html
data:
  description: The same as data.
  returned: success
  type: str
  sample: /srv/reports/2026-11-30.json
summary:
  description: >-
    C(hypervisors), C(hypervisors_failed) and C(hypervisors_waiting), C(vms), of them C(published), C(failed),
    C(cancelled) and C(skipped), C(new) sets, their C(bytes), the C(seconds) in which at least one copy ran, when the
    first of them was C(began), and how many are C(frozen) (consistent as far as file systems are), C(verified) and
    C(damaged).
  returned: success
  type: dict
  sample:
    hypervisors: 1
    hypervisors_failed: 0
    hypervisors_waiting: 0
    vms: 1
    published: 1
    failed: 0
    cancelled: 0
    skipped: 0
    new: 1
    bytes: 67764224
    seconds: 9.058
    began: "2026-11-30T10:48:42Z"
    frozen: 0
    verified: 0
    damaged: 0
"""

import fcntl
import glob
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import DocumentError, load
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import utc_now
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import WrongEntry
from ansible_collections.vmfleet.backup.plugins.module_utils._host.files import step
from ansible_collections.vmfleet.backup.plugins.module_utils._host.texts import check_directory, read_file, write_text
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html import page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_charts import BARS
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_runs import LIST, runs_page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.record import LARGEST_REPORT, parse_report
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run, collect
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import PLAIN, check_set_id, refuse_inside

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import Any


@contextmanager
def locked(directory: str, check_mode: bool, trust_others: bool) -> Iterator[None]:
    """Lock a directory: two runs may write into it, and each adds to what the other has written."""
    if os.path.isdir(directory):
        check_directory(directory, trust_others)
    if check_mode:
        yield
        return
    try:
        os.makedirs(directory, mode=0o750, exist_ok=True)
    except OSError as error:
        raise Refused("directory", f"{directory} cannot be made: {error.strerror}") from error
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with step(directory, "its lock was taken"):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def read_report(module: AnsibleModule, path: str) -> dict[str, Any] | None:
    """Return a report that is there; None, with a warning, for what is none."""
    try:
        found = dict(parse_report(load(read_file(path, LARGEST_REPORT))))
        if os.path.basename(path) != found["id"] + ".json":
            raise DocumentError("the name of the file is another id")
    except WrongEntry as error:
        module.warn(f"it is left out: {error}")
        return None
    except DocumentError as error:
        warn(module, f"{path} is left out: it is no report of this release: {error}")
        return None
    return found


def written(path: str) -> int:
    return os.stat(path).st_mtime_ns


def older_runs(directory: str, newest: Collection[str]) -> list[str]:
    """Return the ids of the runs that are not among the newest, by the names of their files: there may be thousands."""
    paths = glob.glob(os.path.join(glob.escape(directory), "*.json"))
    older = sorted((one for one in paths if one not in newest), key=written, reverse=True)
    ids = [os.path.basename(one)[: -len(".json")] for one in older if os.path.exists(one[: -len(".json")] + ".html")]
    return [one for one in ids if PLAIN.fullmatch(one)]


def other_runs(module: AnsibleModule, directory: str, path: str) -> dict[str, Run]:
    """Return the newest other runs, by the files of their reports."""
    paths = [one for one in glob.glob(os.path.join(glob.escape(directory), "*.json")) if one != path]
    newest = sorted(paths, key=written)[-BARS:]
    found = ((one, read_report(module, one)) for one in newest)
    return {one: Run.from_report(report) for one, report in found if report}


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    directory = params["directory"]
    refuse_inside("directory", directory)
    stem = os.path.join(directory, check_set_id(params["id"]))
    given = (params["hypervisors"], params["errors"], params["pending"])
    with locked(directory, module.check_mode, params["trust_others"]):
        earlier = read_report(module, stem + ".json") if os.path.exists(stem + ".json") else None
        report = collect(params["id"], utc_now(), *given, earlier)
        runs = other_runs(module, directory, stem + ".json")
        runs[stem + ".json"] = Run.from_report(report)
        ordered = sorted(runs, key=lambda path: (runs[path].began, path))
        if not module.check_mode:
            history = [runs[path] for path in ordered]
            write_text(stem + ".json", json.dumps(report, indent=1) + "\n")
            write_text(stem + ".html", page(report, history))
            place = ordered.index(stem + ".json")
            # They lead to this one now.
            for neighbour in ordered[max(place - 1, 0) : place] + ordered[place + 1 : place + 2]:
                found = read_report(module, neighbour)
                if found:
                    write_text(neighbour[: -len(".json")] + ".html", page(found, history))
            newest = report if ordered[-1] == stem + ".json" else read_report(module, ordered[-1])
            write_text(os.path.join(directory, "index.html"), page(newest or report, history))
            write_text(os.path.join(directory, LIST), runs_page(history, older_runs(directory, runs)))
    # A diff of the hypervisors could have thousands of lines.
    diff = {"before": earlier["summary"] if earlier else {}, "after": report["summary"]}
    return {
        "changed": True,
        "page": stem + ".html",
        "data": stem + ".json",
        "summary": report["summary"],
        "diff": diff,
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "id": {"type": "str", "required": True},
            "hypervisors": {"type": "dict", "required": True},
            "errors": {"type": "dict", "default": {}},
            "pending": {"type": "list", "elements": "str", "default": []},
            "trust_others": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_module(module, main_task)


if __name__ == "__main__":
    main()

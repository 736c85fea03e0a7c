#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_prune
short_description: Remove old backup sets
version_added: 0.1.0
description:
  - Removes the sets of each VM that no rule keeps. A set stays if one of the rules keeps it, and so do all sets that it
    builds on.
  - Keeps the newest good set of a VM, whatever the rules say, unless O(forget) is set.
  - Keeps sets that are protected, in use or broken.
  - Shows in check mode for every set whether it would be kept, and why.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.trust_others
  - vmfleet.backup.selection
requirements:
  - qemu-img on the machine, for O(consolidate)
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  keep_last:
    description: Keep this number of newest sets.
    type: int
    default: 0
  keep_hourly:
    description: Keep the newest set of each hour, for this number of hours that have one.
    type: int
    default: 0
  keep_daily:
    description: Keep the newest set of each day (UTC), for this number of days that have one.
    type: int
    default: 0
  keep_weekly:
    description: Keep the newest set of each week (ISO 8601), for this number of weeks that have one.
    type: int
    default: 0
  keep_monthly:
    description: Keep the newest set of each month, for this number of months that have one.
    type: int
    default: 0
  keep_yearly:
    description: Keep the newest set of each year, for this number of years that have one.
    type: int
    default: 0
  keep_within:
    description:
      - Keep all sets that were started in this time before the VM's newest set, as a number with V(h), V(d), V(w) or
        V(y), such as V(14d).
      - A set from more than a day in the future was made while the clock was wrong. It stays until that day, and no
        time is counted from it.
    type: str
  consolidate:
    description:
      - Make a full set from the oldest increment of a chain that is kept, if older sets can be removed after that.
        With this, a chain of increments never needs a new full backup.
      - Needs the space of one more full image of each disk at the same time.
    type: bool
    default: false
  protect:
    description:
      - Protect the sets with these ids, of all O(names), from removal.
      - Without any rule, the module does only this, and removes nothing.
    type: list
    elements: str
    default: []
  unprotect:
    description: Remove the protection of the sets with these ids. Without any rule, no set is removed.
    type: list
    elements: str
    default: []
  forget:
    description:
      - Also remove the newest good set of the VMs in O(names). Without any rule, this removes all their sets that are
        not protected or in use, also broken ones.
      - If a VM was forgotten before, there is nothing to do, and RV(text) says so.
    type: bool
    default: false
seealso:
  - module: vmfleet.backup.backup_set
  - module: vmfleet.backup.backup_info
  - ref: ansible_collections.vmfleet.backup.docsite.retention
    description: What the rules mean, what is never removed, and how much space is needed.
"""

EXAMPLES = r"""
- name: Keep two weeks in full, then one set a week, then one a month
  vmfleet.backup.backup_prune:
    repository: /srv/backup
    keep_within: 14d
    keep_weekly: 8
    keep_monthly: 12

- name: Increments for ever, of which the last 30 are kept
  vmfleet.backup.backup_prune:
    repository: /srv/backup
    keep_last: 30
    consolidate: true

- name: Keep the set from before the upgrade of web01
  vmfleet.backup.backup_prune:
    repository: /srv/backup
    names:
      - web01
    keep_last: 7
    protect:
      - before-upgrade

- name: Remove all sets of a VM that no longer exists
  vmfleet.backup.backup_prune:
    repository: /srv/backup
    names:
      - old01
    forget: true
"""

RETURN = r"""
removed:
  description: The sets that are gone, or would be in check mode, each with C(vm), C(id), C(reason) and C(bytes).
  returned: always
  type: list
  elements: dict
  sample:
    - vm: web01
      id: "2026-11-29"
      reason: no rule keeps it
      bytes: 589832
kept:
  description: The sets that are kept, each with C(vm), C(id), C(reason), C(bytes) and C(consolidated).
  returned: always
  type: list
  elements: dict
  sample:
    - vm: web01
      id: "2026-11-30"
      reason: last
      bytes: 67764224
      consolidated: false
bytes:
  description: The size of the images of the removed sets.
  returned: always
  type: int
  sample: 589832
headline:
  description: How many sets are gone, made full and kept, to be read by people.
  returned: always
  type: str
  sample: 3 sets (33.6 MiB) removed, 1 made full, 8 kept
text:
  description: The same, to be read by people.
  returned: always
  type: list
  elements: str
  sample:
    - keep         web01/2026-11-30  last
    - remove       web01/2026-11-29  no rule keeps it
"""

import glob
import re
import sys
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import counted
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import make_module
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import Selection, selection_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import (
    PruneOptions,
    check_protection,
    headline,
    prune,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import PERIODS, Rules, describe
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qemu_img import require_qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import check_writable
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.vm_names import unknown_vms, vm_names

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule

    from ansible_collections.vmfleet.backup.plugins.module_utils._prune.prune import Pruned
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
LONGEST = 1000 * SECONDS["y"]


def seconds(text: str) -> float:
    """Return C(14d) in seconds."""
    match = re.fullmatch("([1-9][0-9]{,5})([hdwy])", text)
    if not match or int(match.group(1)) * SECONDS[match.group(2)] > LONGEST:
        raise Refused("keep_within", f"{text!r} is not a number with h, d, w or y, such as 14d, of 1000 years at most")
    return int(match.group(1)) * SECONDS[match.group(2)]


def rules(params: dict[str, Any]) -> Rules:
    """Return what is to be kept; Refused where the options do not say it, or contradict each other."""
    counts = {name: params[f"keep_{name}"] for name in ("last", *PERIODS)}
    found = Rules(**counts, within=seconds(params["keep_within"]) if params["keep_within"] else 0)
    if params["forget"] and not params["names"]:
        raise Refused("forget", "names must say which VMs are to be forgotten")
    if params["forget"] and any(map(glob.has_magic, params["names"])):
        raise Refused("forget", "names has a pattern; write out the names of the VMs that are to be forgotten")
    both = sorted({*params["protect"]} & {*params["unprotect"]})
    if both:
        raise Refused("unprotect", "{} are to be protected as well".format(", ".join(both)))
    if found.empty and not params["forget"]:
        if params["protect"] or params["unprotect"]:
            return Rules(last=sys.maxsize)
        raise Refused("keep_last", "no rule says what to keep; give at least one of the keep_ options")
    return found


def chosen_vms(repository: Repository, params: dict[str, Any]) -> list[str]:
    """Return the VMs that are asked for. Of one that is to be forgotten there may be no more than its directory."""
    known = vm_names(repository)
    names = Selection.of(params).spelled_out(lambda: known)
    forgotten = [name for name in names if params["forget"] and repository.has(name)]
    unknown = [name for name in names if name not in known and name not in forgotten]
    if unknown:
        raise unknown_vms(unknown, known, repository.path)
    return names


async def prune_all(
    repository: Repository, names: Iterable[str], options: PruneOptions
) -> tuple[list[Pruned], dict[str, str]]:
    """Prune one VM after the other; one that fails does not stop the others. Return the results, and errors by VM."""
    done: list[Pruned] = []
    errors: dict[str, str] = {}
    for name in names:
        try:
            done.append(await prune(repository, name, options))
        except (BackupError, OSError) as error:
            errors[name] = in_words(error)
    errors.update({one.vm: one.error for one in done if one.error})
    return done, errors


def results(pruned: Iterable[Pruned], keep: bool) -> list[dict[str, Any]]:
    """Return the sets that are kept, or those that are not."""
    found = []
    for one in pruned:
        for decision in one.decisions:
            if decision.keep == keep:
                size = one.sizes[decision.id]
                entry = {"vm": one.vm, "id": decision.id, "reason": decision.reason, "bytes": size}
                found.append({**entry, "consolidated": decision.consolidate} if keep else entry)
    return found


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    options = PruneOptions(
        rules(params),
        params["consolidate"],
        params["forget"],
        tuple(params["protect"]),
        tuple(params["unprotect"]),
        module.check_mode,
    )
    if options.consolidate:
        require_qemu_img()
    await probe_if_there(params["repository"], writing=not module.check_mode)
    repository = open_repository(params["repository"], params["trust_others"])
    check_writable(repository)
    names = chosen_vms(repository, params)
    if options.protect or options.unprotect:
        # Before the sets of any VM are touched.
        for name in names:
            check_protection(read_catalog(repository, name), options)
    done, errors = await prune_all(repository, names, options)
    removed = results(done, keep=False)
    kept = results(done, keep=True)
    before = "".join("{vm}/{id}\n".format(**one) for one in (*removed, *kept))
    after = "".join("{vm}/{id}\n".format(**one) for one in kept)
    result = {
        "changed": any(one.changed for one in done),
        "removed": removed,
        "kept": kept,
        "bytes": sum(one["bytes"] for one in removed),
        "headline": headline(done, module.check_mode),
        "text": [line for one in done for line in describe(one.vm, one.decisions)]
        + [f"keep         {one.vm}: it has no sets" for one in done if not one.decisions],
        "diff": {"before": before, "after": after},
    }
    if errors:
        reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise BackupError(f"{counted(len(errors), 'VM')} could not be pruned as asked: {reasons}", **result)
    return result


def main() -> None:
    counts = {f"keep_{name}": {"type": "int", "default": 0} for name in ("last", *PERIODS)}
    names = {"type": "list", "elements": "str"}
    module = make_module(
        argument_spec={
            "repository": {"type": "path", "required": True},
            **selection_argument_spec(),
            **counts,
            "keep_within": {"type": "str"},
            "consolidate": {"type": "bool", "default": False},
            "protect": {**names, "default": []},
            "unprotect": {**names, "default": []},
            "forget": {"type": "bool", "default": False},
            "trust_others": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    run_in_worker(module, main_task, module.params["repository"], writing=not module.check_mode)


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_info
short_description: List the backup sets in a repository
version_added: 0.1.0
description:
  - Lists the sets of each VM, newest first, with the sets that they build on, whether they are complete, and the result
    of their last verification.
  - Reads only manifests and the sizes of files. M(vmfleet.backup.backup_verify) checks the content of the images.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.selection
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
    description: The directory of the repository.
    type: path
    required: true
seealso:
  - module: vmfleet.backup.backup_verify
  - module: vmfleet.backup.backup_prune
"""

EXAMPLES = r"""
- name: List what there is
  vmfleet.backup.backup_info:
    repository: /srv/backup
  register: found

- name: Show the age of the newest set of each VM, in hours
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ (item.age / 3600) | round(1) }}"
  loop: "{{ found.vms }}"
  loop_control:
    label: "{{ item.name }}"

- name: Name the repository once for all modules that have the option
  module_defaults:
    group/vmfleet.backup.repository:
      repository: /srv/backup
  block:
    - name: Look whether the newest sets are good
      vmfleet.backup.backup_verify:

    - name: List what there is
      vmfleet.backup.backup_info:
"""

RETURN = r"""
sets:
  description: The sets, by VM, newest first.
  returned: always, also where a VM could not be read
  type: list
  elements: dict
  contains:
    vm:
      description: What the VM is called in the repository.
      type: str
    id:
      description: The id of the set.
      type: str
    sequence:
      description: The number of the set. A later set has a higher number. Clocks do not matter.
      type: int
    level:
      description: V(full), V(incremental) or V(differential).
      type: str
    created:
      description: When it was begun (UTC).
      type: str
    bytes:
      description: The size of its images.
      type: int
    consistency:
      description: V(crash) or V(filesystem).
      type: str
    disks:
      description: The sizes of its images, by the names of the disks.
      type: dict
    decrypted:
      description: >-
        The disks that are encrypted on the hypervisor, and not in this set. The list is empty in sets of
        releases that did not check this.
      type: list
      elements: str
    parents:
      description: The ids of the sets that it builds on directly. Empty where all its images are full ones.
      type: list
      elements: str
    chain:
      description: How many images the longest chain of its disks has.
      type: int
    broken:
      description: Why it cannot be restored whole. Empty where nothing is missing.
      type: str
    verified:
      description: >-
        How the last verification ended, with C(depth), C(when), C(ok) and C(errors). Empty where there was none.
      type: dict
    protected:
      description: Whether it is protected from being removed.
      type: bool
    used_by:
      description: The overlays that read it, as C(PATH on HOST).
      type: list
      elements: str
  sample:
    - vm: web01
      id: "2026-11-29"
      sequence: 2
      level: incremental
      created: "2026-11-30T10:48:07Z"
      bytes: 589832
      consistency: crash
      disks:
        vda: 393216
        vdb: 196616
      decrypted: []
      parents:
        - "2026-11-28"
      chain: 2
      broken: ""
      verified: {}
      protected: false
      used_by: []
vms:
  description: >-
    The VMs, each with C(name), C(sets) (how many), C(bytes), C(newest) (the id of the newest set), C(created), C(age)
    of that set in seconds, C(uuid) (of the VM that it is of, empty where it has none), C(level), C(verified) (its
    depth, or empty) and C(ok) (whether the newest set is whole, and neither it nor one that it builds on has failed a
    verification). If a set was made while the clock was ahead by more than a day, its age is the time by which it is
    ahead.
  returned: always, also where a VM could not be read
  type: list
  elements: dict
  sample:
    - name: web01
      sets: 3
      bytes: 136118280
      newest: "2026-11-30"
      created: "2026-11-30T10:48:42Z"
      age: 20
      uuid: ef50a7a0-fdc5-4186-b939-cf63ad10902d
      level: full
      verified: ""
      ok: true
leftovers:
  description: Other files in the repository, each with C(vm), C(path) and C(what).
  returned: always, also where a VM could not be read
  type: list
  elements: dict
  sample:
    - vm: web01
      path: /srv/backup/web01/README
      what: "no set: no valid manifest"
totals:
  description: C(vms), C(sets), C(bytes), C(broken) sets and C(leftovers).
  returned: always, also where a VM could not be read
  type: dict
  sample:
    vms: 1
    sets: 3
    bytes: 136118280
    broken: 0
    leftovers: 1
unknown:
  description: Those of O(names) that stand for no VM of the repository. If there are any, the module fails.
  returned: always, also where a VM could not be read
  type: list
  elements: str
  sample:
    - wbe02
"""

import gc
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import age_of
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import Selection, selection_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import (
    leftovers,
    read_catalog,
    start_time,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.vm_names import unknown_vms, vm_names

if TYPE_CHECKING:
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Verification
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import VmCatalog
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest


def chain_lengths(catalog: VmCatalog) -> dict[str, int]:
    """Return how many images a disk of each set is made of. Where its disks differ, the most."""
    longest: dict[str, int] = {}
    lengths: dict[tuple[str, str], int] = {}
    for manifest in catalog.records.sets:
        most = 0
        for disk in manifest.disks:
            below = lengths.get((disk.parent.id, disk.name_in_parent), 0) if disk.parent else 0
            lengths[(manifest.id, disk.name)] = below + 1
            most = max(most, below + 1)
        longest[manifest.id] = most
    return longest


def describe_set(catalog: VmCatalog, manifest: Manifest, chain: int, broken: str) -> dict[str, Any]:
    """Return what is said of a set."""
    # Ansible walks through every value twice, which takes longer than to read the manifests: what few need, such as why
    # an image is a full one, stays in the manifests.
    return {
        "vm": catalog.name,
        "id": manifest.id,
        "sequence": manifest.sequence,
        "level": manifest.level,
        "created": manifest.started,
        "bytes": manifest.bytes,
        "consistency": manifest.consistency,
        "disks": {disk.name: disk.bytes for disk in manifest.disks},
        "decrypted": [disk.name for disk in manifest.disks if disk.source_encrypted],
        "parents": sorted({disk.parent.id for disk in manifest.disks if disk.parent}),
        "chain": chain,
        "broken": broken,
        "verified": describe_verification(catalog.annotations.verification(manifest)),
        "protected": catalog.annotations.protected(manifest.id),
        "used_by": [f"{pin.path} on {pin.host}" for pin in catalog.annotations.pins_of(manifest.id)],
    }


def describe_verification(found: Verification | None) -> dict[str, Any]:
    """Return what is said of the last verification of a set; nothing where there was none."""
    if found is None:
        return {}
    return {"depth": found.depth, "when": found.when, "ok": found.ok, "errors": list(found.errors)}


def describe_vm(sets: list[dict[str, Any]], catalog: VmCatalog, now: datetime) -> dict[str, Any]:
    """Return what is said of a VM. C(sets) are its own, newest first, and at least one."""
    newest = sets[0]
    verified = newest["verified"]
    return {
        "name": catalog.name,
        "sets": len(sets),
        "bytes": sum(one["bytes"] for one in sets),
        "newest": newest["id"],
        "created": newest["created"],
        "age": age_of(start_time(catalog.records.sets[-1]), now),
        "uuid": catalog.records.sets[-1].vm.uuid,
        "level": newest["level"],
        "verified": verified["depth"] if verified and verified["ok"] else "",
        "ok": not newest["broken"] and newest["id"] not in catalog.failed_sets,
    }


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    # A search for garbage among all that is read would take longer than reading it.
    gc.disable()
    await probe_if_there(module.params["repository"])
    repository = open_repository(module.params["repository"])
    now = datetime.now(timezone.utc)
    sets: list[dict[str, Any]] = []
    vms: list[dict[str, Any]] = []
    left: list[dict[str, str]] = []
    errors: list[str] = []
    selection = Selection.of(module.params)
    names = selection.spelled_out(lambda: vm_names(repository))
    unknown = [name for name in names if not repository.has(name)] if selection.names else []
    for name in names:
        try:
            catalog = read_catalog(repository, name)
            left += leftovers(repository, catalog)
        except (BackupError, OSError) as error:
            errors.append(f"VM {name}: {in_words(error)}")
            continue
        if not catalog.records.sets:
            errors += [f"VM {name}: {reason}" for reason in catalog.odd.values()]
        chains, broken = chain_lengths(catalog), catalog.broken_sets
        own = [
            describe_set(catalog, manifest, chains[manifest.id], broken.get(manifest.id, ""))
            for manifest in reversed(catalog.records.sets)
        ]
        sets += own
        vms += [describe_vm(own, catalog, now)] if own else []
    totals = {
        "vms": len(vms),
        "sets": len(sets),
        "bytes": sum(one["bytes"] for one in sets),
        "broken": sum(bool(one["broken"]) for one in sets),
        "leftovers": len(left),
    }
    result: dict[str, Any] = {"changed": False, "sets": sets, "vms": vms, "leftovers": left, "totals": totals}
    result["unknown"] = unknown
    if errors:
        raise BackupError("; ".join(errors), **result)
    if unknown:
        raise unknown_vms(unknown, vm_names(repository), repository.path, **result)
    return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "repository": {"type": "path", "required": True},
            **selection_argument_spec(),
        },
        supports_check_mode=True,
    )
    run_in_worker(module, main_task, module.params["repository"])


if __name__ == "__main__":
    main()

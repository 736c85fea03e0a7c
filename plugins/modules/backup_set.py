#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_set
short_description: Make or cancel backup sets
version_added: 0.1.0
description:
  - Makes a set in the repository for every VM of a plan. A set has the images of all chosen disks at one point in time,
    with one manifest.
  - Does not change a set that exists. Continues a set that another process has started, and completes or removes what a
    killed process has left. To repeat a run that went wrong, run it again with the same id.
  - Makes every decision of the plan again, with locks held. A decision can only become safer. A disk may be copied in
    full instead of incrementally, and RV(vms[].disks[].reason) says why.
  - A VM that fails never stops the others. The module fails after it has finished the others, with all results.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.action
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.orders
  - vmfleet.backup.trust_others
requirements:
  - qemu.qmp >= 0.0.4 (Python library) on the hypervisor
  - qemu-img on the hypervisor
options:
  plan:
    description:
      - What M(vmfleet.backup.backup_plan) has returned as RV(vmfleet.backup.backup_plan#module:plan).
    type: dict
  repository:
    description: The directory of the repository, for O(state=cancelled) and O(state=untracked) without a plan.
    type: path
  names:
    description:
      - The VMs for O(state=cancelled) or O(state=untracked), by their names in the repository or by patterns such as
        V(web*).
      - The default for V(cancelled) is all VMs whose sets this hypervisor is making. With V(untracked) they must be
        named.
    type: list
    elements: str
  exclude_names:
    description:
      - The VMs that O(state=cancelled) or O(state=untracked) leaves out, or patterns of their names.
    type: list
    elements: str
  state:
    description:
      - V(completed) returns when every set is published or has failed.
      - V(started) returns when the jobs are running, O(max_vms) VMs at a time. It publishes sets that are complete by
        then. A later call with V(completed), from any process, continues.
      - V(cancelled) stops the sets that are being made, and removes what exists of them. The run that made
        them, and a worker that follows them, count them as cancelled and do not start them again. The next run does.
      - V(untracked) removes all bitmaps of the repository from the VMs. The sets stay, and the next ones are full. Use
        it for VMs that you do not back up here any more, and before you load an internal snapshot, which QEMU refuses
        while a disk has bitmaps.
    type: str
    choices: [completed, started, cancelled, untracked]
    default: completed
  max_vms:
    description: How many VMs are copied at the same time. V(0) sets no limit.
    type: int
    default: 4
  bandwidth:
    description:
      - The limit for all copies of this call together, in bytes per second, or with a unit as in V(200M). V(0) sets no
        limit.
      - The running jobs share it equally, also those that an earlier call has started. No job gets more than
        O(vmfleet.backup.backup_plan#module:speed). Holes count like data, as they do there.
      - With O(state=started), copies keep their share when the call ends.
    type: bytes
    default: "0"
  slice:
    description:
      - Seconds after which O(state=completed) returns even if sets are unfinished. RV(vms[].state) is V(running) or
        V(queued) for those, and the same call continues them. V(0) waits for the end.
      - A playbook shows the progress without this option. Use it only to wait in several calls yourself.
      - With O(detach), O(state=started) waits so long for the end of the worker.
      - A call can take longer, for example during the checksum of an image.
    type: float
    default: 0
  progress:
    description:
      - What to show while O(state=completed) waits.
      - On a terminal, V(auto) shows bars and the time that is left. Elsewhere it means V(quiet), which shows one line a
        minute for each hypervisor that is followed. V(none) shows nothing.
      - With several hypervisors, a line that begins with C(fleet:) has their total.
      - With C(async), in check mode and with O(slice), nothing is shown.
    type: str
    choices: [auto, quiet, none]
    default: auto
  timeout:
    description:
      - Cancel a set that this call has started and that is not finished after this time, and count it as failed. The
        time is in seconds or with V(s), V(m), V(h) or V(d), such as V(90m). V(0) sets no limit.
    type: str
    default: "0"
  offline_timeout:
    description:
      - The longest time for which the copy of its disks may keep a VM that is off from starting, written as in
        O(timeout). After that time the set is cancelled, and counts as failed. V(0) sets no limit.
      - This limit also works if no process waits for the copy any more.
    type: str
    default: 4h
  stall_timeout:
    description:
      - Cancel a set that makes no progress for this time, and count it as failed. The time is written as in O(timeout).
        V(0) sets no limit.
    type: str
    default: "600"
  detach:
    description:
      - With O(state=started), leave the sets to a worker, which is a process on the hypervisor. It does what
        O(state=completed) does, whether a later call waits for it or not. VMs that are still V(queued) have their
        turns, and copies that have ended are published.
      - There is one worker for each repository and hypervisor at a time. O(state=cancelled) for all VMs ends it.
      - If there is a worker that makes the same sets in the same way, the call returns how far it is. If it makes
        other sets, a call with V(preferred) starts the copies itself, and a call with V(required) fails.
      - The call returns when the worker has looked at each VM. With O(slice), it waits for the end of the worker for
        so long, but not longer.
      - Where systemd is the init and the user is root, the worker has a unit of its own,
        C(vmfleet-backup-<worker>.scope), so that it does not end with the login session, or with the unit from which
        Ansible was started. Elsewhere it is a session of its own only.
      - With O(state=completed), a playbook leaves the sets to a worker and follows it with few resources. A worker that
        dies is replaced. With C(async), in check mode and with O(slice), the call makes the sets itself.
    type: str
    choices: [never, preferred, required]
    default: never
  nice:
    description:
      - The CPU priority of the worker with O(detach), as C(nice) takes it. V(0) changes nothing, V(19) is the lowest
        priority.
      - It concerns checksums, C(qemu-img) and the copies of VMs that are off. The copies of running VMs are made by
        their own QEMU.
    type: int
    default: 0
  ionice:
    description:
      - The I/O priority of the worker with O(detach). With V(best-effort), it is the last among the processes that the
        disks serve in turn. With V(idle), the disks serve it after all others. V(none) changes nothing.
      - It concerns what the worker reads and brings to stable storage itself, such as checksums, and the copies of VMs
        that are off. The copies of running VMs are made by their own QEMU. What other processes have written is
        brought to the disks by the kernel.
      - The I/O scheduler of the disk decides what it means. C(none) takes no notice of it.
    type: str
    choices: [none, best-effort, idle]
    default: none
  cpu_weight:
    description:
      - The share of the CPU that the worker with O(detach) gets while there is not enough for all, from V(1) to
        V(10000). It is the C(CPUWeight) of its unit, which is placed beside C(system.slice), C(user.slice) and
        C(machine.slice). Each of these has C(100).
      - It concerns the same work as O(nice).
      - Where the worker has no unit of its own, there is a warning, and the share stays as it is.
    type: int
  worker:
    description:
      - The RV(worker) that an earlier call has returned. A playbook with O(state=completed) and O(detach) follows that
        worker first.
    type: str
  begin:
    description:
      - Start sets that do not exist and that no process makes. With V(false), O(state=started) and O(state=completed)
        only continue sets that an earlier call has started, and RV(vms[].state) is V(skipped) for the other VMs that
        have no set. O(takeover) and O(supersede) remove nothing then.
    type: bool
    default: true
  unattended:
    description:
      - With O(state=started), start copies even if no space can be reserved for them in the repository.
      - If the file system becomes full while no process watches such a copy, writes of the guest fail.
    type: bool
    default: false
seealso:
  - module: vmfleet.backup.backup_plan
  - ref: ansible_collections.vmfleet.backup.docsite.how_it_works
    description: The way of a backup, what stands in the repository, and what happens when something fails.
  - ref: ansible_collections.vmfleet.backup.docsite.incremental_backups
    description: When a disk is copied in full.
  - ref: ansible_collections.vmfleet.backup.docsite.guide_progress
    description: What is shown during the copies, and what to do after an interruption.
"""

EXAMPLES = r"""
- name: Plan the backup
  vmfleet.backup.backup_plan:
    repository: /srv/backup
    sockets:
      - /run/vmfleet-monitors/*.qmp
  register: planned

- name: Back up
  vmfleet.backup.backup_set:
    plan: "{{ planned.plan }}"
    max_vms: 2

- name: Stop the set of web01 that is being made
  vmfleet.backup.backup_set:
    repository: /srv/backup
    names:
      - web01
    state: cancelled

- name: Remove the change records of web01, which is to be reverted to an internal snapshot
  vmfleet.backup.backup_set:
    repository: /srv/backup
    names:
      - web01
    state: untracked
"""

RETURN = r"""
vms:
  description: Every VM of the plan, also when the module fails.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: What the VM is called in the repository.
      type: str
    id:
      description: The id of the set.
      type: str
    state:
      description: V(published), V(running), V(queued), V(failed), V(cancelled), V(skipped) or V(untracked).
      type: str
    level:
      description: >-
        The level of the set, V(full) if all its images are, else V(incremental) or V(differential). Empty where there
        is no set.
      type: str
    bytes:
      description: The size of the set's images.
      type: int
    duration:
      description: Seconds from the start of the jobs to the end of the set.
      type: float
    consistency:
      description: >-
        V(filesystem) if the guest's file systems were frozen at the moment of the set, V(crash) if not. Empty where
        there is no set.
      type: str
    consistency_reason:
      description: Why the file systems were not frozen.
      type: str
    frozen_ms:
      description: Milliseconds for which the guest's file systems were frozen.
      type: int
    path:
      description: The directory of the set.
      type: str
    error:
      description: Why there is no set.
      type: str
    reason:
      description: Why the VM is in this state, where that is no error.
      type: str
    warnings:
      description: Differences from the plan or the request, such as a full image instead of an increment.
      type: list
      elements: str
    disks:
      description: The disks of the set.
      type: list
      elements: dict
      contains:
        name:
          description: The disk's name.
          type: str
        level:
          description: V(full), V(incremental) or V(differential).
          type: str
        reason:
          description: Why it has this level.
          type: str
        parent:
          description: The set that its image builds on, null for a full one.
          type: str
        bytes:
          description: The size of its image.
          type: int
    changed:
      description: Whether this call did something about this VM.
      type: bool
    offset:
      description: How many bytes its jobs have copied. Only of a VM that is V(running).
      type: int
    len:
      description: How many bytes its jobs have to copy. Only of a VM that is V(running).
      type: int
  sample:
    - name: web01
      id: "2026-11-29"
      state: published
      level: incremental
      bytes: 589832
      duration: 10.366
      consistency: crash
      consistency_reason: freezing the guest was not asked for when the set was made
      frozen_ms: 0
      path: /srv/backup/web01/2026-11-29
      error: ""
      reason: ""
      warnings: []
      disks:
        - name: vda
          level: incremental
          reason: changes since set 2026-11-28
          parent: "2026-11-28"
          bytes: 393216
        - name: vdb
          level: incremental
          reason: changes since set 2026-11-28
          parent: "2026-11-28"
          bytes: 196616
      changed: true
      offset: 0
      len: 0
summary:
  description: How many VMs are in each state, how many changed, and the bytes written.
  returned: always
  type: dict
  sample:
    published: 1
    running: 0
    queued: 0
    failed: 0
    cancelled: 0
    skipped: 0
    untracked: 0
    changed: 1
    bytes: 589832
worker:
  description:
    - The worker that makes the sets, as a value for O(worker). Missing if the worker has ended, or if the repository
      has a worker for other sets.
  returned: with O(detach=preferred) and O(detach=required), while the worker is at work
  type: str
  sample: 4f1e7c2a90d35b68
headline:
  description: >-
    The result of all VMs, to be read by people. A second line says how many of the sets are of which
    level, and how many are consistent in which way.
  returned: always
  type: str
  sample: |-
    3 of 4 VMs have their set, 1 failed, 0 skipped, 33.6 MiB written
    1 full, 2 incremental, 3 crash consistent
text:
  description: The results, to be read by people.
  returned: always
  type: list
  elements: str
  sample:
    - published  web01  incremental, crash consistent, 576.0 KiB in 10.4 s, /srv/backup/web01/2026-11-29
qmp:
  description:
    - The commands that were sent to QEMU, queries left out.
    - Where QEMU refuses C(drive-backup), that attempt is among them, and the C(blockdev-backup) in its place.
  returned: always
  type: list
  elements: dict
  sample:
    - execute: job-dismiss
      arguments:
        id: vmfleet.12794a23.49a1c2c3fed6.1
"""

from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.cancel import plan_of_names
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.engine import reconcile
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import (
    STOPPING,
    UNFINISHED,
    diff,
    failure,
    told,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun, Settings
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import make_module
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import duration
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import Selection, selection_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch, probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls, run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import parse_plan
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qemu_img import require_qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import (
    AsyncRepository,
    create_repository,
    find_repository,
    remove_half_made,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository

if TYPE_CHECKING:
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule

    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.board import Board
    from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Plan
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


async def places(module: AnsibleModule, plan: Plan | None, calls: ThreadedCalls) -> tuple[Repository, Plan, bool]:
    """The repository, the plan, and whether the repository had to be made."""
    path, trust_others = calls.watch.path, module.params["trust_others"]
    await probe_if_there(path, writing=True)
    if plan is None:
        repository = await calls.run(open_repository, path, trust_others)
        return repository, await calls.run(plan_of_names, repository, Selection.of(module.params)), False
    repository = await calls.run(find_repository, path, plan.create_repository, trust_others)
    if module.params["state"] in STOPPING:
        return repository, plan, False
    if module.check_mode:
        return repository, plan, not repository.uuid
    if not repository.uuid and not module.params["begin"]:
        return repository, plan, False
    if repository.uuid:
        await calls.run(remove_half_made, path)
        return repository, plan, False
    return await calls.run(create_repository, path, trust_others), plan, True


def check_options(params: dict[str, Any]) -> None:
    """Refuse options that contradict each other."""
    chosen = [option for option in ("names", "exclude_names") if params[option]]
    if chosen and params["plan"]:
        raise Refused(
            chosen[0], "the plan already has the names of the VMs; use this option with repository instead of plan"
        )
    if params["slice"] and params["state"] != "completed" and params["detach"] == "never":
        raise Refused("slice", "a call can only wait with state: completed, or with detach")
    if params["detach"] != "never" and params["state"] in STOPPING:
        raise Refused("detach", "a worker can only make sets, and this state makes none; leave the option out")


async def main_task(module: AnsibleModule, board: Board | None = None) -> dict[str, Any]:
    check_options(module.params)
    require_qemu_img()
    names = (
        "state",
        "max_vms",
        "bandwidth",
        "slice",
        "begin",
        "unattended",
        "takeover",
        "supersede",
        "adopt",
    )
    settings = Settings(
        check_mode=module.check_mode,
        timeout=duration("timeout", module.params["timeout"]),
        offline_timeout=duration("offline_timeout", module.params["offline_timeout"]),
        stall_timeout=duration("stall_timeout", module.params["stall_timeout"]),
        **{name: module.params[name] for name in names},
    )
    given = None if module.params["plan"] is None else parse_plan(module.params["plan"])
    path = given.repository if given else module.params["repository"]
    async with ThreadedCalls(Watch(path, writing=not module.check_mode)) as calls:
        if module.params["state"] == "cancelled" and not module.check_mode:
            from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker_end import (  # noqa: PLC0415
                make_way,
            )

            await make_way(module.params, given, calls)
        repository, plan, created = await places(module, given, calls)
        if board:
            board.open(repository.uuid)
        run = BackupRun.of(AsyncRepository(repository, calls), plan, settings, board)
        outcomes = await reconcile(run)
    for outcome in outcomes:
        for warning in outcome.warnings:
            warn(module, f"{outcome.name}: {warning}")
    result = {
        "changed": created or any(outcome.changed for outcome in outcomes),
        **told(outcomes, settings.state, module.check_mode),
        "qmp": run.commands,
        "diff": diff(outcomes),
    }
    error = failure(outcomes, plan.id, settings.state)
    # While others are being made, there is more to come.
    if error and not (settings.slice and any(outcome.state in UNFINISHED for outcome in outcomes)):
        raise BackupError(error, **result)
    return result


def main() -> None:
    module = make_module(
        argument_spec={
            "plan": {"type": "dict"},
            "repository": {"type": "path"},
            **selection_argument_spec(),
            "state": {"type": "str", "choices": ["completed", "started", *STOPPING], "default": "completed"},
            "max_vms": {"type": "int", "default": 4},
            "bandwidth": {"type": "bytes", "default": "0"},
            "slice": {"type": "float", "default": 0},
            # For the action plugin.
            "progress": {"type": "str", "choices": ["auto", "quiet", "none"], "default": "auto"},
            "timeout": {"type": "str", "default": "0"},
            "offline_timeout": {"type": "str", "default": "4h"},
            "stall_timeout": {"type": "str", "default": "600"},
            "detach": {"type": "str", "choices": ["never", "preferred", "required"], "default": "never"},
            "nice": {"type": "int", "default": 0},
            "ionice": {"type": "str", "choices": ["none", "best-effort", "idle"], "default": "none"},
            "cpu_weight": {"type": "int"},
            # For the action plugin.
            "worker": {"type": "str"},
            "begin": {"type": "bool", "default": True},
            "unattended": {"type": "bool", "default": False},
            "takeover": {"type": "bool", "default": False},
            "supersede": {"type": "bool", "default": False},
            "adopt": {"type": "bool", "default": False},
            "trust_others": {"type": "bool", "default": False},
        },
        required_one_of=[("plan", "repository")],
        mutually_exclusive=[("plan", "repository")],
        required_if=[
            ("state", "completed", ("plan",)),
            ("state", "started", ("plan",)),
            ("state", "untracked", ("plan", "names"), True),
        ],
        supports_check_mode=True,
    )
    require_qmp(module)
    params = module.params
    if params["detach"] != "never" and params["state"] == "started" and params["begin"] and not module.check_mode:
        from ansible_collections.vmfleet.backup.plugins.module_utils._backup.worker import leave  # noqa: PLC0415

        leave(module, main_task)
    run_in_worker(module, main_task)


if __name__ == "__main__":
    main()

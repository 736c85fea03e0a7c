#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: drive_backup
short_description: Copy disks of a running VM
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Makes a point-in-time copy of one or several disks of a running QEMU virtual machine, with the QMP command
    C(drive-backup), and brings that copy to the requested O(state), with any number of calls.
  - QEMU copies in the background while the guest continues to work. The image holds the disk as it was when the job
    started.
  - The image is C(<target>.partial) at first. It gets its name when its job has succeeded and all data is on stable
    storage. C(<target>.receipt.json) then says what it is, so a second call changes nothing.
  - An interrupted call, or a crash of a VM or hypervisor, needs no manual repair. The next call continues a running
    job, completes one that has ended, or cleans up and starts again.
  - The module creates the target and gives it to QEMU as an open file, so QEMU needs no access to its directory. It
    reserves the space for the copy before the copy starts.
  - A QEMU that no longer has C(drive-backup), or that refuses deprecated commands, makes the same copy with
    C(blockdev-backup). Its target is then a block node whose name begins with C(vmf.). It is removed when the job has
    ended, or by the next call.
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_monitor
  - vmfleet.backup.monitor
  - vmfleet.backup.libvirt
attributes:
  idempotent:
    support: partial
    details:
      - A block device as O(target) has no place for a receipt. Without O(receipt) it is written again by every call.
options:
  device:
    description:
      - The disk, by the name of its backend, of its block node, or the id of its device (QEMU's C(device)).
      - The module always gives QEMU the name of the node, and never starts a second job for a disk.
    type: str
  target:
    description:
      - Absolute path of the new image, or of an existing file or block device with O(mode=existing).
      - Its directory must exist. Protocols and C(json:) are not accepted.
    type: str
  format:
    description:
      - The image's format. For a new file it is V(qcow2) unless given.
      - The format of an existing image is probed, and must be given where it is V(raw).
      - An encrypted image cannot be the target.
    type: str
  mode:
    description:
      - With V(absolute-paths) a new file is made.
      - With V(existing) the module writes to an existing image or block device, which must have exactly the size of
        the disk. It writes to an image that holds data and has no receipt only with O(overwrite=true). It writes to a
        block device unless the device is in use, or its O(receipt) is for another backup.
    type: str
    choices: [absolute-paths, existing]
    default: absolute-paths
  speed:
    description:
      - Limit of the job's rate in bytes per second, also as V(50M). V(0) is unlimited.
      - With O(sync=full), holes of the disk count like data, though they are not written.
      - A job that runs already gets this limit, unless it is V(0).
    type: bytes
    default: "0"
  on_source_error:
    description:
      - What the job does when reading fails. V(report) ends it, V(stop) pauses it, V(enospc) pauses it when there is no
        space and else ends it, V(ignore) tries again without end.
      - If the job is paused, a waiting call fails at once and says what to do. The module does not resume the job.
    type: str
    choices: [report, ignore, enospc, stop]
    default: report
  on_target_error:
    description:
      - What the job does when writing fails, see O(on_source_error).
      - It does not change what happens to writes of the guest.
    type: str
    choices: [report, ignore, enospc, stop]
    default: report
  sync:
    description:
      - V(full) copies the whole disk as the guest sees it, V(top) the topmost image of its chain only, V(incremental)
        and V(bitmap) what O(bitmap) has marked.
      - V(incremental) clears the bitmap in QEMU when the copy ends well. If the image is lost after that, its changes
        are missing in every later increment. A call that finds this says so and fails, until a full backup is made or
        O(overwrite=true) accepts the gap. V(bitmap) with O(bitmap_mode=never) never loses a change and is recommended.
    type: str
    choices: [full, top, incremental, bitmap]
    default: full
  bitmap:
    description: The dirty bitmap on the disk's node for O(sync=incremental) and O(sync=bitmap).
    type: str
  bitmap_mode:
    description: What to do with O(bitmap) at the end. V(on-success) clears what was copied, V(never) keeps all.
    type: str
    choices: [on-success, never, always]
  compress:
    description:
      - Compress the data, with zstd where a new qcow2 image is made.
    type: bool
    default: false
  job_id:
    description:
      - The job's id in QEMU. Unless given it is derived from target, node, sync and bitmap.
    type: str
  receipt:
    description:
      - Absolute path of the receipt. Unless given it is C(<target>.receipt.json), and a block device has none.
    type: path
  drives:
    description:
      - Several disks of the VM, copied at one point in time (one QMP transaction).
      - The defaults for a drive are the options of the module with the same names.
    type: list
    elements: dict
    suboptions:
      device:
        description: See O(device).
        type: str
        required: true
      target:
        description: See O(target).
        type: str
        required: true
      format:
        description: See O(format).
        type: str
      mode:
        description: See O(mode).
        type: str
        choices: [absolute-paths, existing]
      speed:
        description: See O(speed).
        type: bytes
      on_source_error:
        description: See O(on_source_error).
        type: str
        choices: [report, ignore, enospc, stop]
      on_target_error:
        description: See O(on_target_error).
        type: str
        choices: [report, ignore, enospc, stop]
      sync:
        description: See O(sync).
        type: str
        choices: [full, top, incremental, bitmap]
      bitmap:
        description: See O(bitmap).
        type: str
      bitmap_mode:
        description: See O(bitmap_mode).
        type: str
        choices: [on-success, never, always]
      compress:
        description: See O(compress).
        type: bool
      job_id:
        description: See O(job_id).
        type: str
      receipt:
        description: See O(receipt).
        type: path
  completion_mode:
    description:
      - With V(grouped) the copies of O(drives) succeed or fail together. With V(individual) each one counts alone.
    type: str
    choices: [grouped, individual]
    default: grouped
  state:
    description:
      - V(completed) waits until the copy is finished. It continues a job that already runs.
      - V(started) returns when the job runs. A later call with V(completed) waits for it and finishes the image. Until
        then no process watches the guest.
      - V(cancelled) stops the job and removes what it has written. It finishes a copy that has already succeeded, and
        does not change a finished image.
    type: str
    choices: [completed, started, cancelled]
    default: completed
  overwrite:
    description:
      - Replace a target that exists and is not this backup. The old file is kept until the new one is good.
    type: bool
    default: false
  timeout:
    description: How long to wait for the end, in seconds or with V(s), V(m), V(h) or V(d), such as V(90m); V(0) without
      limit.
    type: str
    default: "0"
  stall_timeout:
    description:
      - The time without any progress after which the wait ends, given like O(timeout), V(0) without limit.
      - A job that somebody has paused makes no progress either.
      - The wait also ends if the VM does not answer for so long, because another client holds its monitor. Then the
        job continues.
    type: str
    default: "600"
  on_timeout:
    description:
      - When a time is up, V(cancel) the job and remove what it has written, or V(leave) it running. The call fails in
        both cases.
    type: str
    choices: [cancel, leave]
    default: cancel
  encrypted_source:
    description:
      - What to do with a disk whose image, or one below it, is encrypted (LUKS). QEMU decrypts the data that it copies,
        so the new image is not encrypted. V(warn) makes it, with a warning. With V(refuse) the call fails before
        anything is started.
    type: str
    choices: [warn, refuse]
    default: warn
  selinux_label:
    description:
      - If SELinux does not let QEMU write to the target, give the target the label of the VM's own images until its job
        has ended. Then it gets its own label back. With V(false) the call fails instead, before anything is started.
      - The label of a block device, or of a target that QEMU may write to, is not changed.
    type: bool
    default: true
notes:
  - While a VM is paused, QEMU 7.2 keeps the files that were passed to it open, and with them the lock on the finished
    image. It lets go when the VM runs again.
seealso:
  - module: vmfleet.backup.block_job_info
  - module: vmfleet.backup.block_job
  - ref: ansible_collections.vmfleet.backup.docsite.how_it_works.failing
    description: What happens to the guest when the target is full or fails.
  - name: drive-backup in the QEMU QMP Reference Manual
    description: The command that does the work.
    link: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

EXAMPLES = r"""
- name: Back up one disk of a running VM
  vmfleet.backup.drive_backup:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    device: drive0
    target: /srv/backup/web01-drive0.qcow2

- name: Back up two disks at one point in time, compressed and with limited rate
  vmfleet.backup.drive_backup:
    monitor: unix:/run/vmfleet-monitors/db01.qmp
    compress: true
    speed: 50M
    drives:
      - device: system
        target: /srv/backup/db01-system.qcow2
      - device: data
        target: /srv/backup/db01-data.qcow2

- name: Start a backup and go on with other work
  vmfleet.backup.drive_backup:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    device: drive0
    target: /srv/backup/web01-drive0.qcow2
    state: started

- name: Wait for that backup, an hour at most
  vmfleet.backup.drive_backup:
    monitor: unix:/run/vmfleet-monitors/web01.qmp
    device: drive0
    target: /srv/backup/web01-drive0.qcow2
    timeout: 3600
"""

RETURN = r"""
jobs:
  description: One entry for each drive, also when the module fails while or after waiting.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: The job's id in QEMU.
      type: str
      sample: vmfleet.db.5f1d2c0b9a3e
    device:
      description: The device as it was given.
      type: str
    node:
      description: The name of the block node that is copied.
      type: str
    target:
      description: The image's path.
      type: str
    state:
      description:
        - V(planned) (check mode only), V(running), V(paused) by an error, V(completed), V(failed), V(cancelled), or
          V(absent) where there is no backup to cancel.
      type: str
    offset:
      description: Bytes that the job has worked through, V(0) when it is no longer listed.
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
    duration:
      description: Seconds since the start, or from the start to the end.
      type: float
    error:
      description: Why it failed, empty otherwise.
      type: str
  sample:
    - id: vmfleet.db.a3ae5c81818a
      device: drive0
      node: n0
      target: /srv/backup/web01.qcow2
      state: completed
      offset: 67108864
      len: 67108864
      percent: 100.0
      speed: 0
      duration: 4.081
      error: ""
qmp:
  description:
    - The QMP commands that were sent, in order, queries left out.
    - Where QEMU refuses C(drive-backup), that attempt is among them, and what was sent in its place.
  returned: always
  type: list
  elements: dict
  sample:
    - execute: drive-backup
      arguments: {device: drive0, target: "json:...", sync: full}
"""

from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import (
    drive_argument_spec,
    monitor_argument_spec,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import duration
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.drive_backup import back_up
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    BitmapMode,
    CompletionMode,
    Drive,
    DriveBackupRequest,
    OnTimeout,
    RequestedState,
    Sync,
    TargetMode,
    check_drives,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Session
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import EncryptedSource
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp

if TYPE_CHECKING:
    from typing import Any


WORDS = {"mode": TargetMode, "sync": Sync, "bitmap_mode": BitmapMode}
"""The options of a drive that are words of a closed list."""


def drives(params: dict[str, Any]) -> tuple[Drive, ...]:
    """Return the drives that are asked for; what one of them leaves open comes from the module's own options."""
    general = _given({name: params[name] for name in drive_argument_spec()})
    return tuple(Drive(**{**general, **_given(drive)}) for drive in params["drives"] or [{}])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {name: WORDS[name](value) if name in WORDS else value for name, value in given.items()}


def diff(jobs: list[dict[str, Any]], changed: bool) -> dict[str, str]:
    """Return the targets before and after; nothing differs where nothing has changed."""
    after = "".join("{}: {}, copy of {}\n".format(job["target"], job["state"], job["device"]) for job in jobs)
    before = "".join("{}: not this backup\n".format(job["target"]) for job in jobs)
    return {"before": before if changed else after, "after": after}


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    """Do what the module's options ask for."""
    params = module.params
    request = DriveBackupRequest(
        address=parse_address(params["monitor"], libvirt_uri=params["libvirt_uri"]),
        drives=drives(params),
        state=RequestedState(params["state"]),
        completion_mode=CompletionMode(params["completion_mode"]),
        overwrite=params["overwrite"],
        timeout=duration("timeout", params["timeout"]),
        stall_timeout=duration("stall_timeout", params["stall_timeout"]),
        on_timeout=OnTimeout(params["on_timeout"]),
        encrypted_source=EncryptedSource(params["encrypted_source"]),
        selinux_label=params["selinux_label"],
        check_mode=module.check_mode,
    )
    check_drives(request.drives)
    session = Session(request)
    try:
        jobs = await back_up(session)
    except BackupError as error:
        error.details = {"jobs": [], "changed": session.changed, "qmp": session.commands, **error.details}
        raise
    finally:
        for warning in session.warnings:
            warn(module, warning)
    return {"changed": session.changed, "jobs": jobs, "qmp": session.commands, "diff": diff(jobs, session.changed)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **monitor_argument_spec(),
            **drive_argument_spec(defaults=True),
            "drives": {"type": "list", "elements": "dict", "options": drive_argument_spec(required=True)},
            "completion_mode": {"type": "str", "choices": ["grouped", "individual"], "default": "grouped"},
            "state": {"type": "str", "choices": ["completed", "started", "cancelled"], "default": "completed"},
            "overwrite": {"type": "bool", "default": False},
            "timeout": {"type": "str", "default": "0"},
            "stall_timeout": {"type": "str", "default": "600"},
            "on_timeout": {"type": "str", "choices": ["cancel", "leave"], "default": "cancel"},
            "encrypted_source": {"type": "str", "choices": ["warn", "refuse"], "default": "warn"},
            "selinux_label": {"type": "bool", "default": True},
        },
        required_one_of=[("device", "drives")],
        required_together=[("device", "target")],
        mutually_exclusive=[("drives", name) for name in ("device", "target", "job_id", "receipt")],
        supports_check_mode=True,
    )
    require_qmp(module)
    run_module(module, main_task)


if __name__ == "__main__":
    main()

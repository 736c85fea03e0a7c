#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_plan
short_description: Plan the backup of VMs
version_added: 0.1.0
description:
  - Asks every VM that is listed, or whose socket matches a pattern, for its disks and jobs, looks into the repository,
    and says for each VM what M(vmfleet.backup.backup_set) would do and why.
  - Changes nothing, with and without check mode. O(takeover), O(supersede) and O(adopt) are for
    M(vmfleet.backup.backup_set), and the plan shows their effect.
  - A VM that cannot be backed up is in the plan with RV(plan.vms[].action=fail) and the reason. It never stops the
    others. M(vmfleet.backup.backup_set) fails after it has finished the others.
  - CD-ROMs, empty drives and other read-only drives are left out, and named in the plan. UEFI variables (pflash) are
    included.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.libvirt
  - vmfleet.backup.orders
  - vmfleet.backup.trust_others
  - vmfleet.backup.selection
attributes:
  check_mode:
    description: Can run in C(check_mode), with the same result.
    support: full
  diff_mode:
    description: Shows the plan as text.
    support: full
  idempotent:
    description: Only reads. It can be run at any time, any number of times.
    support: full
requirements:
  - qemu.qmp >= 0.0.4 (Python library) on the hypervisor
  - qemu-img on the hypervisor
  - qemu-storage-daemon and timeout (coreutils) on the hypervisor, for VMs that are off
options:
  repository:
    description:
      - The directory of the repository. It must hold the file C(vmfleet.json), which shows that its file system is
        mounted.
    type: path
    required: true
  create_repository:
    description:
      - Plan to make a repository if there is none. M(vmfleet.backup.backup_set) makes it, in an empty directory, or in
        one that does not exist yet.
    type: bool
    default: false
  id:
    description:
      - The id of the sets. A VM that has a set with this id is done.
      - The default is today's date in UTC, such as V(2026-11-22). For several sets a day, use an id that contains the
        time.
    type: str
  vms:
    description: The VMs to back up.
    type: list
    elements: dict
    suboptions:
      name:
        description:
          - The name of the VM in the repository.
          - The default is the name that QEMU was given (C(-name)), else the file name of the socket without its suffix.
        type: str
      monitor:
        description:
          - The VM's QMP monitor, as V(unix:/run/vmfleet-monitors/web01.qmp), as a path alone, or V(tcp:127.0.0.1:4444);
            or a domain of libvirt, as V(libvirt:web01).
        type: str
        required: true
      include_disks:
        description: Instead of O(include_disks) for this VM.
        type: list
        elements: str
      exclude_disks:
        description: Instead of O(exclude_disks) for this VM.
        type: list
        elements: str
      level:
        description: Instead of O(level) for this VM.
        type: str
        choices: [auto, full, incremental, differential]
      quiesce:
        description: Instead of O(quiesce) for this VM.
        type: str
        choices: [none, try, require]
      agent:
        description:
          - The socket of the VM's guest agent, such as V(/run/vmfleet-monitors/web01.agent).
          - The default is the one that QEMU itself has for the channel C(org.qemu.guest_agent.0).
        type: path
      disks:
        description:
          - All disks of the VM, for backups while it is off, with O(offline=backup). Needs O(vms[].name).
          - O(include_disks) and O(exclude_disks) select disks by these names. The other disks are opened, too, during
            the copy. This makes the VM fail at its first disk if somebody starts it, so no disk is harmed.
        type: list
        elements: dict
        suboptions:
          name:
            description:
              - The name of the disk in the sets of the VM, which is its name while the VM is on. The plan warns if the
                VM has another disk with this name.
            type: str
            required: true
          file:
            description: Its file or block device.
            type: path
            required: true
          format:
            description: The format of the file. Only the changes of a V(qcow2) disk are recorded while its VM is off.
            type: str
            choices: [qcow2, raw]
            required: true
      uuid:
        description:
          - The VM's uuid (C(-uuid) of QEMU). It is needed if the VM has one, O(vms[].disks) are listed, and the first
            set is made while the VM is off. Otherwise it comes from the sets that this machine has made of the VM.
          - A VM that answers at the monitor with another uuid is not backed up.
        type: str
  sockets:
    description:
      - Patterns of the QMP sockets of further VMs, such as V(/run/vmfleet-monitors/*.qmp).
      - A pattern that matches nothing gives a warning. A path without wildcards names a VM that must exist.
    type: list
    elements: str
  domains:
    description:
      - Patterns of the names of domains of libvirt, such as V(*) or V(web*). They find domains that run and domains
        that are shut off. O(offline) says what to do with the latter.
      - A pattern that matches nothing gives a warning. A name without wildcards names a domain that must exist.
      - A domain that is also found by its socket is one VM. It is reached as O(vms) lists it, or else through libvirt.
      - The settings in the C(<metadata>) of a domain override the options of this module, and the settings in O(vms)
        override both.
    type: list
    elements: str
  exclude_domains:
    description: Patterns of the names of domains that O(domains) does not find.
    type: list
    elements: str
  include_disks:
    description:
      - Back up these disks only, by backend name, node name, device id, or target (V(vda)) of a domain of libvirt. A
        VM fails if it does not have a disk that is named.
      - A read-only disk that is named here is backed up, too.
    type: list
    elements: str
    default: []
  exclude_disks:
    description: Leave out these disks. A VM fails if it does not have a disk that is named.
    type: list
    elements: str
    default: []
  level:
    description:
      - V(auto) and V(incremental) copy what has changed since the newest set. V(differential) copies what has changed
        since the newest full image of each disk. V(full) copies everything.
      - A disk is copied in full if its changes are not known for certain, if it is new, if its size has changed, or if
        its chain has O(max_chain) images. The plan says why.
    type: str
    choices: [auto, full, incremental, differential]
    default: auto
  max_chain:
    description:
      - The largest number of images in a chain, with the full one. The image after that is full.
    type: int
    default: 30
  tracking:
    description:
      - Let QEMU record which parts of the disks change after a set, in a bitmap for each disk. With V(false), every set
        is a full one.
      - While a disk has bitmaps, QEMU refuses to load internal snapshots (C(loadvm), C(qemu-img snapshot -a)).
    type: bool
    default: true
  quiesce:
    description:
      - Whether to freeze the file systems of the guest, through its guest agent, at the moment of the set. They are
        frozen only while the jobs start, not while they copy.
      - V(try) backs up a guest that cannot be frozen as it is, as after a power cut, and the result says so. V(require)
        does not back it up.
    type: str
    choices: [none, try, require]
    default: none
  compression:
    description:
      - Both V(zstd) and V(zlib) save space. V(zstd) takes about 1.5 times as long as V(none), and V(zlib) many times as
        long.
      - For full sets that go into a store that deduplicates use V(none), and let the store compress. Full images that
        are not compressed have their data in the order of the disk.
    type: str
    choices: [none, zstd, zlib]
    default: none
  speed:
    description:
      - The most bytes per second that each disk is copied with, such as V(50M). V(0) sets no limit.
      - A full copy counts the holes of a disk like data, though it does not write them. A disk of 4 TiB takes 11.7
        hours at V(100M), however little it holds. The plan warns of that. Increments count changed blocks only.
    type: bytes
    default: "0"
  reserve:
    description:
      - The space that always stays free in the repository, as a percentage of its file system or as an amount, such as
        V(20G).
      - A VM fails before it starts if its set might need more than the remaining space.
      - It counts double on file systems that cannot reserve space for a copy.
    type: str
    default: 5%
  checksum:
    description: Read every image back from the disk, and note its SHA-256 in the manifest.
    type: bool
    default: true
  offline:
    description:
      - What to do with a VM that is off. With V(backup), C(qemu-storage-daemon) copies its disks. libvirt knows the
        disks of a domain. List the disks of another VM in O(vms[].disks), or the VM counts as not backed up. The VM
        cannot be started during the copy. If none of its disks has changed since its newest set, nothing is copied.
      - V(fail) counts such a VM as not backed up. V(skip) leaves it out, and the plan says so.
      - A running VM that does not answer always counts as not backed up.
    type: str
    choices: [backup, fail, skip]
    default: backup
  encrypted_source:
    description:
      - What to do with a disk whose image, or one below it, is encrypted (LUKS). QEMU decrypts the data that it copies,
        so the image in the set is not encrypted.
      - V(warn) copies the disk, and the plan, the result and the manifest say so. With V(refuse) its VM counts as not
        backed up, and nothing is started on it.
    type: str
    choices: [warn, refuse]
    default: warn
  selinux_label:
    description:
      - If SELinux does not let QEMU write to new images in the repository, give the images the label of the VM's own
        images while they are made. They get their own label back when their jobs have ended. With V(false) such a VM
        counts as not backed up, and nothing is started on it.
      - No label is changed if QEMU may write to the images as they are.
    type: bool
    default: true
seealso:
  - module: vmfleet.backup.backup_set
  - ref: ansible_collections.vmfleet.backup.docsite.incremental_backups
    description: The levels, and each reason for a full image.
  - ref: ansible_collections.vmfleet.backup.docsite.consistency
    description: How a guest is frozen, and why that may fail.
  - ref: ansible_collections.vmfleet.backup.docsite.powered_off
    description: How to back up a VM that is off.
"""

EXAMPLES = r"""
- name: See what a backup would do
  vmfleet.backup.backup_plan:
    repository: /srv/backup
    sockets:
      - /run/vmfleet-monitors/*.qmp
    exclude_disks:
      - scratch
  register: planned

- name: Show it
  vmfleet.backup.show:
    text: "{{ planned.text }}"

- name: Do it
  vmfleet.backup.backup_set:
    plan: "{{ planned.plan }}"

- name: Plan the backup of a VM that may be off
  vmfleet.backup.backup_plan:
    repository: /srv/backup
    offline: backup
    vms:
      - name: web01
        monitor: unix:/run/vmfleet-monitors/web01.qmp
        disks:
          - name: drive0
            file: /var/lib/vms/web01.qcow2
            format: qcow2
  register: planned
"""

RETURN = r"""
plan:
  description: What M(vmfleet.backup.backup_set) takes.
  returned: success
  type: dict
  contains:
    repository:
      description: The directory of the repository.
      type: str
    create_repository:
      description: Whether it is to be made.
      type: bool
    run:
      description: A random name of this run. A run does not try again a VM that has failed in it.
      type: str
    id:
      description: The id of the sets.
      type: str
    policy:
      description: How the sets are made.
      type: dict
    space:
      description: Bytes in the repository that are free, kept in reserve, promised to other sets, needed and usable.
      type: dict
    vms:
      description: The VMs.
      type: list
      elements: dict
      contains:
        name:
          description: What the VM is called in the repository.
          type: str
        monitor:
          description: Its monitor.
          type: str
        action:
          description: >-
            V(skip) if there is nothing to do, V(attach) if its set is being made, V(finish) if an older set comes
            first, V(start), or V(fail) if it cannot be backed up.
          type: str
        level:
          description: The level of the set, V(full) if all its images are, else V(incremental) or V(differential).
          type: str
        reason:
          description: Why.
          type: str
        bytes:
          description: The most that the set is expected to take.
          type: int
        disks:
          description: >-
            The disks in the set, each with C(name), C(node), C(level), C(reason), C(parent), C(target) (its image
            file) and C(bytes).
          type: list
          elements: dict
        left_out:
          description: The drives that are not in the set, each with C(name) and C(reason).
          type: list
          elements: dict
    warnings:
      description:
        - Problems of the request, and properties of the disks that the copies will not keep.
      type: list
      elements: str
  sample:
    repository: /srv/backup
    create_repository: false
    run: 643b97ea3d6d22ca
    id: "2026-11-29"
    policy:
      compression: none
      speed: 0
      reserve: "0"
      checksum: true
      offline: backup
      max_chain: 30
      tracking: true
      encrypted_source: warn
      selinux_label: true
    space:
      free: 78477996032
      reserve: 0
      promised: 0
      reservable: true
      needed: 4268057
      usable: 78477996032
    vms:
      - name: web01
        monitor: libvirt:web01
        action: start
        level: incremental
        reason: there is no set 2026-11-29 of this VM
        bytes: 4268057
        disks:
          - name: vda
            node: libvirt-2-format
            level: incremental
            reason: changes since set 2026-11-28
            parent: "2026-11-28"
            target: vda.qcow2
            bytes: 2170904
          - name: vdb
            node: libvirt-1-format
            level: incremental
            reason: changes since set 2026-11-28
            parent: "2026-11-28"
            target: vdb.qcow2
            bytes: 2097153
        left_out: []
    warnings: []
unknown:
  description: The names in O(names) that match no VM of this hypervisor.
  returned: success
  type: list
  elements: str
  sample:
    - web9
text:
  description: The plan, to be read by people.
  returned: success
  type: list
  elements: str
  sample:
    - Backup 2026-11-29 to /srv/backup
    - "Space: 4.1 MiB needed, 73.1 GiB free, 0 B kept in reserve, 0 B promised to other sets"
    - start   web01  there is no set 2026-11-29 of this VM
    - "               vda: incremental, about 2.1 MiB: changes since set 2026-11-28"
    - "               vdb: incremental, about 2.0 MiB: changes since set 2026-11-28"
"""

import re
from dataclasses import asdict, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import libvirt_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import make_module
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import Selection, selection_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch, probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls, run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Offline, Policy, Quiesce, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.observe import reserve_bytes
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.planner import describe, draw_up
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.requests import requests_for
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import LIBVIRT
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.discovery import PATTERNS, discover
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.disk_file import FORMATS, DiskFile
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import EncryptedSource, plain_path
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qemu_img import require_qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository, find_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import UUID_PATTERN, Level
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import check_set_id

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule

    from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Plan

OWN = {"level": "wanted", "quiesce": "quiesce", "exclude_disks": "exclude_disks"}
"""The options of a VM that stand above what its domain says itself, and what they are called in a request."""
ORDERS = ("takeover", "supersede", "adopt")
POLICY = tuple(field.name for field in fields(Policy))
"""The options that say how sets are made."""


def requests(params: dict[str, Any]) -> list[Request]:
    """The VMs that are listed; what one of them leaves open comes from the module's own options."""

    return [_request(params, vm) for vm in params["vms"] or ()]


def _request(params: dict[str, Any], vm: dict[str, Any]) -> Request:
    def given(option: str) -> Any:
        return params[option] if vm.get(option) is None else vm[option]

    return Request(
        name=vm.get("name") or "",
        monitor=vm.get("monitor") or "",
        libvirt_uri=params["libvirt_uri"],
        given=frozenset(field for option, field in OWN.items() if vm.get(option) is not None),
        include_disks=tuple(given("include_disks")),
        exclude_disks=tuple(given("exclude_disks")),
        wanted=given("level"),
        quiesce=given("quiesce"),
        agent=vm.get("agent") or "",
        files=_files(vm),
        uuid=(vm.get("uuid") or "").lower(),
    )


def _files(vm: dict[str, Any]) -> tuple[DiskFile, ...]:
    return tuple(DiskFile(**disk) for disk in vm.get("disks") or ())


def check_listed(vms: Iterable[dict[str, Any]]) -> None:
    """Refuse what cannot be meant of a VM that is off. Each disk may be copied in the name of its VM then."""
    owners: dict[str, str] = {}
    for vm in vms:
        if vm["uuid"] and not re.fullmatch(UUID_PATTERN, vm["uuid"].lower()):
            raise Refused("vms", f"{vm['monitor']} is listed with uuid {vm['uuid']!r}, which is none")
        if vm["disks"] and vm["monitor"].startswith(LIBVIRT):
            raise Refused(
                "vms",
                f"{vm['monitor']} has a list of disks; remove the list, because libvirt knows the disks of a domain",
            )
        for disk in vm["disks"] or ():
            if not vm["name"]:
                raise Refused(
                    "vms",
                    f"{vm['monitor']} has a list of disks, but no name; add name, because a VM that is off cannot"
                    " say its name",
                )
            if [other["name"] for other in vm["disks"]].count(disk["name"]) > 1:
                raise Refused("vms", f"disk {disk['name']} of {vm['name']} is listed twice")
            path = plain_path(disk["file"])
            if path in owners:
                raise Refused("vms", f"{path} is listed as a disk of {owners[path]}, and of {vm['name']}")
            owners[path] = f"{vm['name']} ({disk['name']})"


def policy(params: dict[str, Any]) -> Policy:
    reserve_bytes(params["reserve"], 0)
    return Policy(**{name: params[name] for name in POLICY})


def returned(plan: Plan) -> dict[str, Any]:
    """The plan as a return value, which parse_plan() reads."""
    found = asdict(plan)
    found["space"]["usable"] = plan.space.usable
    for vm, entry in zip(plan.vms, found["vms"]):
        entry["bytes"] = vm.bytes
    return found


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    set_id = check_set_id(params["id"] or datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    if not params["vms"] and not params["sockets"] and not params["domains"]:
        raise Refused("vms", "nothing is to be backed up; list VMs, or name patterns of domains or of sockets")
    check_listed(params["vms"] or ())
    how = policy(params)
    listed = requests(params)
    found = await discover((request.address for request in listed), params)
    wanted = requests_for(listed, _request(params, {}), found)
    require_qemu_img()
    await probe_if_there(params["repository"], writing=True)
    orders = {name: params[name] for name in ORDERS}
    async with ThreadedCalls(Watch(params["repository"], writing=True)) as calls:
        places = (params["repository"], params["create_repository"], params["trust_others"])
        repository = await calls.run(find_repository, *places)
        plan, unknown = await draw_up(
            AsyncRepository(repository, calls), wanted, found, set_id, how, orders, Selection.of(params)
        )
    for warning in plan.warnings:
        warn(module, warning)
    text = describe(plan)
    diff = {"before": "", "after": "\n".join(text) + "\n"}
    return {"changed": False, "plan": returned(plan), "unknown": unknown, "text": text, "diff": diff}


def argument_spec() -> dict[str, Any]:
    names = {"type": "list", "elements": "str"}
    return {
        "repository": {"type": "path", "required": True},
        "create_repository": {"type": "bool", "default": False},
        "trust_others": {"type": "bool", "default": False},
        "id": {"type": "str"},
        "vms": {
            "type": "list",
            "elements": "dict",
            "options": {
                "name": {"type": "str"},
                "monitor": {"type": "str", "required": True},
                "include_disks": names,
                "exclude_disks": names,
                "level": {"type": "str", "choices": list(Level)},
                "quiesce": {"type": "str", "choices": list(Quiesce)},
                "agent": {"type": "path"},
                "uuid": {"type": "str"},
                "disks": {
                    "type": "list",
                    "elements": "dict",
                    "options": {
                        "name": {"type": "str", "required": True},
                        "file": {"type": "path", "required": True},
                        "format": {"type": "str", "required": True, "choices": list(FORMATS)},
                    },
                },
            },
        },
        **dict.fromkeys(PATTERNS, names),
        **selection_argument_spec(),
        **libvirt_argument_spec(),
        "include_disks": {**names, "default": []},
        "exclude_disks": {**names, "default": []},
        "level": {"type": "str", "choices": list(Level), "default": Level.AUTO},
        "max_chain": {"type": "int", "default": 30},
        "tracking": {"type": "bool", "default": True},
        "quiesce": {"type": "str", "choices": list(Quiesce), "default": Quiesce.NONE},
        "compression": {"type": "str", "choices": ["none", "zstd", "zlib"], "default": "none"},
        "speed": {"type": "bytes", "default": "0"},
        "reserve": {"type": "str", "default": "5%"},
        "checksum": {"type": "bool", "default": True},
        **{name: {"type": "bool", "default": False} for name in ORDERS},
        "offline": {"type": "str", "choices": list(Offline), "default": Offline.BACKUP},
        "encrypted_source": {"type": "str", "choices": list(EncryptedSource), "default": EncryptedSource.WARN},
        "selinux_label": {"type": "bool", "default": True},
    }


def main() -> None:
    module = make_module(
        argument_spec=argument_spec(), required_one_of=[("vms", "sockets", "domains")], supports_check_mode=True
    )
    require_qmp(module)
    run_in_worker(module, main_task)


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_info
short_description: List VMs with their disks and jobs
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Reads from running QEMU virtual machines what a backup needs to know.
  - A VM that does not answer is listed with its RV(vms[].error), and does not make the module fail.
extends_documentation_fragment:
  - vmfleet.backup.attributes.info
  - vmfleet.backup.attributes.actiongroup_backup
  - vmfleet.backup.libvirt
options:
  monitors:
    description:
      - QMP monitors, as V(unix:/run/vmfleet-monitors/web01.qmp), as a path alone, or V(tcp:127.0.0.1:4444); or domains
        of libvirt, as V(libvirt:web01).
    type: list
    elements: str
  sockets:
    description:
      - Patterns of QMP sockets' paths, such as V(/run/vmfleet-monitors/*.qmp). Each socket that matches is asked.
      - A pattern that matches nothing gives a warning. A path without wildcards names a VM that must exist.
    type: list
    elements: str
  domains:
    description:
      - Patterns of the names of domains of libvirt, such as V(*). One that is shut off is listed with its
        RV(vms[].error).
      - A pattern that matches nothing gives a warning. A name without wildcards names a domain that must exist.
      - A domain that is also found by its socket is listed once.
    type: list
    elements: str
  exclude_domains:
    description: Patterns of the names of domains that O(domains) does not find.
    type: list
    elements: str
requirements:
  - qemu.qmp >= 0.0.4 (Python library) on the hypervisor
seealso:
  - module: vmfleet.backup.drive_backup
"""

EXAMPLES = r"""
- name: Look at all VMs of this hypervisor
  vmfleet.backup.vm_info:
    sockets:
      - /run/vmfleet-monitors/*.qmp
  register: found

- name: List their disks
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ item.disks | map(attribute='name') | join(', ') }}"
  loop: "{{ found.vms }}"
"""

RETURN = r"""
vms:
  description: One entry for each VM, in the order of their monitors' addresses.
  returned: success
  type: list
  elements: dict
  contains:
    monitor:
      description: The monitor's address.
      type: str
    error:
      description:
        - Why this VM did not answer, empty where it did. Of the other keys only RV(vms[].monitor) and
          RV(vms[].excluded) are there then.
      type: str
    excluded:
      description:
        - Whether this is a domain of libvirt that O(domains) has found, and whose C(<metadata>) say that it is not
          backed up.
      type: bool
    name:
      description: The VM's name (C(query-name)), else the socket's without its ending.
      type: str
    uuid:
      description: The VM's uuid, empty where it has none.
      type: str
    status:
      description: QEMU's word for the VM's state, such as V(running) or V(paused).
      type: str
    version:
      description: QEMU's version.
      type: str
    pid:
      description: QEMU's process, V(0) where it is not known (TCP).
      type: int
    disks:
      description: The disks that can be backed up.
      type: list
      elements: dict
      contains:
        name:
          description:
            - The name that the collection uses. The backend's, else the device's id, else the node's; for a domain of
              libvirt its target, such as V(vda).
          type: str
        node:
          description: The block node's name.
          type: str
        device:
          description: The backend's name, empty where it has none.
          type: str
        qdev:
          description: The device's path in QEMU.
          type: str
        filters:
          description: Filter nodes between device and node, such as a throttle.
          type: list
          elements: str
        layers:
          description:
            - The nodes of the image's backing files, such as snapshots, the topmost first. QEMU before 10.1 does not
              always say which node this is if the node has no device. Then all candidates are listed.
          type: list
          elements: str
        driver:
          description: The image's format.
          type: str
        filename:
          description: The image's file, without its secrets.
          type: str
        backing_file:
          description: The backing file, without its secrets; empty where there is none.
          type: str
        virtual_size:
          description: The disk's size in bytes.
          type: int
        actual_size:
          description: Bytes that the image and its backing files hold, V(null) where QEMU cannot tell.
          type: int
        read_only:
          description: Whether the guest can only read it.
          type: bool
        removable:
          description: Whether its medium can be changed, as that of a CD-ROM.
          type: bool
        stable_name:
          description:
            - Whether RV(vms[].disks[].name) stays the same after a restart of QEMU. It does not if neither backend nor
              device nor node has a name. Then the name is only a number.
          type: bool
        keeps_bitmaps:
          description:
            - Whether QEMU can store a persistent bitmap in the image. It can in a writable qcow2 image that is neither
              of the old version (C(compat=0.10)) nor has a raw data file.
          type: bool
        encrypted:
          description: Whether the image, or one below it, is encrypted. A copy is not.
          type: bool
        snapshots:
          description: How many internal snapshots the image holds.
          type: int
        file:
          description: The file or device that the image is in, empty where it is only a part of it.
          type: str
        data_file:
          description: The external file that holds the data of the image, empty where the image does.
          type: str
        shared:
          description: Whether libvirt lets other VMs write to it (C(<shareable/>)).
          type: bool
        bitmaps:
          description: Its dirty bitmaps.
          type: list
          elements: dict
          contains:
            name:
              description: The bitmap's name.
              type: str
            count:
              description: Bytes that it marks as changed.
              type: int
            granularity:
              description: Bytes that one bit stands for.
              type: int
            recording:
              description: Whether it takes note of writes.
              type: bool
            busy:
              description: Whether an operation is using it.
              type: bool
            persistent:
              description: Whether it outlives QEMU.
              type: bool
            inconsistent:
              description: Whether it was not stored properly and can only be removed.
              type: bool
    empty:
      description: Drives without a medium.
      type: list
      elements: str
    jobs:
      description: Its block jobs, with the keys of RV(vmfleet.backup.block_job_info#module:jobs).
      type: list
      elements: dict
    agent:
      description: The guest agent's channel, V(null) where the VM has none.
      type: dict
      contains:
        socket:
          description: The socket's path, empty where the channel is no UNIX socket. It is the address of the VM itself
            where libvirt holds the channel, as V(libvirt:web01).
          type: str
        connected:
          description: Whether an agent has opened the channel in the guest.
          type: bool
  sample:
    - monitor: libvirt:web01
      error: ""
      excluded: false
      name: web01
      uuid: ef50a7a0-fdc5-4186-b939-cf63ad10902d
      status: prelaunch
      version: 7.2.22
      pid: 73
      disks:
        - name: vda
          node: libvirt-2-format
          driver: qcow2
          filters: []
          layers: []
          device: ""
          qdev: /machine/peripheral/virtio-disk0/virtio-backend
          filename: /var/lib/images/vda.qcow2
          backing_file: ""
          virtual_size: 67108864
          actual_size: 33824768
          read_only: false
          removable: false
          stable_name: true
          keeps_bitmaps: true
          encrypted: false
          snapshots: 0
          file: /var/lib/images/vda.qcow2
          data_file: ""
          shared: false
          bitmaps:
            - name: vmfleet-12794a23-08ef4d2ea886cb29
              count: 0
              granularity: 65536
              recording: true
              busy: false
              persistent: true
              inconsistent: false
      empty: []
      jobs: []
      agent: null
"""

import asyncio
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import libvirt_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, internal, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import FoundBy, parse_address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.agent_channel import find_agent
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.discovery import PATTERNS, discover
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qmp_client import require_qmp
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm

AT_ONCE = 32
"""How many VMs are asked at the same time."""


def returned(vm: Vm) -> dict[str, Any]:
    """A VM as a return value."""
    return {
        "name": vm.name,
        "uuid": vm.uuid,
        "status": vm.status,
        "version": vm.version,
        "pid": vm.process.pid if vm.process else 0,
        "disks": [asdict(disk) for disk in vm.disks],
        "empty": list(vm.empty),
        "jobs": [job.as_dict() for job in vm.jobs],
    }


async def describe(address: Address, places: asyncio.Semaphore, warnings: list[str]) -> dict[str, Any]:
    """What one VM tells of itself, or why it does not."""
    async with places:
        try:
            async with Monitor(address) as monitor:
                vm = await inspect_vm(monitor)
                agent = await find_agent(monitor)
            return {"monitor": str(address), "error": "", **returned(vm), "agent": agent}
        except BackupError as error:
            return {"monitor": str(address), "error": str(error)}
        except Exception as error:  # noqa: BLE001
            # A defect of ours that shows with one VM is not to hide the others.
            warnings.append(f"{address}: {traceback.format_exc()}")
            return {"monitor": str(address), "error": f"{address}: {internal(error)}"}


def told_once(vms: Sequence[dict[str, Any]], ways: Sequence[FoundBy]) -> list[dict[str, Any]]:
    """Return the VMs without those that were found in a better way, too: it is the same QEMU that has answered."""
    best: dict[int, FoundBy] = {}
    for vm, way in zip(vms, ways):
        best[vm.get("pid", 0)] = min(best.get(vm.get("pid", 0), way), way)
    return [vm for vm, way in zip(vms, ways) if not vm.get("pid") or way == best[vm["pid"]]]


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    if not params["monitors"] and not params["sockets"] and not params["domains"]:
        raise Refused("monitors", "no VM is named; list monitors, or patterns of domains or of sockets")
    listed = [parse_address(text, "monitors", params["libvirt_uri"]) for text in params["monitors"] or ()]
    found = await discover(listed, params)
    places = asyncio.Semaphore(AT_ONCE)
    addresses = sorted(found.ways, key=str)
    vms = await asyncio.gather(*(describe(address, places, found.warnings) for address in addresses))
    for vm, address in zip(vms, addresses):
        entry = found.domains.get(address)
        vm["excluded"] = found.ways[address] == FoundBy.DOMAIN and entry is not None and entry.is_excluded
    for warning in found.warnings:
        warn(module, warning)
    return {"changed": False, "vms": told_once(vms, [found.ways[address] for address in addresses])}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "monitors": {"type": "list", "elements": "str"},
            **{option: {"type": "list", "elements": "str"} for option in PATTERNS},
            **libvirt_argument_spec(),
        },
        required_one_of=[("monitors", "sockets", "domains")],
        supports_check_mode=True,
    )
    require_qmp(module)
    run_module(module, main_task)


if __name__ == "__main__":
    main()

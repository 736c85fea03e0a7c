#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_restore
short_description: Restore a VM from its backup sets
version_added: 0.1.0
description:
  - Copies the disks of a set to image files or block devices, or makes overlays that can be used at once.
  - Changes no file of a set. Only puts a pin beside the set while it is in use.
  - Finds problems of a chain or a target before it writes the first byte, such as a missing or exchanged image, or a
    target that exists, is in use or has not enough space. Finds a wrong checksum before a file gets its name, see
    O(checksum).
  - An image file gets its name when it is complete and on stable storage. Until then its name is that of the target
    with C(.partial) at the end.
  - A file C(TARGET.restored.json) beside each target says what the target is. As long as the two belong together and
    nobody has written to the target, the same restore changes nothing.
  - Needs no QEMU and no virtual machine, and no more than read access to the repository.
  - With O(domain=define), also defines the domain of libvirt when its disks are complete. Does not start it.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.trust_others
  - vmfleet.backup.libvirt
attributes:
  idempotent:
    support: partial
    details:
      - A block device is written every time, because no file beside it can say what it is.
requirements:
  - qemu-img on the machine
  - libvirt with python3-libvirt on the machine, for O(domain=define)
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  vm:
    description: The name of the VM in the repository.
    type: str
    required: true
  id:
    description:
      - The set. The default is the newest one.
      - If a set that may be newer cannot be read, the module chooses none, and you must name the set.
    type: str
  before:
    description:
      - Take the newest set that was begun at this time or earlier, such as V(2026-11-22T03:00:00Z). A time without a
        zone is UTC.
    type: str
  directory:
    description:
      - Restore all disks into this directory, each as a qcow2 image with the name of the disk.
      - With O(state=absent), remove all overlays of this VM from there, of any set.
    type: path
  disks:
    description: Restore these disks only.
    type: list
    elements: dict
    suboptions:
      name:
        description: The name of the disk in this set, or in any other set of the VM.
        type: str
        required: true
      target:
        description: The absolute path of the image file, or a block device.
        type: path
        required: true
      format:
        description:
          - The format of the target. The default is V(qcow2) for a file and V(raw) for a block device.
          - With O(domain=define), UEFI variables and disks that are C(<shareable/>) are always V(raw).
        type: str
        choices: [qcow2, raw]
  method:
    description:
      - V(copy) makes independent disks.
      - V(overlay) makes small qcow2 images at once. They hold new writes, and read all other data from the set. A VM
        can start from them. They need the set as long as they are used. The set is pinned as long as they exist, and
        M(vmfleet.backup.backup_prune) keeps it.
      - Never commit an overlay, because a commit writes into the backup.
    type: str
    choices: [copy, overlay]
    default: copy
  overwrite:
    description:
      - Replace targets that exist. A block device always exists.
      - With O(domain=define), also define a domain again that has the same name and uuid. It must be off, without a
        saved state, snapshots and checkpoints. If that has changed when all copies are complete, no file is replaced.
      - Where the VM of the set was reached as V(libvirt:NAME), O(libvirt_uri) is asked before anything is replaced. A
        file of a domain that has a saved state, and a file that a disk of a domain builds on, are never replaced.
    type: bool
    default: false
  checksum:
    description:
      - Take the SHA-256 of all images of the chains, and compare it with the manifests.
      - With V(true), this is done while image files are written. They get their names only when the checksums of all
        disks are right, and are removed otherwise. Before a block device is written, or an overlay made, the checksums
        are compared first.
      - V(during) writes block devices at the same time, too, so that each image is read once. If a checksum is wrong,
        the task fails. Do not use the content of the block device then.
      - With V(false), an overlay is ready at once.
      - With O(domain=define), the description of the VM is compared, too, except with V(false).
      - The module always compares the headers of the images with the manifests before it writes anything.
    type: str
    choices: ["true", "false", "during"]
    default: "true"
  domain:
    description:
      - V(define) defines the domain of the set again, on copies of all its disks. The VM of the set must have been
        reached as V(libvirt:NAME).
      - UEFI variables are restored in the format that the domain has them in, as C(nvram.fd) or, as on Fedora, as
        C(nvram.qcow2). A firmware in qcow2 format goes with variables in that format.
      - The state of the TPM is put where libvirt looks for it. libvirt gives all files to the users of QEMU and of
        swtpm when the domain is started.
      - A disk that other domains may write to (C(<shareable/>)) is restored as C(NAME.raw), in format V(raw), because
        libvirt takes it in no other one. It is a copy that no other domain uses.
      - Disks that are not in the set are removed from the domain, and CD-ROM drives are empty. Passwords and secrets of
        libvirt are not in the set. RV(notes) lists all of this.
      - Finds all obstacles before anything is written, such as a domain with this name or uuid, a machine type that
        this libvirt cannot run, or a missing firmware.
      - A domain does what its XML says, also with files and devices of the machine. Therefore no other user may have
        the right to write to the repository, unless O(trust_others=true).
    type: str
    choices: [none, define]
    default: none
  domain_name:
    description: The name of the domain. The default is its old name.
    type: str
  domain_uuid:
    description:
      - V(keep) gives it the uuid of the old domain, by which the next backup recognizes it. The old domain must not
        exist here any more.
      - V(new) gives it a new uuid. It is the same each time that this set is restored with this name here.
    type: str
    choices: [keep, new]
    default: keep
  domain_mac:
    description:
      - V(new) lets libvirt choose new MAC addresses for the network cards. Two domains with one address in one network
        disturb each other.
    type: str
    choices: [keep, new]
    default: keep
  state:
    description:
      - V(absent) removes overlays that were made here, and says that their sets are not in use any more.
      - An overlay that was made independent stays. Only the pin of its set is removed.
      - A file that is not the overlay that was made there stays, and so does the pin. The task removes the other
        overlays, and then fails with the reason.
    type: str
    choices: [present, absent]
    default: present
notes:
  - Targets belong to the user of the module, with mode 0600. Give them to the user of QEMU. For an overlay, that user
    must be able to read the repository, too.
seealso:
  - module: vmfleet.backup.backup_set
  - ref: ansible_collections.vmfleet.backup.docsite.restoring.overlay
    description: How to use an overlay, and how to make it independent.
"""

EXAMPLES = r"""
- name: Restore all disks of web01 as they were in the newest set
  vmfleet.backup.backup_restore:
    repository: /srv/backup
    vm: web01
    directory: /var/lib/libvirt/images/restored

- name: Restore one disk as it was before the accident, to a volume
  vmfleet.backup.backup_restore:
    repository: /srv/backup
    vm: web01
    before: "2026-11-22T03:00:00Z"
    overwrite: true
    disks:
      - name: data
        target: /dev/vg0/web01-data

- name: Have a quick look
  vmfleet.backup.backup_restore:
    repository: /srv/backup
    vm: web01
    method: overlay
    checksum: false
    directory: /var/tmp/look

- name: Done looking
  vmfleet.backup.backup_restore:
    repository: /srv/backup
    vm: web01
    method: overlay
    directory: /var/tmp/look
    state: absent

- name: Restore web01 as a domain beside the one that runs
  vmfleet.backup.backup_restore:
    repository: /srv/backup
    vm: web01
    directory: /var/lib/libvirt/images/web01-yesterday
    domain: define
    domain_name: web01-yesterday
    domain_uuid: new
    domain_mac: new
"""

RETURN = r"""
restored:
  description: The disks, also those that were there already.
  returned: success
  type: list
  elements: dict
  contains:
    disk:
      description: The disk's name in the set.
      type: str
    target:
      description: Where it is.
      type: str
    format:
      description: The format of the target.
      type: str
    method:
      description: V(copy) or V(overlay).
      type: str
    virtual_size:
      description: The size of the disk, in bytes.
      type: int
    bytes:
      description: What the target takes, in bytes.
      type: int
    chain:
      description: The ids of the sets that it was read from, newest first.
      type: list
      elements: str
    changed:
      description: Whether this call has made it.
      type: bool
  sample:
    - disk: vda
      target: /var/lib/restored/vda.qcow2
      format: qcow2
      method: copy
      virtual_size: 67108864
      bytes: 33824768
      chain:
        - "2026-11-29"
        - "2026-11-28"
      changed: true
domain:
  description: The domain, also where it was defined already.
  returned: with O(domain=define)
  type: dict
  contains:
    name:
      description: Its name.
      type: str
    uuid:
      description: Its uuid.
      type: str
    libvirt_uri:
      description: The libvirt that it is defined in.
      type: str
    changed:
      description: Whether this call has defined it.
      type: bool
  sample:
    name: web02
    uuid: 23785441-807c-5d23-ac2b-6f1eb5d3a482
    libvirt_uri: qemu:///system
    changed: true
notes:
  description: Facts to read before the domain is started, such as missing disks and secrets.
  returned: with O(domain=define)
  type: list
  elements: str
  sample:
    - "it cannot be started yet: the user that QEMU runs as (64055) cannot enter /var/lib/images/web02"
id:
  description: The id of the set.
  returned: with O(state=present)
  type: str
  sample: "2026-11-29"
removed:
  description: The overlays that were removed.
  returned: with O(state=absent)
  type: list
  elements: str
  sample:
    - /var/lib/restored/vda.qcow2
independent:
  description:
    - The images that were overlays and were kept, because they read nothing from their sets any more, and the block
      devices whose sets are no longer in use.
  returned: with O(state=absent)
  type: list
  elements: str
  sample:
    - /var/lib/restored/vdb.qcow2
headline:
  description: How many disks were restored, or overlays removed, to be read by people.
  returned: success
  type: str
  sample: "Set 2026-11-22 of web01: 2 of 2 disks were restored just now"
text:
  description: Where each disk is, or which overlays were removed, to be read by people.
  returned: success
  type: list
  elements: str
  sample:
    - "vda: /var/lib/restored/vda.qcow2 (qcow2, 20.0 GiB, copy of set 2026-11-22 on 2026-11-21)"
"""

import os
from functools import partial
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import libvirt_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import parse_time
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.target_files import is_block_device
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qemu_img import require_qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import (
    read_catalog,
    require_newest,
    require_sets,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import image_files, refuse_inside
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.domain import (
    IDENTITIES,
    DomainRequest,
    Identity,
    check_again,
    define_domain,
    plan_domain,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.guard import guard_of
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import (
    CHECKSUMS,
    FORMATS,
    METHODS,
    Checksum,
    DiskRestore,
    RestoreMethod,
    RestoreOptions,
    describe,
    headline,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.old_domain import read_old_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.overlays import find_overlays, remove_overlays
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.restore import restore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import VmCatalog
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


DEFINE = "define"
"""The value of the option C(domain) with which one is defined."""


def latest_time(params: dict[str, Any]) -> datetime | None:
    """Return the time that the set has to be from at the latest."""
    try:
        return None if params["before"] is None else parse_time(params["before"])
    except ValueError:
        raise Refused("before", "{!r} is no time like 2026-11-22T03:00:00Z".format(params["before"])) from None


def chosen_disks(
    params: dict[str, Any], catalog: VmCatalog, manifest: Manifest, raw_files: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the disks that are asked for, each with its target. C(raw_files) are the ends of names by their disks."""
    names = [disk.name for disk in manifest.disks]
    if params["disks"] is None:
        refuse_inside("directory", params["directory"])
        if not os.path.isdir(params["directory"]):
            raise Refused("directory", "there is no directory {}; make it first".format(params["directory"]))
        files = image_files(names, "")
        return [
            {
                "name": name,
                "target": os.path.join(params["directory"], files[name] + raw_files.get(name, ".qcow2")),
                "format": "raw" if name in raw_files else "qcow2",
            }
            for name in names
        ]
    asked = []
    for disk in params["disks"]:
        image = catalog.disk(manifest, disk["name"])
        if image is None:
            raise Refused(
                "disks", "set {} has no disk {!r}; it has: {}".format(manifest.id, disk["name"], ", ".join(names))
            )
        asked.append({**disk, "name": image.name})
    return asked


def disk_restores(
    params: dict[str, Any], catalog: VmCatalog, manifest: Manifest, raw_files: Mapping[str, str]
) -> list[DiskRestore]:
    """Return what is to be restored, with the chain of each disk."""
    found = []
    for asked in chosen_disks(params, catalog, manifest, raw_files):
        target = asked["target"]
        is_raw = is_block_device(target) or asked["name"] in raw_files
        default = "raw" if is_raw else "qcow2"
        chain = tuple(catalog.chain(manifest, asked["name"]))
        method = RestoreMethod(params["method"])
        disk = DiskRestore(asked["name"], chain, target, asked["format"] or default, method)
        if disk.overlay and disk.format != "qcow2":
            raise Refused("format", f"{target}: an overlay is a qcow2 image")
        found.append(disk)
    return found


async def remove_targets(module: AnsibleModule, repository: Repository, catalog: VmCatalog) -> dict[str, Any]:
    """Remove overlays: those that are named, or all in the directory."""
    disks = module.params["disks"]
    if disks is None:
        refuse_inside("directory", module.params["directory"])
        targets = find_overlays(repository, catalog, module.params["directory"])
    else:
        targets = [disk["target"] for disk in disks]
    removed, independent = await remove_overlays(repository, catalog, targets, module.check_mode)
    were = "would be" if module.check_mode else "were"
    return {
        "changed": bool(removed or independent),
        "removed": removed,
        "independent": independent,
        "headline": f"Overlays of {catalog.name} that {were} removed: {len(removed)}",
        "text": removed,
    }


async def restore_disks(module: AnsibleModule, repository: Repository, catalog: VmCatalog) -> dict[str, Any]:
    """Restore the disks of one set."""
    params = module.params
    if not params["id"]:
        require_newest(repository, catalog)
    manifest = catalog.find(params["id"] or "", latest_time(params))
    failure = catalog.failed_sets.get(manifest.id)
    if failure:
        warn(module, f"set {manifest.id} was not good when it was verified last, and may restore as damaged: {failure}")
    options = RestoreOptions(params["overwrite"], Checksum(params["checksum"]), module.check_mode)
    is_checked = options.checksum != Checksum.FALSE
    old = read_old_domain(repository, manifest, is_checked) if params["domain"] == DEFINE else None
    disks = disk_restores(params, catalog, manifest, old.raw_files() if old else {})
    domain = await plan_domain(repository, old, disks, domain_request(params)) if old else None
    look = partial(check_again, domain, disks) if domain else None
    # A domain is looked at as a whole.
    guard = None if domain else guard_of(manifest, params["libvirt_uri"])
    restored, warnings = await restore(repository, catalog, disks, options, look, guard)
    for warning in warnings:
        warn(module, warning)
    found = restored_disks(module, catalog, manifest, restored)
    if domain:
        if not module.check_mode:
            await define_domain(domain, restored)
        found["domain"], found["notes"] = domain.result(), list(domain.notes)
        found["text"] += domain.describe(module.check_mode)
        found["changed"] = found["changed"] or domain.is_needed
    return found


def domain_request(params: dict[str, Any]) -> DomainRequest:
    """Return what is asked for of the domain."""
    return DomainRequest(
        params["libvirt_uri"],
        params["domain_name"] or "",
        Identity(params["domain_uuid"]),
        Identity(params["domain_mac"]),
        params["overwrite"],
    )


def restored_disks(
    module: AnsibleModule, catalog: VmCatalog, manifest: Manifest, restored: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result of the restore of the disks."""
    lines = ["{target}: {disk} of set ".format(**disk) + f"{manifest.id}\n" for disk in restored]
    return {
        "changed": any(disk["changed"] for disk in restored),
        "id": manifest.id,
        "restored": restored,
        "headline": f"Set {manifest.id} of {catalog.name}: {headline(restored, module.check_mode)}",
        "text": describe(restored),
        "diff": {
            "before": "".join(line for line, disk in zip(lines, restored) if not disk["changed"]),
            "after": "".join(lines),
        },
    }


def check_domain(params: dict[str, Any]) -> None:
    """Refuse options that do not go together with a domain, or without one."""
    if params["domain"] != DEFINE:
        if params["domain_name"] is not None:
            raise Refused("domain_name", "nothing is defined; with domain: define it is what the domain is called")
    elif params["state"] == "absent":
        raise Refused("domain", "state: absent removes overlays, and no domain stands on one; use virsh undefine")
    elif params["method"] != RestoreMethod.COPY:
        raise Refused("method", "a domain is defined on copies: libvirt would give the images of the set to QEMU")


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    check_domain(params)
    require_qemu_img()
    await probe_if_there(params["repository"], writing=not module.check_mode)
    repository = open_repository(params["repository"], params["trust_others"])
    catalog = read_catalog(repository, params["vm"])
    # The receipt of a target that is named tells whose overlay it is, also where the VM was forgotten.
    if params["state"] == "present" or params["disks"] is None or not repository.has(params["vm"]):
        require_sets(repository, catalog)
    return await (remove_targets if params["state"] == "absent" else restore_disks)(module, repository, catalog)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "repository": {"type": "path", "required": True},
            "trust_others": {"type": "bool", "default": False},
            "vm": {"type": "str", "required": True},
            "id": {"type": "str"},
            "before": {"type": "str"},
            "directory": {"type": "path"},
            "disks": {
                "type": "list",
                "elements": "dict",
                "options": {
                    "name": {"type": "str", "required": True},
                    "target": {"type": "path", "required": True},
                    "format": {"type": "str", "choices": list(FORMATS)},
                },
            },
            "method": {"type": "str", "choices": list(METHODS), "default": "copy"},
            "overwrite": {"type": "bool", "default": False},
            "checksum": {"type": "str", "choices": CHECKSUMS, "default": "true"},
            **libvirt_argument_spec(),
            "domain": {"type": "str", "choices": ["none", DEFINE], "default": "none"},
            "domain_name": {"type": "str"},
            "domain_uuid": {"type": "str", "choices": list(IDENTITIES), "default": "keep"},
            "domain_mac": {"type": "str", "choices": list(IDENTITIES), "default": "keep"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        mutually_exclusive=[("id", "before"), ("directory", "disks")],
        required_one_of=[("directory", "disks")],
        supports_check_mode=True,
    )
    run_in_worker(module, main_task, module.params["repository"], writing=not module.check_mode)


if __name__ == "__main__":
    main()

#!/usr/bin/python
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_verify
short_description: Verify backup sets
version_added: 0.1.0
description:
  - Checks one set of each VM, with the depth of O(depth), and all images of other sets that it builds on.
  - Fails if one set is not good. The result lists all sets, also the good ones. A problem of one VM never stops the
    others.
  - Changes no file of a set. The result of a verification is written beside the set. M(vmfleet.backup.backup_info)
    shows it, and M(vmfleet.backup.backup_prune) does not count a set that has failed. A damaged image is also noted
    with its own set, because all sets that build on it are damaged, too.
  - A set that has failed is good again when a verification of at least the same depth succeeds.
  - Also verifies a repository that cannot be written to, with a warning that nothing could be noted.
  - Images are read in parallel, one for each processor.
author:
  - vmfleet contributors (@vmfleet)
extends_documentation_fragment:
  - vmfleet.backup.attributes
  - vmfleet.backup.attributes.actiongroup_repository
  - vmfleet.backup.trust_others
  - vmfleet.backup.selection
attributes:
  check_mode:
    description: Can run in C(check_mode). Verifies the same, and writes nothing beside the sets.
    support: full
  diff_mode:
    description: Changes no set, so there is no difference to show.
    support: none
  idempotent:
    description: Never changes a set. What is noted beside a set does not count as a change.
    support: full
requirements:
  - qemu-img on the machine, for O(depth=image) and O(depth=boot)
  - QEMU on the machine, for O(depth=boot)
options:
  repository:
    description: The directory of the repository.
    type: path
    required: true
  id:
    description:
      - The set. The default is the newest one of each VM. With the default, the module also finds directories that
        were sets and have lost their manifest.
    type: str
  depth:
    description:
      - How much to check. Each value includes the checks of those before it.
      - V(manifest) reads the manifest and the description of the VM, which must have the SHA-256 in the manifest, if
        any. All images must exist with the sizes in the manifests, and no other files.
      - V(checksum) takes the SHA-256 of all images. RV(results[].note) names an image that was made without a checksum.
        The header of an image must match the manifest, too, in its format, the size of the disk, and the backing file.
        It may name no other file, and may not be encrypted.
      - V(image) runs C(qemu-img check) on all images, and reads each disk to its end.
      - V(boot) starts a throwaway VM from the set and waits for a sign of life. It has no network and runs as
        O(boot_user). It writes to temporary overlays only, which are removed with it. While it runs, the set is pinned,
        and M(vmfleet.backup.backup_prune) keeps it.
    type: str
    choices: [manifest, checksum, image, boot]
    default: checksum
  boot_timeout:
    description:
      - Seconds to wait for the sign of life.
      - A guest that waits for its network at its start needs longer than usual.
    type: int
    default: 120
  boot_agent:
    description: Whether an answer of the guest agent is a sign of life.
    type: bool
    default: true
  boot_pattern:
    description:
      - A regular expression, such as V(login:$). A match on the serial console of the guest is a sign of life. C(^) and
        C($) match at each line.
      - With O(boot_agent=true), the first sign counts.
    type: str
  boot_options:
    description:
      - More options for QEMU, each word as one element.
      - The throwaway VM gets machine, processors, memory, firmware and kernel as the set's C(vm.json) has them, and
        its disks on devices like their own. KVM is used where the VM had it and its user may use it. An option that is
        given here replaces the same option of the set.
      - Only a network and C(-daemonize) are refused here. Nothing else is checked. Files that it names are opened by
        O(boot_user).
    type: list
    elements: str
    default: []
  boot_files:
    description:
      - Files and directories of this machine that a set may name as kernel, initrd, device tree or firmware.
      - Without this option, a set may only name files in the directories that distributions have for firmware, such as
        C(/usr/share/OVMF). Everybody who can write to the repository can change C(vm.json), and the guest sees the
        files that it names.
    type: list
    elements: path
    default: []
  boot_user:
    description:
      - The user that throwaway VMs run as. The default is V(nobody) for root, and for all others themselves.
      - QEMU gets all images as open files, so this user needs no right to read them. The user must be able to start
        QEMU.
      - In a container whose only user is V(root), use V(root). Outside the container, this is the user who owns it.
    type: str
  qemu:
    description: The path of QEMU. The default is the C(qemu-system-) of this machine's architecture.
    type: path
  tmpdir:
    description:
      - The directory for the overlays and sockets of throwaway VMs. What a VM writes while it starts has to fit in. The
        VM is stopped before it takes the last 128 MiB.
    type: path
    default: /var/tmp
notes:
  - Throwaway VMs run one after the other, with a low priority. Each takes as much memory as the VM that was backed up.
    It is not started if that is more than three quarters of the available memory. Then give it less with
    O(boot_options).
  - A throwaway VM has no network. C(-sandbox) confines its QEMU, which can open no file. A value in C(vm.json) that no
    VM of QEMU or libvirt has is refused.
  - A disk that is not in the set is missing in the throwaway VM, too.
  - If a VM cannot be started for a reason outside the set, such as a kernel that is missing on this machine, the
    module fails, and the set counts as verified up to V(image).
seealso:
  - module: vmfleet.backup.backup_info
  - module: vmfleet.backup.backup_restore
  - ref: ansible_collections.vmfleet.backup.docsite.verifying
    description: What each depth finds, and what to do when a set is not good.
"""

EXAMPLES = r"""
- name: Read the newest set of every VM, and compare it with what was written
  vmfleet.backup.backup_verify:
    repository: /srv/backup

- name: Show that web01 starts from its backup
  vmfleet.backup.backup_verify:
    repository: /srv/backup
    names:
      - web01
    depth: boot
    boot_timeout: 300

- name: The same for a guest without an agent, with less memory and more processors than it has
  vmfleet.backup.backup_verify:
    repository: /srv/backup
    names:
      - web01
    depth: boot
    boot_agent: false
    boot_pattern: "login: *$"
    boot_options:
      - -m
      - 1G
      - -smp
      - "4"
"""

RETURN = r"""
results:
  description: What was found, for each disk of each set.
  returned: always
  type: list
  elements: dict
  contains:
    vm:
      description: The VM.
      type: str
    id:
      description: The set.
      type: str
    disk:
      description: The disk. Empty for what concerns the set as a whole, and for the start of a VM from it.
      type: str
    depth:
      description: The depth of the check. If the check found damage, the depth that found it.
      type: str
    ok:
      description: Whether all is well.
      type: bool
    error:
      description: What is wrong, and what to do. Empty if the disk is good.
      type: str
    note:
      description: What could not be checked, such as an image that was made without a checksum.
      type: str
    console:
      description: The last lines on the console of a VM that gave no sign of life.
      returned: with O(depth=boot), for the start
      type: list
      elements: str
  sample:
    - vm: web01
      id: "2026-11-22"
      disk: system
      depth: checksum
      ok: true
      error: ""
      note: ""
bad:
  description: The sets that are not good, as C(VM/ID).
  returned: always
  type: list
  elements: str
  sample:
    - web01/2026-11-22
headline:
  description: How many sets are good, to be read by people.
  returned: always
  type: str
  sample: 11 of 12 sets are good
text:
  description: What was found, to be read by people, first what is not good.
  returned: always
  type: list
  elements: str
  sample:
    - good      web01/2026-11-30  vda, vdb
"""

import os
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, warn
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import make_module
from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import Selection, selection_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.qemu_img import require_qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import DEPTHS, Depth
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import check_set_id
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.vm_names import unknown_vms
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot import find_qemu
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_options import BootOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.cage import find_user
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import (
    VerifyOptions,
    bad_sets,
    describe,
    headline,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.verify import has_sets, known_vms, verify_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
    from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import Finding

MAX_ERRORS = 5
"""Errors that the message tells; C(results) has them all."""


def boot_options(params: dict[str, Any]) -> BootOptions:
    options = BootOptions(
        qemu=find_qemu(params["qemu"] or ""),
        tmpdir=params["tmpdir"],
        timeout=params["boot_timeout"],
        pattern=params["boot_pattern"] or "",
        agent=params["boot_agent"],
        extra=tuple(params["boot_options"]),
        files=tuple(params["boot_files"]),
        user=find_user(params["boot_user"] or "", os.geteuid()),
    )
    options.check()
    return options


def chosen_vms(repository: Repository, selection: Selection) -> list[str]:
    """Return the VMs that are asked for; Refused where one has no sets."""
    names = selection.spelled_out(lambda: known_vms(repository))
    unknown = [name for name in names if not has_sets(repository, name)] if selection.names else []
    if unknown:
        raise unknown_vms(unknown, known_vms(repository), repository.path)
    return names


def error_message(bad: Sequence[Finding]) -> str:
    told = "; ".join(finding.full_text for finding in bad[:MAX_ERRORS])
    more = f"; and {len(bad) - MAX_ERRORS} more, see results" if len(bad) > MAX_ERRORS else ""
    return f"sets that are not good: {len(bad_sets(bad))}: {told}{more}"


async def main_task(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    depth = Depth(params["depth"])
    set_id = "" if params["id"] is None else check_set_id(params["id"])
    if depth in (Depth.IMAGE, Depth.BOOT):
        require_qemu_img()
    options = VerifyOptions(depth, boot_options(params) if depth == Depth.BOOT else None, module.check_mode)
    await probe_if_there(params["repository"], writing=not module.check_mode)
    repository = open_repository(params["repository"], params["trust_others"])
    names = chosen_vms(repository, Selection.of(params))
    if not names:
        warn(module, f"there are no sets in {repository.path}, and so nothing was verified")
    findings, warnings = await verify_all(repository, names, set_id, options)
    for warning in warnings:
        warn(module, warning)
    result = {
        "changed": False,
        "results": [finding.result() for finding in findings],
        "bad": bad_sets(findings),
        "headline": headline(findings),
        "text": describe(findings),
    }
    bad = [finding for finding in findings if finding.error]
    if bad:
        raise BackupError(error_message(bad), **result)
    return result


def main() -> None:
    module = make_module(
        argument_spec={
            "repository": {"type": "path", "required": True},
            "trust_others": {"type": "bool", "default": False},
            **selection_argument_spec(),
            "id": {"type": "str"},
            "depth": {"type": "str", "choices": list(DEPTHS), "default": "checksum"},
            "boot_timeout": {"type": "int", "default": 120},
            "boot_agent": {"type": "bool", "default": True},
            "boot_pattern": {"type": "str"},
            "boot_options": {"type": "list", "elements": "str", "default": []},
            "boot_files": {"type": "list", "elements": "path", "default": []},
            "boot_user": {"type": "str"},
            "qemu": {"type": "path"},
            "tmpdir": {"type": "path", "default": "/var/tmp"},
        },
        supports_check_mode=True,
    )
    run_in_worker(module, main_task, module.params["repository"], writing=not module.check_mode)


if __name__ == "__main__":
    main()

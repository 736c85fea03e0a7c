# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._report.fleet_status import fleet_status

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DOCUMENTATION = r"""
name: fleet_status
short_description: Make one table of the backups of a fleet
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Puts together what M(vmfleet.backup.backup_info) and M(vmfleet.backup.vm_info) have found on each hypervisor. The
    role P(vmfleet.backup.vm_backup#role) uses it to show the status of a fleet.
  - Hypervisors that share a repository have the same V(vmfleet.json). In a shared repository, a VM is the matter of the
    hypervisor that has it, and of the first one if none has.
positional: _input
options:
  _input:
    description:
      - For each hypervisor its C(name) and C(repository), the content of the C(file) V(vmfleet.json), and
        C(found), which is what M(vmfleet.backup.backup_info) has returned.
      - What VMs there should be is said by C(vms) and C(sockets), as M(vmfleet.backup.backup_plan) takes them, and by
        C(running), which is RV(vmfleet.backup.vm_info#module:vms). C(names) and
        C(exclude_names) limit it to some of them.
    type: list
    elements: dict
    required: true
  max_age:
    description: The age that the newest good set of a VM may have, such as V(26h), V(2d) or V(1w). Empty for any.
    type: str
    default: ""
  silent:
    description: The hypervisors that could not be asked.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show the VMs, those first that have no recent good set
  vmfleet.backup.show:
    text: "{{ ([here] | vmfleet.backup.fleet_status(max_age='26h')).text }}"
  vars:
    here:
      name: "{{ inventory_hostname }}"
      repository: /srv/backup
      file: "{{ file.content }}"
      found: "{{ found }}"
      vms: []
      sockets:
        - /run/vmfleet-monitors/*.qmp
      running: "{{ running.vms }}"
      names: []
"""

RETURN = r"""
_value:
  description: The status.
  type: dict
  contains:
    text:
      description: The table, to be read by people.
      type: list
      elements: str
    bad:
      description: By the name of a hypervisor, its VMs that have no good set of that age.
      type: dict
    unknown:
      description: The names that are asked for, and that no hypervisor knows.
      type: list
      elements: str
    known:
      description: The VMs that the hypervisors know.
      type: list
      elements: str
"""


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"fleet_status": fleet_status}

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._report.fleet_summary import fleet_summary

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DOCUMENTATION = r"""
name: fleet_summary
short_description: Summarize a backup run of a fleet
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Makes one summary of what the role P(vmfleet.backup.vm_backup#role) has noted of each hypervisor. The role uses it,
    and it reads the internal variables of that role.
positional: _input
options:
  _input:
    description: The variables of all hosts, which are C(hostvars).
    type: dict
    required: true
  hosts:
    description: All hosts of the play, which are C(ansible_play_hosts_all).
    type: list
    elements: str
    required: true
  active:
    description: The hosts that are still in the play, which are C(ansible_play_hosts).
    type: list
    elements: str
    required: true
  id:
    description: The id of the sets.
    type: str
    required: true
  use:
    description:
      - The use of the role that is summed up, with C(repository) and C(number). Without it, all hosts take part.
    type: dict
  inventories:
    description: The inventories of this run, for the command that repeats it.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show how the fleet has fared
  vmfleet.backup.show:
    text: "{{ found.text }}"
  vars:
    found: "{{ hostvars | vmfleet.backup.fleet_summary(ansible_play_hosts_all, ansible_play_hosts, id='2026-11-22') }}"
  run_once: true
"""

RETURN = r"""
_value:
  description: The summary.
  type: dict
  contains:
    unknown:
      description: The names of VMs that were asked for and that no hypervisor knows.
      type: list
      elements: str
    hosts:
      description: The hypervisors that it is about.
      type: list
      elements: str
    text:
      description: The summary, to be read by people.
      type: list
      elements: str
    hypervisors:
      description: What M(vmfleet.backup.backup_report) takes under this name.
      type: dict
    errors:
      description: What M(vmfleet.backup.backup_report) takes under this name.
      type: dict
    pending:
      description: What M(vmfleet.backup.backup_report) takes under this name.
      type: list
      elements: str
"""


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"fleet_summary": fleet_summary}

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep a play from succeeding because it has no hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: hypervisors
short_description: Refuse a pattern that matches no host
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Returns a pattern for C(hosts) of a play. Fails if no host of the inventory matches it, or none that C(--limit)
    leaves.
  - Ansible itself skips a play without hosts, and succeeds. Then a name that was mistyped looks like a backup.
options:
  _terms:
    description: The pattern.
    type: list
    elements: str
    required: true
seealso:
  - plugin: ansible.builtin.inventory_hostnames
    plugin_type: lookup
"""

EXAMPLES = r"""
- name: Back up virtual machines
  hosts: "{{ lookup('vmfleet.backup.hypervisors', 'hypervisors') }}"
  gather_facts: false
  roles:
    - vmfleet.backup.vm_backup
"""

RETURN = r"""
_raw:
  description: The pattern.
  type: list
  elements: str
"""

from typing import TYPE_CHECKING

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager, split_host_pattern
from ansible.plugins.lookup import LookupBase

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class LookupModule(LookupBase):
    """The groups of a play are among its variables; an inventory of them alone is what patterns are matched with."""

    def run(self, terms: list[str], variables: Mapping[str, Any] | None = None, **_options: Any) -> list[str]:
        """Return the patterns as they are; AnsibleError where one matches no host."""
        if context.CLIARGS.get("syntax"):
            # That needs no inventory.
            return terms
        given = variables or {}
        inventory = InventoryManager(self._loader, parse=False)
        for group, hosts in given.get("groups", {}).items():
            inventory.add_group(group)
            for host in hosts:
                inventory.add_host(host, group=group)
        limit = given.get("ansible_limit") or ""
        # A file of hosts (@file) has been read by Ansible.
        left = _matching(inventory, limit if "@" not in limit else "all")
        for pattern in terms:
            found = _matching(inventory, pattern)
            if not found:
                raise AnsibleError(
                    f"no host of the inventory matches {pattern!r}, so nothing was done. Check the inventory (-i), or"
                    " name the hosts with -e vm_backup_hosts=PATTERN."
                )
            if not found & left:
                raise AnsibleError(
                    f"none of the hosts that match {pattern!r} is left by --limit {limit}, so nothing was done."
                )
        return terms


def _matching(inventory: InventoryManager, pattern: str) -> set[str]:
    return {host.name for host in inventory.get_hosts(split_host_pattern(pattern or "all"))}

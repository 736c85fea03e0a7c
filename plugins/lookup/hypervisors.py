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

from pathlib import Path
from typing import TYPE_CHECKING

from ansible import context
from ansible.errors import AnsibleError
from ansible.inventory.manager import split_host_pattern
from ansible.plugins.loader import lookup_loader
from ansible.plugins.lookup import LookupBase

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


def _spelled_out(limit: str) -> Iterator[str]:
    """Yield the patterns of C(--limit), with those of a file (@file) in its place, as Ansible reads them."""
    for pattern in split_host_pattern(limit):
        if pattern.startswith("@"):
            lines = Path(pattern[1:]).read_text(encoding="utf-8").splitlines()
            yield from (line.strip() for line in lines if line.strip())
        else:
            yield pattern


class LookupModule(LookupBase):
    """What a pattern matches, ansible.builtin.inventory_hostnames tells."""

    def run(self, terms: list[str], variables: Mapping[str, Any] | None = None, **_options: Any) -> list[str]:
        """Return the patterns as they are; AnsibleError where one matches no host."""
        if context.CLIARGS.get("syntax"):
            # That needs no inventory.
            return terms
        given = {"groups": {}, **(variables or {})}
        limit = given.get("ansible_limit") or ""

        def matching(pattern: str) -> set[str]:
            lookup = lookup_loader.get(
                "ansible.builtin.inventory_hostnames", loader=self._loader, templar=self._templar
            )
            return set(lookup.run(split_host_pattern(pattern), given))

        left = matching(",".join(_spelled_out(limit)) or "all")
        for pattern in terms:
            found = matching(pattern)
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

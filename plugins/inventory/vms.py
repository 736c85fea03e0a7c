# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Give Ansible the VMs of the last runs as hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vms
short_description: Make hosts of VMs, with the state of their backups
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Makes a host of each VM in the reports of the playbook C(vmfleet.backup.backup), with and without a set. Plays can
    loop over the VMs that lack a backup, and groups can be made of them.
  - Reads the reports that the backup has written where C(vm_backup_report_dir) says. It asks no hypervisor, so it
    shows the state after the last run.
  - The name of the file has to end in C(vms.yml) or C(vms.yaml).
notes:
  - A host is called after the directory of its VM in a repository, which is the name of the VM where that is made of
    letters, digits, C(.), C(_) and C(-). Where VMs of several hypervisors have the same name, or where it is that of a
    hypervisor or a group, it is C(VM@HYPERVISOR).
  - All of them are in the group C(vmfleet_vms). C(all:!vmfleet_vms) are the other hosts.
  - The last 30 reports are read. For each hypervisor, the last report with a result counts. A VM that was not in that
    run keeps the values of an earlier report.
  - Results of hypervisors are never evaluated as templates.
extends_documentation_fragment:
  - constructed
  - inventory_cache
options:
  plugin:
    description: Says that the file is for this plugin.
    type: str
    required: true
    choices: [vmfleet.backup.vms]
  report_dir:
    description:
      - The directory of the reports on the controller, as C(vm_backup_report_dir) names it. An absolute path, or one
        that begins with C(~).
    type: str
    required: true
  trust_others:
    description: Read reports that others than root and you can change.
    type: bool
    default: false
seealso:
  - ref: ansible_collections.vmfleet.backup.docsite.monitoring.inventory
    description: The variables of the hosts, and a play that backs up the VMs that lack a set.
"""

EXAMPLES = r"""
# backup.vms.yml
plugin: vmfleet.backup.vms
report_dir: /srv/reports
groups:
  # No good set at all, or none of the last 26 hours.
  without_backup: not vmfleet_newest or vmfleet_age > 26 * 3600
  never_verified: vmfleet_newest and not vmfleet_verified_at
keyed_groups:
  - key: vmfleet_hypervisor
    prefix: vms_of
compose:
  vmfleet_age_hours: (vmfleet_age // 3600) if vmfleet_newest else none
"""

import contextlib
import os
from typing import TYPE_CHECKING

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable, Constructable
from ansible.utils.unsafe_proxy import wrap_var

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import DocumentError
from ansible_collections.vmfleet.backup.plugins.plugin_utils._vm_facts import (
    ALL_FACTS,
    host_names,
    read_reports,
    vm_facts,
    with_age,
)

if TYPE_CHECKING:
    from typing import Any

    from ansible.inventory.data import InventoryData
    from ansible.parsing.dataloader import DataLoader

GROUP = "vmfleet_vms"
PREFIX = "vmfleet_"
HERE = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of the controller: a host of such a name would change how tasks are delegated to it."""


class InventoryModule(BaseInventoryPlugin, Constructable, Cacheable):
    """The VMs of the last runs."""

    NAME = "vmfleet.backup.vms"

    def verify_file(self, path: str) -> bool:
        """Tell whether a file is for this plugin."""
        base: Any = super()
        return bool(base.verify_file(path)) and path.endswith(("vms.yml", "vms.yaml"))

    def parse(self, inventory: InventoryData, loader: DataLoader, path: str, cache: bool = True) -> None:
        """Add the hosts. AnsibleParserError where there are no reports."""
        super().parse(inventory, loader, path)
        self._read_config_data(path)
        vms = [with_age(vm) for vm in self._all_facts(path, cache)]
        group = inventory.add_group(GROUP)
        for name in self.get_option("groups"):
            # A play can ask for one that no VM is in.
            inventory.add_group(self._sanitize_group_name(name))
        for host, vm in zip(host_names(vms, {*HERE, *inventory.groups}), vms):
            inventory.add_host(host, group=group)
            facts = wrap_var({f"{PREFIX}{name}": value for name, value in vm.items()})
            for name, value in facts.items():
                inventory.set_variable(host, name, value)
            self._construct(host, facts)

    def _construct(self, host: str, facts: dict[str, Any]) -> None:
        """Add the variables and groups that the file asks for."""
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), facts, host, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), facts, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), facts, host, strict=strict)

    def _all_facts(self, path: str, cache: bool) -> list[dict[str, Any]]:
        """Return what is known of each VM, from the cache where that is wanted, and holds it."""
        key, caches = self.get_cache_key(path), self.get_option("cache")
        if caches and cache:
            # It may have run out, be of an earlier release, or have been changed by hand.
            with contextlib.suppress(KeyError, DocumentError):
                return list(ALL_FACTS.read(self._cache[key]))
        found = self._read()
        if caches:
            self._cache[key] = found
        return found

    def _read(self) -> list[dict[str, Any]]:
        """Return what the reports tell of each VM. AnsibleParserError where there are none."""
        try:
            directory = os.path.expanduser(self.get_option("report_dir"))
            reports, left_out = read_reports(directory, self.get_option("trust_others"))
        except BackupError as error:
            raise AnsibleParserError(str(error)) from error
        for reason in left_out:
            self.display.warning(reason)
        return vm_facts(reports)

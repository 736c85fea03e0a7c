# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the option that names a VM's monitor; its argument spec is in C(module_utils/_common/argument_specs.py)."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  monitor:
    description:
      - The VM's QMP monitor, as V(unix:/run/vmfleet-monitors/web01.qmp), as a path alone, or V(tcp:127.0.0.1:4444).
      - V(libvirt:web01) is the domain C(web01) of O(libvirt_uri). libvirt holds its monitor and passes the commands.
        Everything after the first colon is the name.
      - A monitor serves one client at a time. The module uses it only for moments, and never while it waits for a job,
        so other clients can use it, too.
      - File descriptors can be passed over a UNIX socket, and by libvirt. Over TCP, QEMU itself must be able to open
        the target.
    type: str
    required: true
requirements:
  - qemu.qmp >= 0.0.4 (Python library) on the hypervisor
notes:
  - Runs on the hypervisor, with Python 3.8 or later.
"""

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the option that says which libvirt is meant; its spec is in C(module_utils/_common/argument_specs.py)."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  libvirt_uri:
    description:
      - The libvirt that has the domains, V(qemu:///system) or V(qemu:///session). The URI can name another socket, as
        V(qemu+unix:///session?socket=/home/u/.cache/libvirt/libvirt-sock).
      - For root, V(qemu:///session) is V(qemu:///system).
      - A libvirt of another machine is refused. Back up its domains on that machine.
    type: str
    default: qemu:///system
requirements:
  - libvirt >= 8.2 (Python library, the package python3-libvirt) on the hypervisor, for domains of libvirt
"""

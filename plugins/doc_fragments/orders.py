# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the options that order what a backup does not do unasked."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  takeover:
    description:
      - Remove the unfinished set of another hypervisor, or of another VM with the same name, and make a new one.
      - Use this only if that hypervisor or VM will never return. This does not stop what still runs elsewhere, but its
        work is lost.
    type: bool
    default: false
  supersede:
    description:
      - Cancel an unfinished set of the same VM with another id. By default that set is completed first.
    type: bool
    default: false
  adopt:
    description:
      - Continue in the directory of a VM that had the same name and another uuid. The next set is full. Use this for a
        VM that replaces the earlier one, for example after it was built again.
    type: bool
    default: false
"""

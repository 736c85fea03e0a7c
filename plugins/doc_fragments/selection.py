# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the options that choose VMs; their spec is in C(module_utils/_common/selection.py)."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  names:
    description:
      - Only these VMs, by their names in the repository or by patterns such as V(web*). The default is all of them.
      - The module fails if there is no VM with one of the names.
    type: list
    elements: str
  exclude_names:
    description:
      - Leave out these VMs, by their names in the repository or by patterns such as V(test-*).
    type: list
    elements: str
"""

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
      - Remove what another hypervisor, or another VM of the same name, is making under the VM's name, and go on.
      - Only for one that is gone for good. What still runs elsewhere is not stopped by this, but its work is lost.
    type: bool
    default: false
  supersede:
    description:
      - Cancel a set of another id of the same VM that is unfinished. Otherwise it is brought to its end first.
    type: bool
    default: false
  adopt:
    description:
      - Go on in the directory of a VM of the same name that had another uuid, with a full set. This is for a VM that
        has taken the place of the one before, such as one that was built anew.
    type: bool
    default: false
"""

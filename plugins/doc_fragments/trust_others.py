# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe the option that allows directories which others may write to."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  trust_others:
    description:
      - Write into a repository, or a directory of reports or metrics, that others than root and the user who runs this
        can change. It belongs to somebody else, or its group or everybody may write to it. The same goes for the file
        C(vmfleet.json) and the directories of VMs.
      - By default that is refused, since others could exchange there what is written. M(vmfleet.backup.backup_restore)
        and M(vmfleet.backup.backup_verify) read such a repository all the same. They note nothing beside its sets, and
        warn of that.
      - A mount of SMB, vfat or FUSE shows the owner and the permissions that its options say. It is better to mount it
        so that root alone may write than to allow this.
    type: bool
    default: false
"""

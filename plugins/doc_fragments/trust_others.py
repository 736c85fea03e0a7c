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
      - Write into a repository, or into a directory of reports or metrics, that users other than root and the user of
        the module can change, because it belongs to somebody else, or because its group or everybody may write to it.
        The same is true for the file C(vmfleet.json) and the directories of VMs.
      - By default such a directory is refused, because others could replace the files there.
        M(vmfleet.backup.backup_restore) and M(vmfleet.backup.backup_verify) still read such a repository. They note
        nothing beside its sets, and warn of that.
      - A mount of SMB, vfat or FUSE shows the owner and the permissions that its options set. Better mount it so that
        only root may write than allow this.
    type: bool
    default: false
"""

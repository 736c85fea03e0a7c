# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Attributes that the modules of the collection declare."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying the target.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change in C(check_mode), when in diff mode.
    support: full
  idempotent:
    description:
      - When run twice in a row outside check mode with the same arguments, the second invocation indicates no change.
    support: full
  platform:
    description: Target operating systems that can be operated against.
    support: full
    platforms: Linux
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode); it only reads.
    support: full
  diff_mode:
    description: Has no differences to show, since it changes nothing.
    support: N/A
  idempotent:
    description: Reads only, so that it can be run at any time, any number of times.
    support: full
  platform:
    description: Target operating systems that can be operated against.
    support: full
    platforms: Linux
"""

    ACTION = r"""
options: {}
attributes:
  action:
    description: Has an action plugin of the same name, which runs on the controller.
    support: full
    details:
      - It calls the module again and again while O(state=completed) waits, and shows what has happened.
  async:
    description: Supports being used with the C(async) keyword.
    support: full
    details:
      - The module is called once then, and nothing is shown.
"""

    ACTIONGROUP_BACKUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/vmfleet.backup.backup) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - vmfleet.backup.backup
"""

    ACTIONGROUP_REPOSITORY = r"""
options: {}
attributes:
  action_group:
    description:
      - Use C(group/vmfleet.backup.repository) in C(module_defaults) to set O(repository) for all modules that have
        this option.
    support: full
    membership:
      - vmfleet.backup.backup
      - vmfleet.backup.repository
"""

    ACTIONGROUP_MONITOR = r"""
options: {}
attributes:
  action_group:
    description:
      - Use C(group/vmfleet.backup.monitor) in C(module_defaults) to set O(monitor) for all modules that have
        this option.
    support: full
    membership:
      - vmfleet.backup.backup
      - vmfleet.backup.monitor
"""

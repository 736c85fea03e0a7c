# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: show
short_description: Show plans and reports as plain text
description:
  - Shows lines on the terminal of the controller, without quotes. The modules of this collection return such lines, for
    instance in RV(vmfleet.backup.backup_plan#module:text).
  - A line that is longer than the terminal is wrapped, and continues below its last column. Output to a file or a pipe
    is not wrapped. The environment variable E(COLUMNS) sets a width there.
  - Lines that tell of a failure have the colour of an error.
  - Nothing is shown where the output is for programs, as with the callbacks C(json) and C(jsonl). They get the lines as
    a result.
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
attributes:
  action:
    description: Is an action plugin, which runs on the controller. Nothing is executed on the host.
    support: full
  check_mode:
    description: Can run in C(check_mode); it only shows.
    support: full
  diff_mode:
    description: Has no differences to show, since it changes nothing.
    support: N/A
options:
  text:
    description:
      - The lines.
    type: list
    elements: str
    default: []
  error:
    description:
      - Fail with this sentence, when the lines are shown. An empty one does not fail.
    type: str
    default: ""
seealso:
  - module: ansible.builtin.debug
  - module: ansible.builtin.fail
"""

EXAMPLES = r"""
- name: Look at the VMs of this hypervisor
  vmfleet.backup.backup_plan:
    repository: /srv/backup
    domains: ["*"]
  register: planned

- name: Show what would be done
  vmfleet.backup.show:
    text: "{{ planned.text }}"
"""

RETURN = r"""
text:
  description: The lines, as they were given.
  returned: success
  type: list
  elements: str
  sample:
    - "Backup 2026-11-22 to /srv/backup"
"""

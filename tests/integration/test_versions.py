# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests run with is what tools/with has put in the place of the machine's own."""

from __future__ import annotations

import os
import subprocess
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.playbooks import HYPERVISOR_PYTHON, Hypervisor

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

PLAYBOOK = """
- hosts: hv1
  gather_facts: false
  tasks:
    - ansible.builtin.command: sh -c 'readlink -f /proc/$PPID/exe'
      register: found
    - ansible.builtin.debug:
        msg: "by {{ found.stdout }}"
"""


def test_modules_are_run_by_the_hypervisors_python(directory: Path) -> None:
    (directory / "which.yml").write_text(PLAYBOOK)
    play = Hypervisor(directory).play("which.yml")
    assert f"by {os.path.realpath(HYPERVISOR_PYTHON)}" in play.output, play.output


def test_qemu_and_its_tools_are_of_one_version(vms: Vms) -> None:
    version = vms.start(name="web01").qmp.execute("query-version")["qemu"]
    number = ".".join(str(version[part]) for part in ("major", "minor", "micro"))
    for tool in ("qemu-img", "qemu-nbd", "qemu-io"):
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        assert f" {number} " in said

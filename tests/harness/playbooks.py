# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs of the collection's playbooks, as a user has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing as t
from dataclasses import dataclass
from pathlib import Path

import yaml

from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets


@dataclass
class Play:
    """What one run of a playbook has printed."""

    rc: int
    output: str

    def recap(self, host: str = "hv1") -> dict[str, int]:
        [line] = re.findall(rf"^{host} .*$", self.output, re.MULTILINE)
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}


class Hypervisor:
    """A host `hv1` in an inventory of its own, and others that are this machine as well where `hosts` names them."""

    def __init__(self, directory: Path, hosts: t.Sequence[str] = ("hv1",)) -> None:
        self.directory = directory
        self.hosts = hosts
        self.sets = Sets(directory / "repository")
        self.variables: dict[str, t.Any] = {
            "vm_backup_repository": str(self.sets.path),
            "vm_backup_repository_create": True,
            "vm_backup_id": ID,
            "vm_backup_reserve": "0",
        }

    def run(self, *options: str, **variables: t.Any) -> Play:
        """Run the backup playbook with these variables, without their prefix."""
        return self.play("backup", *options, **variables)

    def play(self, playbook: str, *options: str, **variables: t.Any) -> Play:
        """Run one of the playbooks with these variables, without their prefix."""
        host = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            **self.variables,
            **{f"vm_backup_{name}": value for name, value in variables.items()},
        }
        inventory = self.directory / "inventory.yml"
        inventory.write_text(yaml.safe_dump({"hypervisors": {"hosts": dict.fromkeys(self.hosts), "vars": host}}))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(inventory)]
        done = subprocess.run(
            [*command, f"vmfleet.backup.{playbook}", *options],
            cwd=self.directory,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
                "ANSIBLE_HOME": str(self.directory / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return Play(done.returncode, done.stdout + done.stderr)

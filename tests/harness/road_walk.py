# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Walks through a page of README and guides on a newcomer's machines: does what it says, block by block."""

from __future__ import annotations

import re
import shlex
import typing as t
from datetime import UTC, datetime

import yaml

from ansible_collections.vmfleet.backup.tests.harness import road_tables as tables
from ansible_collections.vmfleet.backup.tests.harness.documented import DONE, PAGES, Block, blocks

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.road import Done, Machine, Road

WORK = "/root/walk"


class Walk:
    """The way through one page."""

    def __init__(self, road: Road, page: str, tarball: Path, group_variables: dict[str, t.Any]) -> None:
        self.page = page
        self.problems: list[str] = []
        """Commands that did not end as they should, with what they printed."""
        self._printed = ""
        self._tarball = tarball
        self._machines = dict(
            zip((tables.CONTROLLER, tables.HV01, tables.HV02), (road.controller, *road.hypervisors), strict=True)
        )
        for machine in self._machines.values():
            machine.run(f"rm -rf {WORK}; mkdir {WORK}")
            machine.directory = WORK
        home = tables.HOMES.get(page, "/root")
        road.controller.environment["HOME"] = home
        road.controller.run(f"mkdir -p {home}")
        self._write("ansible.cfg", configuration())
        self._write("group_vars/hypervisors/own.yml", yaml.safe_dump(group_variables))

    def go(self) -> None:
        """Do what the page says, to its end."""
        if self.page != tables.README:
            self._write("inventory.yml", inventory())
        for where, command in tables.BEFORE.get(self.page, []):
            done = self._machines[where].shell(command)
            assert done.rc == 0, f"before the page: {command}\n{done.output}"
        for block in blocks(PAGES[self.page]):
            if block.language == "console":
                for command in block.commands:
                    self._command(command)
            elif block.language in DONE:
                self._yaml(block)
            elif block.language == "text" and (self.page, block.text.splitlines()[0].split()[0]) in tables.SHOWN:
                self._shown(block)

    def _command(self, command: str) -> None:
        if (self.page, command) in tables.NOT_RUN:
            return
        where = tables.ELSEWHERE.get((self.page, command)) or (
            tables.CONTROLLER if command.startswith("ansible") else tables.WHERE.get(self.page, tables.HV01)
        )
        if (self.page, command) in tables.AGAIN:
            at, again = tables.AGAIN[self.page, command]
            self._run(self._machines[at], again)
        self._run(self._machines[where], command)

    def _run(self, machine: Machine, command: str) -> None:
        done: Done = machine.shell(self._substituted(command))
        rc, says = tables.ENDS.get((self.page, command), (0, ""))
        self._printed = done.output
        if done.rc != rc or says not in " ".join(done.output.split()):
            self.problems.append(f"$ {command}\nended with {done.rc}, and not with {rc} {says}:\n{done.output}")

    def _substituted(self, command: str) -> str:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for text, (instead, _reason) in tables.SUBSTITUTIONS.items():
            command = command.replace(text, instead.format(tarball=self._tarball, now=now))
        return command

    def _yaml(self, block: Block) -> None:
        """Use a block of YAML as what it is: an inventory, a playbook, tasks or variables."""
        if (self.page, block.text.splitlines()[0]) in tables.BLOCKS_NOT_RUN:
            return
        data = yaml.safe_load(block.text)
        controller = self._machines[tables.CONTROLLER]
        if isinstance(data, dict) and "hypervisors" in data:
            self._write("inventory.yml", block.text)
        elif isinstance(data, dict) and block.of_inventory:
            self._write("group_vars/hypervisors/text.yml", block.text)
        elif block.file and (isinstance(data, dict) or self._is_run_later(block.file)):
            self._write(block.file, block.text)
        elif isinstance(data, dict):
            self._write("vars.yml", block.text)
            self._run(controller, f"{tables.VERBS.get(self.page, tables.CHECK)} -e @vars.yml")
        else:
            playbook = block.file or "playbook.yml"
            if not any({"hosts", "ansible.builtin.import_playbook"} & set(play) for play in data):
                tasks = [*tables.TASKS_BEFORE.get(self.page, []), *data]
                play = {"name": "Tasks", "hosts": tables.HV01, "gather_facts": False, "tasks": tasks}
                self._write(playbook, yaml.safe_dump([play]))
            else:
                self._write(playbook, block.text)
            self._run(controller, f"ansible-playbook -i inventory.yml {playbook}")

    def _is_run_later(self, file: str) -> bool:
        return any(file in command for block in blocks(PAGES[self.page]) for command in block.commands)

    def _write(self, file: str, text: str) -> None:
        self._machines[tables.CONTROLLER].run(
            f'mkdir -p "$(dirname {shlex.quote(file)})" && cat > {shlex.quote(file)}', stdin=text
        )

    def _shown(self, block: Block) -> None:
        """What the text shows is what was printed, but for numbers, and for where lines break."""
        shown, printed = pattern(block.text), pattern(self._printed)
        if shown not in printed:
            self.problems.append(f"The text shows:\n{block.text}\nThe command has printed:\n{self._printed}")


def pattern(text: str) -> str:
    """Return a text without its numbers and their units, and without its line breaks."""
    return re.sub(r"\d[\d.:T-]*( (B|KiB|MiB|GiB|TiB|ms|s|min|h|d)\b)?", "#", " ".join(text.split()))


def configuration() -> str:
    """Return the configuration of Ansible that a guide advises."""
    return next(block.text for block in blocks(PAGES[tables.guide("fleets")]) if block.language == "ini")


def inventory() -> str:
    """Return the inventory of README."""
    return next(block.text for block in blocks(PAGES[tables.README]) if block.file == "inventory.yml")

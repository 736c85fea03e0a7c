# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs of the collection's playbooks, as a user has them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import subprocess
import sys
import typing as t
from dataclasses import dataclass
from pathlib import Path

import yaml

from ansible_collections.vmfleet.backup.tests.harness import binding
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces

# What runs the modules there; tools/with names another one than that of the tests.
HYPERVISOR_PYTHON = os.environ.get("VMFLEET_HYPERVISOR_PYTHON", sys.executable)


@dataclass
class Play:
    """What one run of a playbook has printed."""

    rc: int
    output: str

    def recap(self, host: str = "hv1") -> dict[str, int]:
        [line] = re.findall(rf"^{host} .*$", self.output, re.MULTILINE)
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}


class Hypervisor:
    """A host `hv1` in an inventory of its own, and others that are this machine as well where `hosts` names them.

    `hosts` may give them variables of their own.
    """

    def __init__(self, directory: Path, hosts: t.Collection[str] = ("hv1",), inside: NameSpaces | None = None) -> None:
        """The playbooks run in the name spaces `inside`, or where the tests run."""
        self._inside = inside
        self.directory = directory
        self.hosts = hosts
        self.sets = Sets(directory / "repository", inside)
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
        """Run one of the playbooks, or a file in the directory, with these variables, without their prefix."""
        with self._for_children():
            done = subprocess.run(
                self._command(playbook, *options, **variables),
                cwd=self.directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        return Play(done.returncode, done.stdout + done.stderr)

    @contextlib.contextmanager
    def on_terminal(self, playbook: str, *options: str, **variables: t.Any) -> t.Iterator[Screen]:
        """Run it on a terminal of its own, while the test goes on."""
        with self._for_children():
            screen = Screen(self._command(playbook, *options, **variables), self.directory, self._environment)
        with screen:
            yield screen

    def _for_children(self) -> contextlib.AbstractContextManager[None]:
        return self._inside.for_children() if self._inside else contextlib.nullcontext()

    def _command(self, playbook: str, *options: str, **variables: t.Any) -> list[str]:
        host = {
            "ansible_connection": "local",
            "ansible_python_interpreter": HYPERVISOR_PYTHON,
            **self.variables,
            **{f"vm_backup_{name}": value for name, value in variables.items()},
        }
        hosts = self.hosts if isinstance(self.hosts, dict) else dict.fromkeys(self.hosts)
        inventory = self.directory / "inventory.yml"
        inventory.write_text(yaml.safe_dump({"hypervisors": {"hosts": hosts, "vars": host}}))
        name = playbook if playbook.endswith(".yml") else f"vmfleet.backup.{playbook}"
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(inventory), name, *options]
        return self._inside.command(*command, directory=self.directory) if self._inside else command

    @property
    def _environment(self) -> dict[str, str]:
        return {
            # pytest-xdist gives its workers a width, to which lines would be wrapped.
            **{name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "COLUMNS"))},
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
            "PYTHONPATH": os.pathsep.join(python_path()),
            "ANSIBLE_HOME": str(self.directory / "ansible"),
            # Ansible writes there by $HOME, and looks for it in the password file's home: not always the same.
            "ANSIBLE_ASYNC_DIR": str(self.directory / "ansible" / "async"),
            "ANSIBLE_NOCOLOR": "1",
        }


def python_path() -> list[str]:
    """Return where Python looks in a playbook's run, before its own libraries."""
    given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    # The files are for one version of Python only, and another one may have a binding of its own.
    return [*given, str(binding.directory())] if sys.executable == HYPERVISOR_PYTHON else given


class Screen:
    """A program on a terminal."""

    def __init__(self, command: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.text = ""
        self._fd, terminal = os.openpty()
        self._process = subprocess.Popen(
            # Tests that a shell runs in the background ignore Ctrl-C, and this would inherit it.
            ["env", "--default-signal=INT", *command],
            cwd=directory,
            env=environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def wait_for(self, pattern: str) -> str:
        """Read until a line matches; returns that line."""

        def found() -> re.Match[str] | None:
            self._read()
            return re.search(f"^.*(?:{pattern}).*$", self.text, re.MULTILINE)

        return wait_until(found, f"{pattern!r} on the screen", 3 * PATIENCE)[0]

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> Play:
        """Wait for its end."""

        def ended() -> bool:
            return not self._read() and self._process.poll() is not None

        wait_until(ended, "the end of the playbook", 3 * PATIENCE)
        return Play(self._process.returncode, self.text)

    def _read(self) -> bool:
        """Take in what is there; whether there was something."""
        ready, _write, _error = select.select([self._fd], [], [], 0)
        if not ready:
            return False
        try:
            piece = os.read(self._fd, 1 << 16)
        except OSError as error:
            # That is how a terminal says that nobody has it open any more.
            if error.errno != errno.EIO:
                raise
            return False
        self.text += piece.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(piece)

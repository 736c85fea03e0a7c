# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What people and programs see of the lines that are shown, by the real ansible-playbook."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from pathlib import Path

LINES = [
    "Backup s1 of hv01 in /srv/backup: 1 of 2 VMs have their set",
    'published  db01   full, "quoted", /srv/backup/db01/s1',
    "failed     web01  the target is full: " + "much of it is needed by others " * 5,
]


def playbook(directory: Path, **options: Any) -> list[str]:
    path = directory / "show.yml"
    task = {"name": "Show", "vmfleet.backup.show": options}
    path.write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}]))
    return [str(os.path.join(os.path.dirname(sys.executable), "ansible-playbook")), str(path)]


def run(directory: Path, environment: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        playbook(directory, **options),
        env={**env, "ANSIBLE_LOCALHOST_WARNING": "false", **(environment or {})},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )


def on_terminal(directory: Path, columns: int, **options: Any) -> str:
    """Return what ansible-playbook writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    colours = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "ANSIBLE_NOCOLOR")
    }
    process = subprocess.Popen(
        playbook(directory, **options),
        env={**colours, "TERM": "xterm", "ANSIBLE_LOCALHOST_WARNING": "false"},
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.STDOUT,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            # That is how the end of a terminal reads on Linux.
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n")


def test_a_file_gets_whole_lines_without_quotes(tmp_path: Path) -> None:
    done = run(tmp_path, text=LINES)
    assert done.returncode == 0, done.stderr
    assert "\n".join(LINES) in done.stdout


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_a_terminal_gets_lines_that_fit_and_failures_in_red(tmp_path: Path, columns: int) -> None:
    shown = on_terminal(tmp_path, columns, text=LINES)
    red = [line for line in shown.splitlines() if "\x1b[0;31m" in line]
    assert red, shown
    assert red[0].startswith("\x1b[0;31mfailed     web01  the target is full")
    assert all(line.endswith("\x1b[0m") for line in red)
    plain = [line.replace("\x1b[0;31m", "").replace("\x1b[0m", "") for line in red]
    assert max(map(len, plain)) <= columns
    assert " ".join(" ".join(plain).split()) == " ".join(LINES[2].split())
    assert LINES[1] in shown


def test_a_sentence_fails_without_the_lines_of_the_role(tmp_path: Path) -> None:
    done = run(tmp_path, text=LINES[:1], error="hv01: no set of web01. The reasons are above.")
    assert done.returncode == 2
    assert LINES[0] in done.stdout
    said = done.stdout + done.stderr
    assert "hv01: no set of web01. The reasons are above." in said
    for noise in ("Origin:", "^ column", "assertion", "evaluated_to", "Action failed", str(tmp_path)):
        assert noise not in said


def test_an_empty_sentence_does_not_fail(tmp_path: Path) -> None:
    assert run(tmp_path, error="").returncode == 0


JSONL = """
import json
from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "jsonl"

    def v2_runner_on_ok(self, result):
        self._display.display(json.dumps(result._result["text"]))
"""


def test_a_program_gets_nothing_but_its_json(tmp_path: Path) -> None:
    # As ansible.posix.jsonl does it, which does not come with ansible-core.
    (tmp_path / "jsonl.py").write_text(JSONL)
    done = run(tmp_path, {"ANSIBLE_STDOUT_CALLBACK": "jsonl", "ANSIBLE_CALLBACK_PLUGINS": str(tmp_path)}, text=LINES)
    assert json.loads(done.stdout) == LINES


def test_what_comes_from_a_guest_cannot_move_the_cursor(tmp_path: Path) -> None:
    done = run(tmp_path, text=["failed  web01  \x1b[2Jgone\u202e"])
    assert "\x1b" not in done.stdout
    assert "\\x1b[2Jgone" in done.stdout


def test_the_log_has_the_lines_without_colours(tmp_path: Path) -> None:
    environment = {"ANSIBLE_LOG_PATH": str(tmp_path / "log"), "ANSIBLE_FORCE_COLOR": "true"}
    done = run(tmp_path, environment, text=LINES)
    assert "\x1b[0;31mfailed" in done.stdout
    log = (tmp_path / "log").read_text()
    assert LINES[2] in log
    assert "\x1b" not in log


def test_nothing_is_shown_of_a_task_with_no_log(tmp_path: Path) -> None:
    command = playbook(tmp_path, text=LINES)
    found = yaml.safe_load((tmp_path / "show.yml").read_text())
    found[0]["tasks"][0]["no_log"] = True
    (tmp_path / "show.yml").write_text(yaml.safe_dump(found))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "db01" not in done.stdout


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, lines=LINES)
    assert done.returncode == 2
    assert "lines" in done.stdout + done.stderr

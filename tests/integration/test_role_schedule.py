# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Timers of systemd that run the playbooks. systemd itself says whether it understands them; it need not run here."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play

ROLE = Path(__file__).parents[2] / "roles" / "schedule"
INVENTORY = "/etc/ansible/in ventory.yml"
ODD = "/srv/my 50%/$HOME/\"prune\" 'b' \\x.yml"
JOBS: list[dict[str, t.Any]] = [
    {"name": "backup", "playbook": "vmfleet.backup.backup", "calendar": "*-*-* 01:00"},
    {"name": "prune", "playbook": ODD, "calendar": "Sun 12:00", "options": ["-e", "a=b c"]},
]
UNITS = ["vmfleet-backup.service", "vmfleet-backup.timer", "vmfleet-prune.service", "vmfleet-prune.timer"]


class Controller:
    """This machine, with a directory of units of its own."""

    def __init__(self, directory: Path) -> None:
        self.units = directory / "units"
        self.units.mkdir()
        self.directory = directory

    def run(self, *options: str, **variables: t.Any) -> Play:
        given = {"schedule_inventory": INVENTORY, "schedule_jobs": JOBS, **variables}
        (self.directory / "variables.yml").write_text(yaml.safe_dump(given))
        playbook = Path(sys.executable).with_name("ansible-playbook")
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c"),
                'mount --bind "$0" /etc/systemd/system && exec "$@"',
                *map(str, (self.units, playbook, "vmfleet.backup.schedule")),
                *("-e", f"@{self.directory / 'variables.yml'}", *options),
            ],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "COLUMNS"))},
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
                "ANSIBLE_HOME": str(self.directory / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
                # systemd does not run in a container. Its tools then do what they can, which is to write the links.
                "SYSTEMD_OFFLINE": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return Play(done.returncode, done.stdout + done.stderr)

    def changes(self, *options: str, **variables: t.Any) -> bool:
        """Run it, which has to succeed; tells whether it changed anything."""
        play = self.run(*options, **variables)
        assert play.rc == 0, play.output
        return play.recap("localhost")["changed"] > 0

    def names(self) -> list[str]:
        return sorted(path.name for path in self.units.iterdir() if path.is_file())

    def wanted(self) -> list[str]:
        """The timers that systemd starts at boot."""
        return sorted(path.name for path in self.units.glob("timers.target.wants/*"))

    def command(self, unit: str, name: str) -> str:
        """A command of a service, as systemd gives it to the program."""
        [line] = re.findall(rf"^{name}=-?(.*)$", (self.units / unit).read_text(), re.MULTILINE)
        return line.replace("%%", "%").replace("$$", "$")


@pytest.fixture
def controller(directory: Path) -> Controller:
    if not shutil.which("systemd-analyze"):
        pytest.fail("systemd-analyze is missing; tools/setup installs the package systemd")
    return Controller(directory)


def verified(units: Path) -> str:
    """What systemd has to say against the units."""
    paths = [str(path) for path in sorted(units.iterdir()) if path.is_file() and "@" not in path.name]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True, check=False
    )
    # It looks at units of this machine as well, and for programs that are not installed here.
    lines = done.stderr.splitlines()
    return "\n".join(line for line in lines if "vmfleet" in line and "is not executable" not in line)


def test_timers_are_made_once(controller: Controller) -> None:
    assert controller.changes("--check")
    assert controller.names() == []
    assert controller.changes()
    assert controller.names() == UNITS
    assert controller.wanted() == ["vmfleet-backup.timer", "vmfleet-prune.timer"]
    assert verified(controller.units) == ""
    assert not controller.changes()


def test_what_is_run(controller: Controller) -> None:
    controller.changes(schedule_environment={"ANSIBLE_CONFIG": '/etc/my "an\\sible" 5%.cfg'}, schedule_user="backup")
    service = (controller.units / "vmfleet-prune.service").read_text()
    assert 'Environment="ANSIBLE_CONFIG=/etc/my \\"an\\\\sible\\" 5%%.cfg"' in service
    assert "\nUser=backup\n" in service
    # Quoted for systemd, which reads words in double quotes as a shell does, as no sign for a variable is left.
    command = controller.command("vmfleet-prune.service", "ExecStart").replace("$", "\\$")
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines() == ["/usr/bin/ansible-playbook", "-i", INVENTORY, ODD, "-e", "a=b c"]


def test_jobs_that_are_not_wanted_any_more_go_and_others_stay(controller: Controller) -> None:
    other = controller.units / "vmfleet-of-somebody-else.service"
    other.write_text("[Service]\nExecStart=/bin/true\n")
    controller.changes(schedule_notify_command="/usr/local/bin/mail-me")
    assert controller.names() == sorted([*UNITS, other.name, "vmfleet-failed@.service"])
    assert "OnFailure=vmfleet-failed@%n.service" in (controller.units / "vmfleet-backup.service").read_text()
    assert controller.changes(schedule_jobs=JOBS[:1])
    assert controller.names() == sorted([*UNITS[:2], other.name])
    assert controller.wanted() == ["vmfleet-backup.timer"]
    assert controller.changes(schedule_state="absent")
    assert controller.names() == [other.name]
    assert controller.wanted() == []
    assert not controller.changes(schedule_state="absent")


@pytest.mark.parametrize(("status", "called"), [("0", "/job/0"), ("2", "/job/2"), ("TERM", "/job/fail")])
def test_a_service_that_watches_over_the_job_is_called(controller: Controller, status: str, called: str) -> None:
    calls: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            calls.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: t.Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/job/"
        controller.changes(schedule_jobs=[{**JOBS[0], "ping_url": url}])
        assert verified(controller.units) == ""
        for name in ("ExecStartPre", "ExecStopPost"):
            command = controller.command("vmfleet-backup.service", name)
            subprocess.run(["sh", "-c", command], env={**os.environ, "EXIT_STATUS": status}, check=True)
        server.shutdown()
    assert calls == ["/job/start", called]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"schedule_inventory": ""}, "schedule_inventory is missing. Give the path"),
        ({"schedule_inventory": "hosts.yml"}, "schedule_inventory is 'hosts.yml'. Give an absolute path."),
        ({"schedule_jobs": [{**JOBS[0], "name": "../x"}]}, "a name has letters, digits, _ and - only, unlike ../x"),
        ({"schedule_jobs": [JOBS[0], JOBS[0]]}, "each job needs a name of its own"),
        ({"schedule_jobs": [{**JOBS[0], "calendar": "at dawn"}]}, "at dawn"),
        ({"schedule_jobs": [{**JOBS[0], "ping_url": "http://a b"}]}, "ping_url is an address"),
        ({"schedule_jobs": [{**JOBS[0], "ping_url": "http://a';id;'"}]}, "ping_url is an address"),
    ],
    ids=str,
)
def test_bad_input_is_refused(controller: Controller, variables: dict[str, t.Any], said: str) -> None:
    play = controller.run(**variables)
    assert play.rc != 0, play.output
    assert said in play.output
    assert controller.names() == []


@pytest.mark.parametrize(
    "zone", ["Europe/Berlin", "Europe/London", "Europe/Helsinki", "America/New_York", "Australia/Sydney", "Asia/Tokyo"]
)
def test_each_night_has_a_day_of_its_own_in_utc(zone: str) -> None:
    """The default id is that day: a second run on it would make no sets."""
    [calendar] = {
        job["calendar"]
        for job in yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())["schedule_jobs"]
        if job["name"] == "backup"
    }
    done = subprocess.run(
        ["systemd-analyze", "calendar", "--base-time=2027-01-01 12:00", "--iterations=365", "--", calendar],
        env={**os.environ, "TZ": zone, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    days = re.findall(r"\(in UTC\): \w+ (\S+) ", done.stdout)
    assert len(days) == len(set(days)) == 365

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the demos share: what is seen on the terminal, playbooks as a user runs them, and the proof of a set."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness import guest as harness
from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.playbooks import python_path
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces

ROOT = Path(__file__).parents[4]

TERMINAL = sys.stdout.isatty()
COLOUR = TERMINAL and "NO_COLOR" not in os.environ
WIDTH = min(100, shutil.get_terminal_size().columns)

# Slow enough to watch it, and for the guest to write a lot meanwhile.
SPEED = "40M"
# What the guest writes between the two backups.
ROUNDS = 15
# Seconds from one look at a VM to the next.
PAUSE = 0.5

INVENTORY = """\
hypervisors:
  hosts:
    here:
      ansible_connection: local
      ansible_python_interpreter: "{{{{ ansible_playbook_python }}}}"
  vars:
    vm_backup_repository: {repository}
    vm_backup_repository_create: true
    vm_backup_quiesce: require
    vm_backup_speed: {speed}
{vms}"""
CONFIGURATION = """\
[defaults]
callback_result_format = yaml
collections_path = {root}
display_skipped_hosts = false
force_color = {colour}
home = {home}/ansible
remote_tmp = {home}/ansible
"""
PLAYBOOK = ["ansible-playbook", "-i", "inventory.yml"]


def paint(code: int, text: str) -> str:
    """Colour, where it can be seen and is wanted."""
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def say(text: str) -> None:
    """Print at once, over the progress line if there is one."""
    print(f"\r\033[K{text}" if TERMINAL else text, flush=True)


def heading(number: int, text: str) -> None:
    """Open a step."""
    say(f"\n{paint(36, str(number))}  {paint(1, text)}")


def check(holds: bool, what: str) -> None:
    """Show a fact, or end the demo where it is none."""
    assert holds, f"not so: {what}"
    say(f"   {paint(32, '✓')} {what}")


def digest(content: bytes) -> str:
    """The sha256, as sha256sum prints it."""
    return hashlib.sha256(content).hexdigest()


class Vm(t.Protocol):
    """A VM that is looked at while a playbook runs."""

    @property
    def block_jobs(self) -> list[dict[str, t.Any]]:
        """QEMU's block jobs."""

    @property
    def rounds(self) -> int:
        """How many rounds of writing its guest has finished."""

    def kill(self) -> None:
        """End it at once."""


class Progress:
    """A line on how far QEMU's block jobs and the guest are: always anew on a terminal, elsewhere now and then."""

    def __init__(self, guest: Vm | None, names: Sequence[str]) -> None:
        self._guest = guest
        self._names = names
        self._line = ""
        self._asked = 0.0
        self._due = 0.0
        self.rounds: list[int] = []
        """The guest's rounds while QEMU copied."""

    def show(self) -> None:
        """Ask QEMU and show it; the last line stays when the jobs are gone."""
        if self._guest is None or time.monotonic() < self._asked + PAUSE:
            return
        bars = []
        jobs = sorted(self._guest.block_jobs, key=lambda job: str(job["device"]))
        for disk, job in zip(self._names, jobs, strict=False):
            share = job["offset"] / (job["len"] or 1)
            done = round(12 * share)
            bars.append(f"{disk} {paint(32, '━' * done)}{paint(2, '─' * (12 - done))} {share:4.0%}  ")
        if bars:
            self.rounds.append(self._guest.rounds)
            self._line = f"   {''.join(bars)}guest: round {self.rounds[-1]}"
            if TERMINAL:
                # Cut off rather than wrapped where it is too long to be drawn over.
                print(f"\r\033[K\033[?7l{self._line}\033[?7h", end="", flush=True)
            elif time.monotonic() > self._due:
                say(self._line)
                self._due = time.monotonic() + 2
        elif self._line:
            say(self._line)
            self._line = ""
        self._asked = time.monotonic()


def lines(stream: t.IO[bytes]) -> t.Iterator[str]:
    """The lines of a program as they come, and an empty one whenever a moment has passed without any."""
    rest = b""
    while True:
        if not select.select([stream], [], [], 0.2)[0]:
            yield ""
            continue
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            return
        *complete, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in complete)


def fitted(line: str) -> str:
    """Ansible's line without what only fills it, so that it fits into the terminal."""
    line = re.sub(r" \*+$", "", line.replace("vmfleet.backup.vm_backup : ", ""))
    if line.startswith("TASK"):
        return textwrap.shorten(line, WIDTH - 6, placeholder=" ...]")
    if "unreachable=" in line:
        # In the recap's columns the padding of a coloured one is coloured too.
        line = re.sub(r" +(\033\[0m)", r"\1", line)
        return re.sub(r" (skipped|rescued|ignored)=0", "", re.sub(r" +", " ", line))
    return line


@dataclass(frozen=True)
class Stage:
    """Where the demo takes place."""

    home: Path
    """The directory with all that it makes."""
    vm: str
    """The name of the VM."""
    disks: Mapping[str, str]
    """By the names that they have in a set, what the guest calls its disks."""
    inside: NameSpaces | None = None
    """Where the playbooks run, if not here."""

    def write_files(self, vms: str) -> None:
        """Write what a user has to write, and show the inventory. C(vms) are the lines that name the VMs."""
        inventory = INVENTORY.format(repository=self.home / "repository", speed=SPEED, vms=textwrap.indent(vms, "    "))
        (self.home / "inventory.yml").write_text(inventory)
        configuration = CONFIGURATION.format(root=ROOT, colour=COLOUR, home=self.home)
        (self.home / "ansible.cfg").write_text(configuration)
        say("   All there is to write, with a limit on the speed so that you can watch:\n")
        say(paint(33, textwrap.indent(inventory, "     ")))


def run_playbook(stage: Stage, guest: Vm | None, verb: str, *variables: str, **settings: str) -> tuple[int, list[int]]:
    """Run a playbook and show what it prints; the changes in its recap, and the guest's rounds while QEMU copied."""
    command = [*PLAYBOOK, f"vmfleet.backup.{verb}"]
    shown = [" ".join(command), *(f"-e {variable}" for variable in variables)]
    say("   $ " + (" " if len(variables) < 2 else " \\\n       ").join(shown))
    command += [word for variable in variables for word in ("-e", variable)]
    progress = Progress(guest, tuple(stage.disks.values()))
    # What the user has set for Ansible is meant for other things; and it insists on UTF-8.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"LC_ALL": "C.UTF-8", "PYTHONPATH": os.pathsep.join(python_path())}
    if stage.inside:
        command = stage.inside.command(*command, directory=stage.home)
    with stage.inside.for_children() if stage.inside else contextlib.nullcontext():
        # In a session of its own, out of the way of the terminal's Ctrl-C: what then ends first is the guest.
        playbook = subprocess.Popen(
            command,
            cwd=stage.home,
            env=environment | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert playbook.stdout
    changes = 0
    try:
        for line in lines(playbook.stdout):
            if line:
                changes += sum(map(int, re.findall(r"changed=(\d+)", line)))
                say(f"   {paint(2, '│')} {fitted(line)}")
            progress.show()
    except BaseException:
        # Without its VM a playbook comes to an end by itself, and leaves nothing running.
        if guest:
            guest.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            playbook.wait(20)
        playbook.kill()
        raise
    assert playbook.wait() == 0, f"the playbook failed with {playbook.returncode}"
    return changes, progress.rounds


@dataclass(frozen=True)
class Backup:
    """One set. C(round) is the last one that the guest had finished for certain before it was begun."""

    path: Path
    manifest: dict[str, t.Any]
    round: int

    @property
    def disks(self) -> dict[str, dict[str, t.Any]]:
        return {disk["name"]: disk for disk in self.manifest["disks"]}


def back_up(stage: Stage, guest: Vm, set_id: str) -> tuple[Backup, list[int]]:
    """Run the playbook, and read what it has made."""
    finished = guest.rounds
    _changes, rounds = run_playbook(stage, guest, "backup", f"vm_backup_id={set_id}")
    path = stage.home / "repository" / stage.vm / set_id
    return Backup(path, json.loads((path / "manifest.json").read_text()), finished), rounds


def show_chain(backups: Sequence[Backup]) -> None:
    """What there is, and what it is made of."""
    say(f"   {'set':9} {'level':13} {'consistent':12} {'frozen':>8}  images")
    for backup in backups:
        written = backup.manifest
        sizes = ", ".join(f"{name} {disk['bytes'] / 2**20:.1f} MiB" for name, disk in backup.disks.items())
        frozen = f"{written['frozen_ms']} ms" if written["frozen_ms"] else "-"
        say(f"   {written['id']:9} {written['level']:13} {written['consistency']:12} {frozen:>8}  {sizes}")
    newest = backups[-1].path / backups[-1].manifest["disks"][0]["image"]
    repository = newest.parents[2]
    say(f"\n   $ cd {repository}")
    say(f"   $ qemu-img info --backing-chain {newest.relative_to(repository)}")
    wanted = re.compile(r"^(?:image|disk size|backing file): [^(\n]*", re.MULTILINE)
    for line in wanted.findall(qemu_img("info", "--backing-chain", newest)):
        say(f"   {paint(2, '│')} {line.replace(f'{repository}/', '').strip()}")
    say(f"   {paint(2, '│')} (and so on)")
    check(
        all(disk["parent"]["id"] == backups[0].path.name for disk in backups[-1].disks.values()),
        f"{backups[-1].path.name} holds what has changed since {backups[0].path.name}, and reads as the whole disk",
    )


def prove(stage: Stage, backup: Backup, known: Mapping[str, str]) -> dict[str, int]:
    """Look into the images of a set; the guest's round on each disk, by the guest's names."""
    rounds = {}
    clean = "was frozen" if backup.manifest["frozen_ms"] else "was unmounted"
    for name, disk in backup.disks.items():
        called = stage.disks[name]
        image = backup.path / disk["image"]
        say(f"   {image.relative_to(stage.home / 'repository' / stage.vm)}")
        check(digest(image.read_bytes()) == disk["sha256"], "is the file that its manifest describes: sha256 fits")
        copy = stage.home / "copy"
        qemu_img("convert", "-O", "raw", image, copy)
        # With any code but 0, which is no fault at all, this ends here.
        e2fs("e2fsck", "-f", "-n", copy)
        check(
            b"needs_recovery" not in e2fs("dumpe2fs", "-h", copy),
            f"{clean}: no journal to replay, and e2fsck finds no fault",
        )
        for file in ("about.txt", "random.bin"):
            content = harness.file_in(copy, file)
            check(
                digest(content) == known[f"{called}/{file}"],
                f"holds {file}, {len(content):,} bytes, as given to the guest: sha256 fits",
            )
        rounds[called] = int(harness.file_in(copy, "round"))
    return rounds


def e2fs(program: str, *arguments: str | Path) -> bytes:
    """Run one of e2fsprogs, which has to find all well; a user's PATH may lack them."""
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    return subprocess.run([program, *arguments], capture_output=True, env=environment, check=True).stdout


def size(backup: Backup) -> str:
    """What the images of a set take."""
    return f"{sum(disk['bytes'] for disk in backup.disks.values()) / 2**20:.0f} MiB"


def tell(call: Callable[..., t.Any], command: str) -> str:
    """Run a command in the guest, by calls of its agent, and show it."""
    answer = ask(call, command).strip()
    say(f"   {paint(2, '│')} # {command}")
    say(f"   {paint(2, '│')} {answer}")
    return answer


def ask(call: Callable[..., t.Any], command: str) -> str:
    """Run a command in the guest, by calls of its agent; returns what it prints."""
    process = call("guest-exec", path="/bin/sh", arg=["-c", command], **{"capture-output": True})
    done = wait_until(lambda: ended(call("guest-exec-status", **process)), f"the guest's {command}")
    assert done["exitcode"] == 0, f"{command}: {done}"
    return base64.b64decode(done.get("out-data", "")).decode()


def ended(process: dict[str, t.Any]) -> dict[str, t.Any] | None:
    """What the agent says of a command, once that has ended."""
    return process if process["exited"] else None


def sum_up(*lines: str) -> None:
    """Say once more what was shown."""
    say(f"\n{paint(1, 'What you have seen')}")
    for line in lines:
        say(f"   {paint(32, '✓')} {line}")


def end(number: int, _frame: object) -> t.NoReturn:
    """Turn a signal into an exception, once, so that everything is cleaned up."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    say(paint(31, "interrupted, cleaning up"))
    sys.exit(128 + number)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(title: str, show: Callable[[Path], None]) -> None:
    """Show it in a directory that is gone afterwards."""
    for number in SIGNALS:
        signal.signal(number, end)
    started = time.monotonic()
    say(paint(1, f"vmfleet.backup: {title}"))
    try:
        with tempfile.TemporaryDirectory(prefix="vmfleet-") as home:
            show(Path(home))
    except ConnectionError:
        say(paint(31, "The demo failed: QEMU is gone"))
        sys.exit(1)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        say(paint(31, f"The demo failed: {error}"))
        sys.exit(1)
    say(f"\n   The guest and its backups are gone again. This took {time.monotonic() - started:.0f} seconds.")

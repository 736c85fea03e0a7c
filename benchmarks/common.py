# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the benchmarks share: modules run as Ansible runs them, and what that took."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.payload import COLLECTION

MODULES = "ansible_collections.vmfleet.backup.plugins.modules"


@dataclasses.dataclass(frozen=True)
class Execution:
    """One execution of a module, the start of its process included."""

    result: dict[str, t.Any]
    cpu: float
    """Seconds of CPU, user and system, of the module and of the programs that it ran."""
    memory: int
    """The most memory that it had in use, in bytes."""


def execute(module: str, root: Path | None = None, **options: t.Any) -> Execution:
    """Run a module that has to succeed, of the collection below `root` where that is given."""
    environment = {**os.environ, "PYTHONPATH": str(root)} if root else None
    command = [sys.executable, "-m", f"{MODULES}.{module}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": options}, default=str))
    process.stdin.close()
    result = json.loads(process.stdout.read())
    _pid, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, result
    return Execution(result, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def export(revision: str, root: Path) -> None:
    """Write the collection as it is in a revision of this work tree."""
    place = root / COLLECTION
    place.mkdir(parents=True)
    checkout = os.environ.get("CHECKOUT", ".")
    archive = subprocess.run(["git", "-C", checkout, "archive", revision], stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", place], input=archive, check=True)


def options(description: str | None, **defaults: t.Any) -> argparse.Namespace:
    """What the command line says: all benchmarks take the same options, and each uses those that concern it.

    `defaults` are those of one benchmark alone.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work; needs three times the data, dedup six")
    parser.add_argument(
        "--pairs", type=int, default=5, help="copy, dedup, restore, libvirt, worker: how often each opponent is met"
    )
    parser.add_argument("--gib", type=float, default=4, help="copy, dedup, restore, libvirt: data on each disk")
    parser.add_argument("--domains", type=int, default=1, help="libvirt: domains, all backed up by one plan")
    parser.add_argument("--vms", type=int, default=200, help="control, worker: VMs, of 30 MiB of memory each")
    parser.add_argument("--hypervisors", type=int, default=8, help="fleet, forks, scale: hypervisors (%(default)s)")
    parser.add_argument("--each", type=int, default=10, help="fleet, scale: VMs on each hypervisor (%(default)s)")
    parser.add_argument("--mib", type=int, default=16, help="fleet: size of each disk, half of which is data")
    parser.add_argument("--growth", default="1,10,50,200", help="fleet: numbers of VMs on one hypervisor")
    parser.add_argument("--opponent", type=int, default=50, help="fleet: most VMs there that the obvious role is given")
    parser.add_argument("--svg", type=Path, help="fleet: where to write the plot")
    parser.add_argument("--sets", type=int, default=10_000, help="info: sets in the repository")
    parser.add_argument("--runs", type=int, default=25, help="start: how often each module is started")
    parser.add_argument(
        "--against", metavar="REV", help="dedup, forks, info, start, worker: the revision to compare with"
    )
    parser.set_defaults(**defaults)
    return parser.parse_args()


def seconds(work: t.Callable[[], object]) -> float:
    """How long this takes."""
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


@contextlib.contextmanager
def workplace(parent: Path | None) -> t.Iterator[Path]:
    """A directory for as long as it is needed."""
    directory = Path(tempfile.mkdtemp(prefix="vmfleet-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def progress(text: str) -> None:
    """Tell what is going on to whom it may concern."""
    print(f"  {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """What this was measured on."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return f"{os.cpu_count()} cores, {memory} GiB, Linux {platform.release()}, {qemu.split(' (')[0]}"


def verdict(kept: bool) -> str:
    """Whether a limit was kept."""
    return "ok" if kept else "MISSED"

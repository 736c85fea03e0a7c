# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A systemd that is the first process of name spaces of its own, with a bus, and no unit that it is not given here.

It runs as root, on the files of this machine. Therefore all of these are read-only to it, and to all that it starts,
before it begins: what it may write to is its own and ends with it, but for one directory. It knows no unit of this
machine, of which one empties /tmp, and others mount, load or configure something.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

PROGRAMS = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
NEEDED = ("busctl", "dbus-daemon", "systemctl", "systemd-run", "unshare")
GROUP = "vmfleet-test-"
# Of its own control group nothing above is seen in the name space.
GROUPED = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
SYSTEM = ("/usr/sbin", "/sbin")

# mount_setattr(2) for all mounts at once: AT_RECURSIVE, MOUNT_ATTR_RDONLY.
READ_ONLY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(1, 0, 0, 0), 32):
    raise SystemExit(f"mount_setattr: {os.strerror(ctypes.get_errno())}")
"""

INIT = r"""
set -e
program=$1 read_only=$2 python=$3 directory=$4
shift 3
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/kept /run/dev /run/units
for place in "$@"; do
  mkdir -p "/run/kept$place"
  mount --bind "$place" "/run/kept$place"
done
"$python" -I -S -c "$read_only"
for place in / /etc /usr /var /var/lib /var/log /tmp /root /home /run /dev /proc /sys "$@"; do
  # It would be that of this machine.
  [ ! -e "$place" ] || [ ! -w "$place" ] || { echo "$place can be written to"; exit 1; }
done
mount -o remount,bind,rw /run
mount -o remount,bind,rw "/run/kept$directory"
mount -t tmpfs -o mode=755 tmpfs /run/dev
mkdir /run/dev/shm /run/dev/pts
for node in null zero full random urandom tty; do
  touch "/run/dev/$node"
  mount --bind "/dev/$node" "/run/dev/$node"
  mount -o remount,bind,rw "/run/dev/$node"
done
ln -s null /run/dev/console
mount --move /run/dev /dev
for place in /tmp /var/tmp /var/log; do
  mount -t tmpfs -o mode=1777 tmpfs "$place"
done
for place in "$@"; do
  mkdir -p "$place"
  mount --move "/run/kept$place" "$place"
done
mount -t proc proc /proc
mount -o bind,ro /proc/sys /proc/sys
umount --recursive --lazy /sys
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
unit() { { echo "[Unit]"; echo "DefaultDependencies=no"; cat; } > "/run/units/$1"; }
for target in sysinit basic shutdown; do
  unit $target.target < /dev/null
done
unit dbus.socket << UNIT
[Socket]
ListenStream=/run/dbus/system_bus_socket
UNIT
unit dbus.service << UNIT
Requires=dbus.socket
[Service]
Type=notify
ExecStart=dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation --syslog-only
UNIT
unit vmfleet-test.target << UNIT
Requires=dbus.socket sysinit.target basic.target
After=dbus.socket sysinit.target basic.target
UNIT
exec env --ignore-environment "PATH=$PATH" container=vmfleet SYSTEMD_UNIT_PATH=/run/units \
  SYSTEMD_GENERATOR_PATH=/run/units/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/units/none \
  setpriv --bounding-set -sys_time,-sys_boot,-sys_module,-syslog,-mknod \
  "$program" --unit=vmfleet-test.target --show-status=no --log-target=null
"""


def missing() -> str:
    """What is not there to run a systemd with; nothing where all is."""
    if os.geteuid() != 0:
        return "root"
    found = {
        "systemd": any(map(os.path.exists, PROGRAMS)),
        "control groups of version 2": bool(_groups()),
        **{name: bool(shutil.which(name, path=_path())) for name in NEEDED},
    }
    return ", ".join(name for name, there in found.items() if not there)


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], *SYSTEM])


def _groups() -> str:
    """Return the directory of this process's control group of version 2; nothing where there is none."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    places = [fields[4] for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
    own = [line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")]
    return os.path.join(places[0], own[0]) if places and own else ""


def _remove(group: Path) -> None:
    # One can be removed when its last process has ended.
    with contextlib.suppress(OSError):
        for path, _directories, _files in os.walk(group, topdown=False):
            os.rmdir(path)


class Systemd:
    """Starts one, which sees `directory` as it is, and ends all that it has started with it."""

    def __init__(self, directory: Path) -> None:
        bash, python = shutil.which("bash"), shutil.which("python3")
        assert bash
        assert python
        self._log = directory / "systemd.log"
        self._group = Path(_groups()) / f"{GROUP}{os.getpid()}-{directory.name}"
        for group in self._group.parent.glob(f"{GROUP}*"):
            # That of a test that was killed has outlived it.
            if not Path(f"/proc/{group.name[len(GROUP) :].split('-')[0]}").exists():
                _remove(group)
        self._group.mkdir()
        with self._log.open("wb") as log:
            self._space = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", bash, "-c", GROUPED, "grouped", self._group),
                    *("unshare", "--mount", "--cgroup", "--pid", "--uts", "--ipc", "--net", "--fork", "--kill-child"),
                    *(bash, "-c", INIT, "init", next(filter(os.path.exists, PROGRAMS))),
                    *(READ_ONLY, python, directory, ROOT, sys.prefix),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": _path()},
            )
        try:
            self.pid = wait_until(self._begun, "the first process of systemd")
            self.inside = NameSpaces(self.pid)
            wait_until(self.seen_here("/run/dbus/system_bus_socket").exists, "the bus of systemd")
        except BaseException:
            print(self._log.read_text())
            self.close()
            raise

    def _begun(self) -> int:
        assert self._space.poll() is None, self._log.read_text()
        for child in Path(f"/proc/{self._space.pid}/task/{self._space.pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return int(child)
        return 0

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, as when the machine loses its power."""
        self.go_on()
        self._space.kill()
        self._space.wait()
        wait_until(self._is_gone, "the end of all processes of systemd")

    def _is_gone(self) -> bool:
        _remove(self._group)
        return not self._group.exists()

    def seen_here(self, path: Path | str) -> Path:
        """Where a path of the inside is for this process."""
        return self.inside.seen_here(path)

    def attempt(self, *command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end, whatever that is."""
        words = [
            *("nsenter", "--target", str(self.pid)),
            *("--mount", "--uts", "--ipc", "--net", "--cgroup", "--wdns=/"),
        ]
        with self.inside.for_children():
            return subprocess.run(
                [*words, "--", *map(str, command)],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )

    def run(self, *command: str | Path, stdin: str = "") -> str:
        """Run a program inside, which has to succeed; returns what it prints."""
        done = self.attempt(*command, stdin=stdin)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """What systemd says of a unit."""
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def units(self, pattern: str) -> list[str]:
        """The units of these names that are there."""
        lines = self.run("systemctl", "list-units", "--all", "--plain", "--no-legend", pattern).splitlines()
        return [line.split()[0] for line in lines]

    def unit_of(self, pid: int) -> str:
        """The path of the unit of a process, by the id that it has inside."""
        lines = self.run("cat", f"/proc/{pid}/cgroup").splitlines()
        return next(line[3:] for line in lines if line.startswith("0::"))

    def processes(self, unit: str) -> dict[int, str]:
        """The names of the processes of a unit, by the ids that they have inside."""
        pids = self.run("cat", f"/sys/fs/cgroup{self.show(unit, 'ControlGroup')}/cgroup.procs").split()
        # Some may have ended by now.
        lines = self.run("ps", "-e", "-o", "pid=,comm=").splitlines()
        return {int(pid): name for pid, name in (line.split(maxsplit=1) for line in lines) if pid in pids}

    def hang(self) -> None:
        """Have it answer nobody any more."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Have it answer again."""
        with contextlib.suppress(AttributeError, ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

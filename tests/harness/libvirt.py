# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real libvirtd with real domains, as on a hypervisor: its processes, network, /run and state are its own.

All else is this machine's: programs and files have the same paths inside and outside. libvirtd is the first one in
PATH, the machine's own or one of tools/provide, and its QEMU is that of the same Debian. Inside there are no services,
no D-Bus, no polkit and no control groups. libvirt has no security driver but that of owners and modes: neither SELinux
nor AppArmor. Nor is there KVM: domains are of type `qemu`. A file system that is mounted later is not seen inside.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk, domain_xml
from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

# What libvirt learns about a QEMU takes seconds, and holds for as long as neither program changes.
KNOWLEDGE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmfleet" / "libvirt-capabilities"

FORGET = ("--managed-save", "--snapshots-metadata", "--checkpoints-metadata", "--nvram")

# What runs as the first process of the name spaces.
INIT = r"""
set -e
export PATH="$PATH:/usr/sbin:/sbin"
# libvirt moves all mounts below /dev that it hears of, also those that nobody sees.
cut -d ' ' -f 2 /proc/mounts | grep ^/dev/ | sort -r | xargs -r -n 1 umount --lazy
mount -t tmpfs -o mode=755 tmpfs /run
for place in /dev /etc /var/cache /var/lib /var/log; do
  mkdir -p "/run/.own$place/upper" "/run/.own$place/work"
  mount -t overlay -o "lowerdir=$place,upperdir=/run/.own$place/upper,workdir=/run/.own$place/work" overlay "$place"
done
mount -t devpts -o ptmxmode=666 devpts /dev/pts
ln -sf pts/ptmx /dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# Where root may use it, but not the user whom QEMU runs as, libvirt asks QEMU for all it knows again and again.
rm -f /dev/kvm
mount -t proc proc /proc
# With the network of these name spaces, and without the control groups of the machine.
umount --recursive --lazy /sys
mount -t sysfs sysfs /sys
ip link set lo up
# Each start and each definition would wait for DNS.
echo "127.0.0.1 localhost $(uname -n)" > /etc/hosts
grep -q ^libvirt-qemu: /etc/group || echo libvirt-qemu:x:64055: >> /etc/group
grep -q ^libvirt-qemu: /etc/passwd || echo libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false >> /etc/passwd
mkdir -p /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt/qemu/capabilities
printf '%s\n' 'auth_unix_rw = "none"' 'unix_sock_rw_perms = "0700"' > /etc/libvirt/libvirtd.conf
printf '%s\n' 'security_driver = "none"' > /etc/libvirt/qemu.conf
mount --bind "$1" /var/cache/libvirt/qemu/capabilities
if [ -n "$2" ]; then
  # These paths are compiled into libvirt and QEMU.
  for place in lib/libvirt lib/x86_64-linux-gnu/libvirt lib/x86_64-linux-gnu/qemu share/libvirt share/seabios; do
    mount --bind "$2/usr/$place" "/usr/$place"
  done
  # The descriptions of OVMF are the machine's.
  mount -t overlay -o "lowerdir=$2/usr/share/qemu:/usr/share/qemu" overlay /usr/share/qemu
  # The user whom QEMU runs as may not pass through root's home, where these programs are.
  mkdir /run/.own/home /run/.own/home/upper /run/.own/home/work
  mount -t overlay -o "lowerdir=$HOME,upperdir=/run/.own/home/upper,workdir=/run/.own/home/work" overlay "$HOME"
fi
echo up
# Nobody else waits for the orphans: they go at once where this signal is ignored.
exec env --ignore-signal=CHLD sleep infinity
"""

SYSTEM = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")


@dataclasses.dataclass(frozen=True)
class Programs:
    """One version of libvirt and its QEMU."""

    directory: str
    system: str
    """The root directory of the Debian that they are of; empty for the machine's own."""

    def start(self, program: str) -> list[str]:
        """Return what starts a daemon, which finds no other QEMU."""
        path = os.pathsep.join([self.directory, *SYSTEM])
        return ["env", f"PATH={path}", program, "--daemon"]


def programs() -> Programs:
    """Return the first libvirt in PATH."""
    found = shutil.which("libvirtd", path=os.pathsep.join([os.environ["PATH"], *SYSTEM]))
    assert found, "there is no libvirtd: run tools/setup vm"
    usr = Path(found).resolve().parents[1]
    return Programs(str(Path(found).parent), "" if usr == Path("/usr") else str(usr.parent))


class Libvirt:
    """Starts virtlogd and libvirtd, and ends all that is inside with the test, be it killed.

    With `network` it shares the network of these name spaces.
    """

    def __init__(self, network: NameSpaces | None = None) -> None:
        self._programs = programs()
        shared = ["nsenter", "--target", str(network.pid), "--net"] if network else ["unshare", "--net"]
        KNOWLEDGE.mkdir(parents=True, exist_ok=True)
        self._space = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", *shared),
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", INIT, "init", KNOWLEDGE, self._programs.system),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._space.stdout
        try:
            assert self._space.stdout.readline() == b"up\n", "the name spaces of libvirt did not start"
            [init] = Path(f"/proc/{self._space.pid}/task/{self._space.pid}/children").read_text().split()
            self.inside = NameSpaces(int(init))
            self.run(*self._programs.start("virtlogd"))
            self.start_daemon()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End it with all its processes and mounts, as when the machine loses its power."""
        assert self._space.stdout
        if self._space.stdout.closed:
            return
        self._space.kill()
        self._space.wait()
        # The first process has this open until no other one is left.
        self._space.stdout.read()
        self._space.stdout.close()

    def attempt(self, *command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end, whatever that is."""
        words = self.inside.command(*command)
        with self.inside.for_children():
            return subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def run(self, *command: str | Path, stdin: str = "") -> str:
        """Run a program inside, which has to succeed; returns what it prints."""
        done = self.attempt(*command, stdin=stdin)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log}"
        return done.stdout

    def virsh(self, *words: str | Path, stdin: str = "") -> str:
        """Run virsh, which has to succeed; returns what it prints."""
        return self.run("virsh", *words, stdin=stdin).strip()

    def seen_here(self, path: Path | str) -> Path:
        """Return where a path of the inside is for this process."""
        return self.inside.seen_here(path)

    @property
    def log(self) -> str:
        """What libvirtd has written into its log."""
        log = self.seen_here("/var/log/libvirt/libvirtd.log")
        return log.read_text(errors="replace") if log.exists() else ""

    @property
    def processes(self) -> dict[int, str]:
        """The command lines of all processes inside, by the ids that they have there."""
        lines = self.run("ps", "-e", "-o", "pid=,args=").splitlines()
        return {int(pid): arguments for pid, arguments in (line.split(maxsplit=1) for line in lines)}

    def send_signal(self, number: signal.Signals, pid: int) -> None:
        """Send a signal to a process, by the id that it has inside."""
        self.run("kill", "-s", str(int(number)), str(pid))

    def start_daemon(self) -> None:
        """Start libvirtd, and wait until it answers."""
        self.run(*self._programs.start("libvirtd"))
        self.virsh("list")

    @property
    def daemon(self) -> int:
        """The process id that libvirtd has inside; 0 where it does not run."""
        file = self.seen_here("/run/libvirtd.pid")
        pid = int(file.read_text()) if file.exists() else 0
        return pid if pid and self.seen_here(f"/proc/{pid}").exists() else 0

    def stop_daemon(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End libvirtd, or kill it with SIGKILL; its domains run on."""
        pid = self.daemon
        self.send_signal(how, pid)
        wait_until(lambda: pid not in self.processes, "the end of libvirtd")

    def restart_daemon(self) -> None:
        """End libvirtd and start it again; its domains run on."""
        self.stop_daemon()
        self.start_daemon()

    def define(self, name: str, *disks: DomainDisk, xml: str = "", **hardware: t.Any) -> Domain:
        """Define a domain with these disks, or with an XML of your own."""
        self.virsh("define", "/dev/stdin", stdin=xml or domain_xml(name, *disks, **hardware))
        return Domain(self, name)

    def start(self, name: str, *disks: DomainDisk, **hardware: t.Any) -> Domain:
        """Define a domain and start it."""
        domain = self.define(name, *disks, **hardware)
        domain.start()
        return domain

    def clear(self) -> None:
        """End all domains and forget them; nobody copies their disks any more."""
        if not self.daemon:
            self.start_daemon()
        for pid, words in self.processes.items():
            if words.startswith("qemu-storage-daemon"):
                self.send_signal(signal.SIGTERM, pid)
        for name in self.virsh("list", "--name").splitlines():
            domain = Domain(self, name)
            domain.wake()
            domain.destroy()
        for name in self.virsh("list", "--all", "--name").splitlines():
            Domain(self, name).virsh("undefine", *FORGET)


def restart_in_here() -> int:
    """Kill libvirtd from a process that sees it, and start it again; return its process id of before."""
    pid = int(Path("/run/libvirtd.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    environment = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    subprocess.run(["libvirtd", "--daemon"], check=True, env=environment)
    return pid


def version(program: str = "libvirtd") -> str:
    """Return the version of libvirt's programs, as in 9.0.0."""
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    [found] = re.findall(r"(\d+\.\d+\.\d+)\s*$", told)
    return str(found)

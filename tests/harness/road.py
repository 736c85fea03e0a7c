# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A newcomer's machines: a controller with ansible-core alone, and two hypervisors with libvirt that it reaches by SSH.

They have the names that the guides use, and accounts, homes, /etc, /srv and /usr of their own, on a network that only
they see. On the hypervisors one logs in as an ordinary user, who may become root with sudo.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import typing as t
import uuid
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.documented import PAGES, blocks
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces

HYPERVISORS = ("hv01.example.com", "hv02.example.com")
# Far beyond what a command of the guides takes.
PATIENCE = 600.0
HOME = "/root"
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What runs as the first process of the controller, and keeps the network for all.
INIT = """
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/.own/etc/upper /run/.own/etc/work
mount -t overlay -o lowerdir=/etc,upperdir=/run/.own/etc/upper,workdir=/run/.own/etc/work overlay /etc
mount -t proc proc /proc
echo up
exec env --ignore-signal=CHLD sleep infinity
"""

# For each machine: its name, the directory of what is its own, and the one that is /srv there.
FURNISH = """
set -e
hostname "$1"
for place in /usr "$HOME"; do
  mkdir -p "/run/.own$place/upper" "/run/.own$place/work"
  mount -t overlay -o "lowerdir=$place,upperdir=/run/.own$place/upper,workdir=/run/.own$place/work" overlay "$place"
done
for place in /home /mnt /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$place"; done
mount --bind "$3" /srv
tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id
mount --bind "$2/boot_id" /proc/sys/kernel/random/boot_id
printf '127.0.0.1 localhost %s\\n127.0.1.1 hv01.example.com\\n127.0.1.2 hv02.example.com\\n' "$(uname -n)" > /etc/hosts
rm -rf "$HOME/.ssh"
"""

CONTROLLER = """
set -e
mkdir -m 0700 "$HOME/.ssh"
ssh-keygen -q -t ed25519 -N '' -C '' -f "$HOME/.ssh/id_ed25519"
printf 'Host hv*\\n  User ansible\\n' > "$HOME/.ssh/config"
# libvirt makes it where it is installed.
grep -q ^libvirt-qemu: /etc/passwd || useradd --system libvirt-qemu
# systemd does not run here. Its tools then do what they can, which is to write the links.
echo 'Defaults env_keep += "SYSTEMD_OFFLINE"' > /etc/sudoers.d/systemd
"""

HYPERVISOR = """
set -e
useradd --create-home --password '*' --shell /bin/bash ansible
echo 'ansible ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/ansible
install -d -m 0700 -o ansible ~ansible/.ssh
cat > ~ansible/.ssh/authorized_keys
rm -f /etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -C '' -f /etc/ssh/ssh_host_ed25519_key
mkdir -p /run/sshd
cat > /etc/ssh/sshd_config <<END
ListenAddress $1
UsePAM no
UseDNS no
PasswordAuthentication no
PidFile none
Subsystem sftp internal-sftp
END
/usr/sbin/sshd
echo "$2 $(cat /etc/ssh/ssh_host_ed25519_key.pub)"
"""


class Done(t.NamedTuple):
    """How a command has ended, and what it has printed."""

    rc: int
    output: str


class Machine:
    """A machine on which somebody works in a shell: where that has gone is remembered."""

    def __init__(self, inside: NameSpaces, environment: dict[str, str], directory: str) -> None:
        self.inside = inside
        self.environment = environment
        self.directory = directory

    def shell(self, command: str, stdin: str = "") -> Done:
        """Run a command to its end, whatever that is."""
        script = f"{command}\nrc=$?\npwd > /run/.own/directory\nexit $rc"
        words = self.inside.command("bash", "-o", "pipefail", "-c", script, directory=self.directory)
        with self.inside.for_children():
            done = subprocess.run(
                words,
                env=self.environment,
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        file = self.inside.seen_here("/run/.own/directory")
        self.directory = file.read_text().rstrip("\n")
        return Done(done.returncode, done.stdout)

    def run(self, script: str, *arguments: str | Path, stdin: str = "") -> str:
        """Run a script, which has to succeed; returns what it prints."""
        done = self.shell(f"bash -c {shlex.join([script, 'script', *map(str, arguments)])}", stdin=stdin)
        assert done.rc == 0, f"{script}\nended with {done.rc}: {done.output}"
        return done.output


class Road:
    """A controller and two hypervisors. `ansible` is the directory of the controller's programs."""

    def __init__(self, ansible: Path) -> None:
        # The paths of sockets may have 107 bytes only.
        self.path = Path(tempfile.mkdtemp(prefix="vmfleet-road-"))
        self.path.chmod(0o755)
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self.path)
        environment = {
            "HOME": HOME,
            "LANG": "C.UTF-8",
            "LOGNAME": "root",
            "USER": "root",
            "PATH": f"{ansible}:{SYSTEM}",
        }
        try:
            self._network = self._stack.enter_context(_controller())
            self.controller = Machine(self._network, {**environment, "SYSTEMD_OFFLINE": "1"}, "/")
            self._furnish(self.controller, "controller", "srv-controller")
            self.controller.run(CONTROLLER)
            key = self.controller.run("cat ~/.ssh/id_ed25519.pub")
            self.libvirts = []
            self.hypervisors = []
            for number, name in enumerate(HYPERVISORS, 1):
                libvirt = self._stack.enter_context(Libvirt(network=self._network))
                machine = Machine(libvirt.inside, {**environment, "PATH": SYSTEM}, "/")
                self.libvirts.append(libvirt)
                self.hypervisors.append(machine)
                self._furnish(machine, name, "srv")
                address = f"127.0.1.{number}"
                known = machine.run(HYPERVISOR, address, f"{name},{address}", stdin=key)
                self.controller.run("cat >> ~/.ssh/known_hosts", stdin=known)
        except BaseException:
            self.close()
            raise

    def settle(self, tarball: Path, wheel: Path) -> None:
        """Install what the way through README installs."""
        self.controller.run('ansible-galaxy collection install "$1"', tarball)
        for machine in self.hypervisors:
            machine.run('/usr/bin/python3 -m zipfile -e "$1" /usr/lib/python3/dist-packages', wheel)

    def __enter__(self) -> t.Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all machines."""
        self._stack.close()

    def _furnish(self, machine: Machine, name: str, srv: str) -> None:
        own = self.path / name
        own.mkdir()
        (own / "boot_id").write_text(f"{uuid.uuid4()}\n")
        (self.path / srv).mkdir(exist_ok=True)
        machine.run(FURNISH, name, own, self.path / srv)


@contextlib.contextmanager
def _controller() -> t.Iterator[NameSpaces]:
    """Start the name spaces of the controller, which end with this process, be it killed."""
    space = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--net", "--fork"),
            *("--kill-child", "sh", "-ec", INIT),
        ],
        env={**os.environ, "PATH": f"{os.environ['PATH']}:{SYSTEM}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert space.stdout
    try:
        assert space.stdout.readline() == b"up\n", "the name spaces of the controller did not start"
        [init] = Path(f"/proc/{space.pid}/task/{space.pid}/children").read_text().split()
        yield NameSpaces(int(init))
    finally:
        space.kill()
        space.wait()
        # The first process has this open until no other one is left.
        space.stdout.read()
        space.stdout.close()


def install_ansible(place: Path) -> Path:
    """Make a virtual environment with ansible-core alone, of the version that is here; returns its programs."""
    version = _run(Path(sys.executable).with_name("ansible-playbook"), "--version").split("core ")[1].split("]")[0]
    _run(sys.executable, "-m", "venv", place)
    _run(place / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", f"ansible-core=={version}")
    return place / "bin"


def build_tarball(place: Path) -> Path:
    """Build the collection as it is published; returns the file."""
    galaxy = Path(sys.executable).with_name("ansible-galaxy")
    _run(galaxy, "collection", "build", "--output-path", place, ROOT / "ansible_collections" / "vmfleet" / "backup")
    [tarball] = place.glob("vmfleet-backup-*.tar.gz")
    return tarball


def fetch_wheel(place: Path) -> None:
    """Fetch the library that hypervisors need by the command that a guide has for networks that are closed."""
    [command] = [
        command
        for block in blocks(PAGES["roles/hypervisor/README.md"])
        for command in block.commands
        if command.startswith("pip download")
    ]
    pip, *words = shlex.split(command)
    _run(Path(sys.executable).with_name(pip), *words, cwd=place)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A fleet: a controller, and hypervisors that it reaches over real SSH, all of them on this machine.

Each of them is a machine of its own to whoever is inside: it has its own processes, mounts, host name, machine-id, boot
and /run. What ends a machine ends all its processes and mounts, and so does the end of this process, whatever that is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import typing as t
import uuid
from pathlib import Path

import yaml

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, patterned
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, Disk, Qemu, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

# What runs as the first process of a machine: bash takes in the orphans, as init does.
INIT = r"""
set -e
mount --bind "$1/machine-id" /etc/machine-id
mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
# A login is to read nothing of what the user of this machine has set up for himself.
[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc
[ -z "$2" ] || mount -t tmpfs -o "size=$2,mode=700" tmpfs "$1/repository"
hostname "$3"
echo up
sleep infinity &
wait
"""

SSHD = """
Port {port}
ListenAddress {address}
HostKey {directory}/host
AuthorizedKeysFile {key}.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile none
MaxStartups 100
Subsystem sftp internal-sftp
"""

CONFIGURATION = """
[defaults]
inventory = {directory}/inventory.yml
home = {directory}/ansible
nocolor = true
retry_files_enabled = false

[ssh_connection]
pipelining = true
control_path_dir = {directory}/ssh
ssh_args = -F none -o ControlMaster=auto -o ControlPersist=60s -o IdentityFile={directory}/key -o IdentitiesOnly=yes \
-o UserKnownHostsFile={directory}/known_hosts -o StrictHostKeyChecking=yes
"""


class Machine:
    """Processes, mounts and a name that are its own. `room` is the size of the repository's file system, 0 for none."""

    def __init__(self, directory: Path, name: str, room: int = 0) -> None:
        self.name = name
        self.directory = directory / name
        self.repository = self.directory / "repository"
        self.repository.mkdir(parents=True)
        (self.directory / "machine-id").write_text(uuid.uuid4().hex + "\n")
        (self.directory / "boot_id").write_text(f"{uuid.uuid4()}\n")
        self._space = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--mount-proc"),
                *("--fork", "--kill-child", "bash", "-c", INIT, "init", self.directory, str(room or ""), name),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._space.stdout
        assert self._space.stdout.readline() == b"up\n", f"machine {name} did not start"

    def close(self) -> None:
        """End it with all its processes; those that this process has started must have been waited for."""
        self._space.kill()
        self._space.wait()
        assert self._space.stdout
        # Its first process has this open until no other one is left.
        self._space.stdout.read()
        self._space.stdout.close()

    @property
    def pid(self) -> int:
        """The process that is on that machine and on this one: what it starts is there, what it sees as well."""
        return self._space.pid

    def seen_here(self, path: Path) -> Path:
        """Where a path of that machine is for this process."""
        return NameSpaces(self.pid).seen_here(path)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """The processes that this thread starts meanwhile are that machine's, but see the mounts of this one."""
        return NameSpaces(self.pid).for_children()

    def start(self, *command: str | Path, log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program on that machine, with its mounts."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", f"--wd={self.directory}"]
        with log.open("ab") as sink, self.inside():
            return subprocess.Popen(
                [*enter, "setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def run(self, *command: str | Path) -> None:
        """Run a program on that machine, which has to succeed."""
        log = self.directory / "run.log"
        assert self.start(*command, log=log).wait(PATIENCE) == 0, log.read_text()

    def pids(self, program: str) -> list[int]:
        """The processes of a program on that machine."""
        own = os.readlink(f"/proc/{self.pid}/ns/pid_for_children")
        found = []
        for process in Path("/proc").glob("[1-9]*"):
            # Processes come and go meanwhile, and not everybody's may be looked into.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if (process / "comm").read_text().strip() == program and os.readlink(process / "ns/pid") == own:
                    found.append(int(process.name))
        return found


class Hypervisor(Machine):
    """A machine with an sshd, VMs whose sockets are in one directory, and a repository on a file system of its own."""

    def __init__(self, directory: Path, number: int, room: int) -> None:
        super().__init__(directory, f"hv{number}", room)
        self.vms: list[Qemu] = []
        self.sets = Sets(self.seen_here(self.repository))
        self.variables: dict[str, t.Any] = {}
        """What the inventory says of it alone, on top of what it says of all."""
        self._address = f"127.0.1.{number}"
        self._port = _free_port(self._address)
        self._key = directory / "key"
        self._sshd: subprocess.Popen[bytes] | None = None
        make_key(self.directory / "host")

    def close(self) -> None:
        """End it and its VMs."""
        for vm in self.vms:
            vm.close()
        self.cut_off()
        super().close()

    @property
    def sockets(self) -> str:
        """The pattern of its VMs' monitors."""
        return f"{self.directory}/*.qmp"

    def connect(self) -> None:
        """Let it be reached over SSH."""
        config = self.directory / "sshd_config"
        config.write_text(SSHD.format(port=self._port, address=self._address, directory=self.directory, key=self._key))
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program, "there is no sshd: install openssh-server"
        log = self.directory / "sshd.log"
        self._sshd = self.start(program, "-D", "-e", "-f", config, log=log)
        wait_until(lambda: self._listens(log), f"sshd of {self.name}")

    def _listens(self, log: Path) -> bool:
        assert self._sshd
        assert self._sshd.poll() is None, log.read_text()
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((self._address, self._port)):
            return True
        return False

    def cut_off(self) -> None:
        """Kill sshd with all its sessions; what was begun in these goes on, and nobody hears of it."""
        if self._sshd:
            self._sshd.kill()
            self._sshd.wait()
            self._sshd = None
        for pid in self.pids("sshd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def known_host(self) -> str:
        """Its line of known_hosts."""
        kind, key, *_comment = (self.directory / "host.pub").read_text().split()
        return f"[{self._address}]:{self._port} {kind} {key}\n"

    def entry(self) -> dict[str, t.Any]:
        """What the inventory says of it."""
        return {
            "ansible_host": self._address,
            "ansible_port": self._port,
            "ansible_remote_tmp": str(self.directory / "tmp"),
            "vm_backup_repository": str(self.repository),
            "vm_backup_sockets": [self.sockets],
            **self.variables,
        }

    def start_vm(self, template: Path, disks: int = 2, **options: t.Any) -> Qemu:
        """Start one more VM, with copies of a template as its disks, each of which then gets a mark of its own."""
        number = len(self.vms)
        name = f"{self.name}-vm{number:03}"
        attached = []
        for index in range(disks):
            path = self.directory / f"{name}-{index}.qcow2"
            shutil.copyfile(template, path)
            attached.append(Disk(path, id=f"drive{index}", node=f"n{index}"))
        monitor = self.directory / f"{name}.qmp"
        vm = Qemu(*attached, name=name, extra=("-qmp", f"unix:{monitor},server=on,wait=off"), **options)
        self.vms.append(vm)
        self.start_again(vm)
        for index, disk in enumerate(vm.disks):
            vm.write(disk.name, number % 255 + 1, index * 65536, 65536)
        return vm

    def start_again(self, vm: Qemu) -> None:
        """Start the process of a VM, or start it again when it was killed."""
        with self.inside():
            vm.start()

    def grow(self, size: int) -> None:
        """Make the repository's file system larger."""
        self.run("mount", "-o", f"remount,size={size}", self.repository)


class Run:
    """A playbook that runs on the controller."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        """The process id of ansible-playbook."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    def kill(self) -> None:
        """SIGKILL of ansible-playbook; its workers live on, as they do when the OOM killer takes it."""
        self._process.kill()
        self._process.wait()

    def wait(self, meanwhile: t.Callable[[], object] = lambda: None, timeout: float = 600) -> Play:
        """Wait for the end, doing something meanwhile."""

        def ended() -> bool:
            meanwhile()
            return not self.running

        wait_until(ended, f"the end of the playbook:\n{self.output}", timeout)
        return Play(self._process.returncode, self.output)


class Fleet:
    """A controller and its hypervisors, which are added one by one."""

    def __init__(self, parent: Path | None = None) -> None:
        # The paths of sockets may have 107 bytes only.
        self.directory = Path(tempfile.mkdtemp(prefix="vmfleet-fleet-", dir=parent))
        self.hypervisors: list[Hypervisor] = []
        self.variables: dict[str, t.Any] = {"vm_backup_repository_create": True, "vm_backup_reserve": "0"}
        # It learns the names now and removes what they stand for when this process ends, be it killed.
        self._broom = subprocess.Popen(
            ["xargs", "-d", "\n", "rm", "-rf", "--one-file-system", "--"], stdin=subprocess.PIPE, start_new_session=True
        )
        self._sweep(self.directory)
        self._stack = contextlib.ExitStack()
        self._runs = 0

    def __enter__(self) -> t.Self:
        try:
            make_key(self.directory / "key")
            (self.directory / "ansible.cfg").write_text(CONFIGURATION.format(directory=self.directory))
            self.controller = Machine(self.directory, "controller")
            self._stack.callback(self.controller.close)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all machines and remove everything."""
        try:
            self._stack.close()
        finally:
            assert self._broom.stdin
            self._broom.stdin.close()
            assert self._broom.wait(PATIENCE) == 0, f"{self.directory} could not be removed"

    def _sweep(self, path: Path) -> None:
        assert self._broom.stdin
        self._broom.stdin.write(f"{path}\n".encode())
        self._broom.stdin.flush()

    def add(self, vms: int, disks: int = 2, size: int = 2 * MIB, room: int = 1 << 30) -> Hypervisor:
        """One more hypervisor, with VMs whose disks are half full."""
        hypervisor = Hypervisor(self.directory, len(self.hypervisors) + 1, room)
        self._stack.callback(hypervisor.close)
        self.hypervisors.append(hypervisor)
        for _number in range(vms):
            self.add_vm(hypervisor, disks, size)
        hypervisor.connect()
        return hypervisor

    def add_vm(self, hypervisor: Hypervisor, disks: int = 2, size: int = 2 * MIB) -> Qemu:
        """One more VM on a hypervisor."""
        template = self.directory / f"template-{size}.qcow2"
        if not template.exists():
            patterned(template, size=size)
        vm = hypervisor.start_vm(template, disks)
        self._sweep(vm.directory)
        return vm

    @property
    def vms(self) -> list[Qemu]:
        """The VMs of all hypervisors."""
        return [vm for hypervisor in self.hypervisors for vm in hypervisor.vms]

    def start(self, playbook: str | Path, *options: str, **variables: t.Any) -> Run:
        """Start a playbook, with variables that are given without their prefix."""
        general = {
            "ansible_user": "root",
            "ansible_python_interpreter": sys.executable,
            **self.variables,
            **{f"vm_backup_{name}": value for name, value in variables.items()},
        }
        hosts = {hypervisor.name: hypervisor.entry() for hypervisor in self.hypervisors}
        inventory = {"hypervisors": {"hosts": hosts, "vars": general}}
        (self.directory / "inventory.yml").write_text(yaml.safe_dump(inventory))
        (self.directory / "known_hosts").write_text("".join(each.known_host() for each in self.hypervisors))
        self._runs += 1
        log = self.directory / f"run{self._runs}.log"
        process = self.controller.start(
            Path(sys.executable).with_name("ansible-playbook"),
            playbook,
            *options,
            log=log,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
                "ANSIBLE_CONFIG": str(self.directory / "ansible.cfg"),
            },
        )
        self._stack.callback(process.wait, PATIENCE)
        self._stack.callback(process.kill)
        return Run(process, log)

    def play(self, playbook: str | Path, *options: str, **variables: t.Any) -> Play:
        """Run a playbook to its end."""
        return self.start(playbook, *options, **variables).wait()

    def back_up(self, *options: str, **variables: t.Any) -> Play:
        """Run the playbook of the collection to its end."""
        return self.play("vmfleet.backup.backup", *options, **variables)


def make_key(path: Path) -> None:
    """A key pair of SSH without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])

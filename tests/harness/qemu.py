# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real QEMU processes for the tests. They need no KVM and no guest: HMP `qemu-io` stands for the guest's writes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import time
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp, QmpError

# Far beyond what anything here takes; it only keeps a broken test from hanging. A guest may need more.
PATIENCE = float(os.environ.get("VMFLEET_PATIENCE", "60"))

T = t.TypeVar("T")


def wait_until(condition: t.Callable[[], T], what: str, timeout: float = PATIENCE) -> T:
    """Poll until `condition` returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s in vain: {what}"
        time.sleep(0.01)


@dataclasses.dataclass
class Disk:
    """One disk of a VM; `path` is None for a CD-ROM drive without a medium."""

    path: Path | None
    id: str | None = "drive0"
    """Name of the block backend; None makes a node alone."""
    node: str | None = "n0"
    format: str = "qcow2"
    read_only: bool = False
    throttle: int = 0
    """Bytes/s a throttle filter above the node lets through, 0 for no filter."""
    file: dict[str, t.Any] | None = None
    """The protocol layer, where it is to be something else than the plain file (blkdebug)."""
    cache: dict[str, str] = dataclasses.field(default_factory=dict)
    """`direct` and `no-flush`, as in QEMU."""
    device: str | None = None
    """Guest device with its properties, as in `virtio-blk-pci,id=vd0`."""
    discard: bool = False
    """Whether a discard of the guest frees clusters; QEMU ignores it otherwise."""
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further options of the format, such as `encrypt.key-secret`."""

    @property
    def name(self) -> str:
        """What the guest's writes go to: on a block backend they pass the filter of a job, on a node alone not."""
        return self.id or self.node or ""

    def arguments(self) -> list[str]:
        """The options of QEMU's command line."""
        arguments: list[str] = []
        if self.path is None:
            options = [f"if=none,id={self.id},media=cdrom"]
        else:
            file = self.file or {"driver": "file", "filename": str(self.path)}
            node: dict[str, t.Any] = {"driver": self.format, "file": file, **self.options}
            if self.node:
                node["node-name"] = self.node
            if self.read_only:
                node["read-only"] = "on"
            if self.cache:
                node["cache"] = self.cache
            if self.throttle:
                group = f"throttle-{self.node or self.id}"
                arguments = ["-object", f"throttle-group,id={group},x-bps-total={self.throttle}"]
                node = {"driver": "throttle", "throttle-group": group, "file": node}
            if self.discard:
                node["discard"] = "unmap"
            options = [f"{key}={str(value).replace(',', ',,')}" for key, value in _flat(node)]
            if self.id:
                options = ["if=none", f"id={self.id}", *options]
        arguments += ["-drive" if self.id else "-blockdev", ",".join(options)]
        if self.device:
            arguments += ["-device", f"{self.device},drive={self.id or self.node}"]
        return arguments


def _flat(options: dict[str, t.Any], prefix: str = "") -> t.Iterator[tuple[str, t.Any]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def faulty(image: Path, event: str, **options: t.Any) -> dict[str, t.Any]:
    """A protocol layer for `Disk.file` where each `event`, such as read_aio, is an I/O error, within `options`."""
    fault = {"event": event, "errno": 5, **options}
    layer = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(image)}}
    return {**layer, **{f"inject-error.0.{name}": value for name, value in fault.items()}}


class Qemu:
    """A QEMU process: `monitor` is for the module under test, `qmp` is the test's own connection.

    `machine="none"` is ready in 50 ms; `machine="q35,accel=tcg"` with `paused=True` adds guest devices and firmware.
    """

    def __init__(
        self,
        *disks: Disk,
        name: str | None = None,
        uuid: str | None = None,
        machine: str = "none",
        paused: bool = False,
        unprivileged: bool = False,
        tcp: bool = False,
        rejecting: bool = False,
        under: t.Sequence[str] = (),
        extra: t.Sequence[str] = (),
    ) -> None:
        """`under` is a command that runs QEMU, whose own command is put after it."""
        self.disks = disks
        self._options: list[str] = ["-machine", machine, *extra]
        if name:
            self._options += ["-name", name]
        if uuid:
            self._options += ["-uuid", uuid]
        if rejecting:
            # Commands and values that are deprecated do not exist then, as one day they may not.
            self._options += ["-compat", "deprecated-input=reject"]
        if paused:
            self._options += ["-S"]
        self._unprivileged = unprivileged
        self._tcp = tcp
        self._under = under
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Qmp | None = None
        # UNIX socket paths may have 107 bytes only, so not below a test's own directory.
        self.directory = Path(tempfile.mkdtemp(prefix="vmfleet-qemu-"))
        self._log = self.directory / "log"
        self.monitor = self.directory / f"{name or 'vm'}.qmp"
        self._control = self.directory / "control"

    def __enter__(self) -> t.Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs (a stopped one does)."""
        return self._process is not None and self._process.poll() is None

    @property
    def answers(self) -> bool:
        """Whether it answers: one that was killed a moment ago may still count as alive."""
        with contextlib.suppress(OSError):
            return self.alive and bool(self.status)
        return False

    @property
    def qmp(self) -> Qmp:
        """The test's own connection."""
        assert self._connection
        return self._connection

    def start(self) -> None:
        """Start the process and wait for its monitor."""
        command = ["setpriv", "--pdeathsig", "KILL"]
        if self._unprivileged:
            command += ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--bounding-set", "-all"]
            for path in (self.directory, *(disk.path for disk in self.disks if disk.path)):
                shutil.chown(path, "nobody")
        # Line by line, so that what qemu-io prints is in the log when its command returns.
        command += ["stdbuf", "-oL", *self._under]
        command += ["qemu-system-x86_64", "-nodefaults", "-display", "none", *self._options]
        for path in (self.monitor, self._control):
            path.unlink(missing_ok=True)
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        if self._tcp:
            command += ["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"]
        for disk in self.disks:
            command += disk.arguments()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self._connection = wait_until(self._connect, "QEMU's monitor")

    def _connect(self) -> Qmp | None:
        try:
            # While QEMU starts, it hands its monitors from one thread to another. Whoever came before that may be heard
            # by both, and was once told that a correct command was no JSON.
            with contextlib.closing(Qmp(self._control)) as early:
                early.execute("query-status")
            return Qmp(self._control)
        except (FileNotFoundError, BlockingIOError, ConnectionError, TimeoutError, QmpError):
            assert self.alive, f"QEMU did not start: {self._log.read_text()}"
            return None

    def close(self) -> None:
        """End the process, whatever state it is in, and remove its files."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def kill(self) -> None:
        """SIGKILL, as the OOM killer would."""
        if self._process:
            self._process.kill()
            self._process.wait(PATIENCE)
        self._disconnect()

    def quit(self) -> None:
        """End it as `quit` on the monitor does: images closed, bitmaps stored."""
        assert self._process
        with contextlib.suppress(ConnectionError):
            self.qmp.execute("quit")
        self._process.wait(PATIENCE)
        self._disconnect()

    def restart(self) -> None:
        """Start it again with the same disks, after it was killed or has quit."""
        assert not self.alive
        self.start()

    def hang(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, nothing is ever answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def io(self, device: str, command: str) -> str:
        """Do as the guest would, and return what qemu-io says.

        On a block backend, that is: through the name of a node it would go round the filter of a running job.
        """
        start = self._log.stat().st_size
        error = self.qmp.execute("human-monitor-command", command_line=f'qemu-io {device} "{command}"')
        assert not error, error
        with self._log.open("rb") as log:
            log.seek(start)
            return log.read().decode()

    def write(self, device: str, pattern: int, offset: int, length: int) -> None:
        """A guest's write that has to succeed."""
        said = self.io(device, f"write -P {pattern} {offset} {length}")
        assert said.startswith(f"wrote {length}/{length}"), said

    def freeze(self, disk: Disk, copy: Path) -> Path:
        """A flat copy of a disk as the guest sees it now."""
        # QEMU keeps metadata in memory: without a flush, a reader of the file sees an older disk.
        assert disk.path
        self.io(disk.name, "flush")
        qemu_img("convert", "-U", "-f", disk.format, "-O", "qcow2", disk.path, copy)
        return copy

    @property
    def status(self) -> str:
        """The run state."""
        return str(self.qmp.execute("query-status")["status"])

    @property
    def block_jobs(self) -> list[dict[str, t.Any]]:
        """The block jobs as QEMU lists them."""
        jobs: list[dict[str, t.Any]] = self.qmp.execute("query-block-jobs")
        return jobs

    @property
    def job(self) -> dict[str, t.Any]:
        """The one block job there is."""
        jobs = self.block_jobs
        assert len(jobs) == 1, jobs
        return jobs[0]

    @property
    def fdsets(self) -> list[dict[str, t.Any]]:
        """The fd sets as QEMU lists them."""
        fdsets: list[dict[str, t.Any]] = self.qmp.execute("query-fdsets")
        return fdsets

    def bitmaps(self, node: str) -> dict[str, dict[str, t.Any]]:
        """The named dirty bitmaps of a node."""
        nodes = self.qmp.execute("query-named-block-nodes", flat=True)
        found = next(entry for entry in nodes if entry["node-name"] == node)
        return {bitmap["name"]: bitmap for bitmap in found.get("dirty-bitmaps", []) if bitmap.get("name")}

    @property
    def tcp_port(self) -> int:
        """The port of the monitor on 127.0.0.1."""
        chardevs = self.qmp.execute("query-chardev")
        address = next(chardev["filename"] for chardev in chardevs if "tcp:" in chardev["filename"])
        return int(address.split(",")[0].rsplit(":", 1)[1])


__all__ = ["PATIENCE", "Disk", "Qemu", "Qmp", "QmpError", "faulty", "wait_until"]


def run_for_a_moment(vm: Qemu) -> None:
    """Let a paused VM run for a moment: QEMU 7.2 closes files that were passed to it only then."""
    vm.qmp.execute("cont")
    # And when a monitor is let go.
    Qmp(vm.monitor).close()
    vm.qmp.execute("stop")

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Small real file systems and block devices. They need root, and are always unmounted and detached at the end."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from collections.abc import Sequence

FILLER = "somebody-elses-data"

MS_REMOUNT = 32


def _run(*command: str | Path, pass_fds: Sequence[int] = ()) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=pass_fds,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def _append(fd: int, length: int) -> bool:
    try:
        os.posix_fallocate(fd, os.fstat(fd).st_size, length)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


class FileSystem:
    """A mounted file system: `tmpfs`, `ext4`, or `ext2`, whose fallocate says EOPNOTSUPP: it cannot reserve space."""

    def __init__(self, path: Path, kind: str, size: int) -> None:
        self.path = path
        self._kind = kind
        self._size = size
        self._image = path.with_name(path.name + ".img")

    def __enter__(self) -> FileSystem:
        self.path.mkdir()
        if self._kind == "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", self.path)
        else:
            with self._image.open("wb") as image:
                image.truncate(self._size)
            # No blocks kept back for root: full is to be full for everybody. Blocks as large as a page of memory: with
            # smaller ones, a loop device was seen to store 4 KiB of 64 and report no error.
            _run(f"mkfs.{self._kind}", "-q", "-F", "-m", "0", "-b", "4096", self._image)
            _run("mount", "-o", "loop", self._image, self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            # The files of an io_uring, which QEMU has since 11, are closed by the kernel some time after its end.
            wait_until(self._unmounted, f"the end of all who have a file open in {self.path}", 10)
        except AssertionError:
            # Somebody still has a file open there: it goes all the same, but the test is to know.
            _run("umount", "--lazy", self.path)
            raise

    def _unmounted(self) -> bool:
        return subprocess.run(["umount", self.path], stderr=subprocess.DEVNULL, check=False).returncode == 0

    @property
    def free(self) -> int:
        """Bytes that are free."""
        free = os.statvfs(self.path)
        return free.f_bavail * free.f_frsize

    @property
    def source(self) -> str:
        """The device that is mounted."""
        return _run("findmnt", "-n", "-o", "SOURCE", "--mountpoint", self.path)

    def fill(self, leave: int = 0) -> None:
        """Let somebody else write until there is no block left, or only `leave` bytes."""
        fd = os.open(self.path / FILLER, os.O_RDWR | os.O_CREAT)
        try:
            for piece in (MIB, 64 << 10, 4096, 512):
                while self.free > leave and _append(fd, min(piece, max(512, self.free - leave))):
                    pass
            os.fsync(fd)
        finally:
            os.close(fd)

    def clear(self) -> None:
        """Take away what `fill` has written."""
        (self.path / FILLER).unlink()

    def grow(self, size: int) -> None:
        """Make a tmpfs larger while it is in use (containers may not resize an ext4)."""
        # mount(8) looks into the table of mounts, which other tests change at the same time, and can miss this one.
        libc = ctypes.CDLL(None, use_errno=True)
        options = ctypes.c_char_p(f"size={size}".encode())
        if libc.mount(b"tmpfs", os.fsencode(self.path), b"tmpfs", ctypes.c_ulong(MS_REMOUNT), options) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))

    def make_read_only(self) -> None:
        """Remount it, with all that is in it."""
        _run("mount", "-o", "remount,ro", self.path)


class PassThrough:
    """Another view of a directory, through FUSE, that keeps no permissions, as network file systems often do."""

    def __init__(self, path: Path, below: Path) -> None:
        self.path = path
        self._below = below

    def __enter__(self) -> PassThrough:
        self.path.mkdir()
        self._below.mkdir()
        _run("bindfs", "--chmod-deny", "--chown-deny", self._below, self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        _run("umount", self.path)


class Mirror:
    """Another view of a directory, through FUSE, by a server that can be slow (see bindfs(1)), or stopped."""

    def __init__(self, path: Path, below: Path, *options: str) -> None:
        self.path = path
        self._command = ["bindfs", "-f", *options, str(below), str(path)]

    def __enter__(self) -> Mirror:
        self.path.mkdir()
        self._server = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        wait_until(self.path.is_mount, "the mount of bindfs")
        return self

    def __exit__(self, *exc: object) -> None:
        self.go_on()
        _run("umount", self.path)
        self._server.wait()

    @property
    def pid(self) -> int:
        """The server's process id. Stopped (SIGSTOP), it keeps all waiting who ask it for something."""
        return self._server.pid

    def go_on(self) -> None:
        """Let a server go on that was stopped."""
        self._server.send_signal(signal.SIGCONT)


class NbdServer:
    """An image behind the UNIX socket C(path), as the guest sees it or, for the format raw, as it stands there."""

    def __init__(self, path: Path, image: Path, fmt: str = "raw", export: str = "") -> None:
        self.path = path
        self.export = export
        self._pid = path.with_name(path.name + ".pid")
        names = ["-x", export] if export else []
        self._command = [
            "qemu-nbd",
            "-t",
            "-e",
            "8",
            "-f",
            fmt,
            *names,
            "-k",
            str(path),
            "--pid-file",
            str(self._pid),
            str(image),
        ]

    def __enter__(self) -> NbdServer:
        self._server = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        wait_until(lambda: self._pid.exists() or self._server.poll() is not None, "the start of qemu-nbd")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.kill()
        self._server.wait()

    @property
    def url(self) -> str:
        """The name by which QEMU finds it."""
        return f"nbd+unix:///{self.export}?socket={self.path}"

    def stop(self) -> None:
        """Keep all waiting who ask it for something."""
        self._server.send_signal(signal.SIGSTOP)


class LoopDevice:
    """A block device of `size` bytes, kept in a file."""

    def __init__(self, backing: Path, size: int) -> None:
        self._backing = backing
        with backing.open("wb") as image:
            image.truncate(size)
        self.path = Path()

    def __enter__(self) -> LoopDevice:
        self.path = Path(_run("losetup", "--find", "--show", self._backing))
        return self

    def __exit__(self, *exc: object) -> None:
        _run("losetup", "--detach", self.path)


class DeadServer:
    """A mount whose server, of FUSE, says nothing: not even statvfs comes back from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._mounted = False

    def __enter__(self) -> DeadServer:
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0"
        _run("mount", "-i", "-t", "fuse", "-o", options, "none", self.path, pass_fds=[self._fd])
        self._mounted = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.unmount()
        os.close(self._fd)

    def unmount(self) -> None:
        """As the message of a probe says."""
        # To ask the path whether it is mounted would hang.
        if self._mounted:
            _run("umount", "--force", "--lazy", self.path)
            self._mounted = False

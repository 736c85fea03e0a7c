# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work with the entries of a directory by its descriptor: what a link points to is never read, changed or removed.

A path says what somebody has put there by now; a descriptor stays what was opened. Links count only in the path of the
first directory, which an admin has named.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .files import UNFINISHED, set_mode, step

if TYPE_CHECKING:
    from collections.abc import Iterator


FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
"""Nothing that is opened here is waited for: a named pipe may have stood there a moment ago."""
PLACE = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
REPLACE_TIMEOUT = 3.0
"""Seconds to wait until a file on SMB can be replaced: longer than anybody reads a document."""
RETRY_INTERVAL = 0.1


def exposed(path: str, status: os.stat_result) -> str:
    """Return how others than root and this user can change what stands at C(path); empty where they cannot."""
    user = os.geteuid()
    if status.st_uid in (0, user) and not status.st_mode & OF_OTHERS:
        return ""
    return (
        f"{path} is {stat.filemode(status.st_mode)} of user {status.st_uid}, so users other than root and user {user}"
        " can change its content. Remove their right to write (chown, chmod go-w), or accept it with trust_others:"
        " true"
    )


class WrongEntry(BackupError):
    """Something else stands at a place than what belongs there, or more than can belong there."""


class LinkedEntry(WrongEntry):
    """A symbolic link stands there, to C(target): what belongs there may be elsewhere."""

    def __init__(self, message: str, target: str) -> None:
        super().__init__(message)
        self.target = target


class Directory:
    """An open directory. A name is that of an entry in it; errors tell the whole path. A context, which closes it."""

    __slots__ = ("fd", "path")

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def at(cls, path: str, *names: str) -> Directory:
        """Open the directory at C(path), and of that one the directory C(names[0]), and so on.

        FileNotFoundError where one is missing, WrongEntry where something else stands in the place of one.
        """
        found = cls(path.rstrip("/"), os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for name in names:
            with found:
                found = found.directory(name)
        return found

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def join(self, name: str) -> str:
        """Return the path of an entry."""
        # Thousands are put together, and os.path.join takes longer than this.
        return f"{self.path}/{name}"

    # To look

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        with self._telling():
            return sorted(os.listdir(self.fd))

    def entries(self) -> list[os.DirEntry[str]]:
        """Return all entries, sorted by name. Most file systems tell what each is without being asked again."""
        with self._telling(), os.scandir(self.fd) as found:
            return sorted(found, key=attrgetter("name"))

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of an entry itself, be it a link; None where there is none."""
        try:
            return os.stat(_checked(self, name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._told(error, name) from None

    def is_directory(self, name: str) -> bool:
        """Return whether an entry is a directory, and no link to one."""
        found = self.status(name)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def directory(self, name: str) -> Directory:
        """Open a directory in this one. WrongEntry where something else stands there."""
        try:
            return Directory(self.join(name), os.open(_checked(self, name), PLACE, dir_fd=self.fd))
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise self.wrong(name, "a directory") from None
            raise self._told(error, name) from None

    def wrong(self, name: str, wanted: str) -> WrongEntry:
        """Return the error of an entry that is not C(wanted), with what it is."""
        found = self.status(name)
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something unknown") if found else "gone by now"
        if found and stat.S_ISLNK(found.st_mode):
            # Nobody reads it but people.
            target = os.readlink(name, dir_fd=self.fd)
            return LinkedEntry(
                f"{self.join(name)} is {kind} to {target}, and not {wanted}; a repository may not contain such links:"
                " move the target of the link back to this place, or mount it here",
                target,
            )
        return WrongEntry(f"{self.join(name)} is {kind}, and not {wanted}; it does not belong there: move it away")

    # To read

    def regular(self, name: str) -> os.stat_result:
        """Return the status of a regular file. FileNotFoundError where there is none, WrongEntry for another thing."""
        found = self.status(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.join(name))
        if not stat.S_ISREG(found.st_mode):
            raise self.wrong(name, "a file")
        return found

    def read(self, name: str, limit: int, found: os.stat_result | None = None) -> bytes:
        """Return the content of a regular file of at most C(limit) bytes. FileNotFoundError where there is none.

        WrongEntry where something else stands there, or a larger file. Nothing else is opened, and nothing waited for.
        C(found) is what regular() has returned: there may be thousands of files, so that few calls are made for each.
        """
        size = (found or self.regular(name)).st_size
        try:
            fd = _open(self, name, os.O_RDONLY)
            try:
                content = os.read(fd, min(size, limit) + 1)
                while len(content) != size and len(content) <= limit:
                    # It has grown, or comes piece by piece.
                    more = os.read(fd, limit + 1 - len(content))
                    if not more:
                        break
                    content += more
            finally:
                os.close(fd)
        except OSError as error:
            raise self._told(error, name) from None
        if len(content) > limit:
            raise WrongEntry(
                f"{self.join(name)} has more than {limit} bytes, and a file of this kind never has so many; move it"
                " away"
            )
        return content

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file, which C(flags) may make, and return its descriptor. WrongEntry for another thing."""
        found = self.status(name)
        if found is None or stat.S_ISREG(found.st_mode):
            with self._telling(name):
                fd = _open(self, name, flags)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
        raise self.wrong(name, "a file")

    # To change

    def write(self, name: str, content: bytes, mode: int = 0o600) -> None:
        """Write a file onto stable storage, whole or not at all, in place of the one that is there, or of a link."""
        temporary = _checked(self, name) + UNFINISHED
        for each in (temporary, name):
            if self.is_directory(each):
                raise self.wrong(each, "a file")
        self.remove(temporary)
        with step(self.join(name), "it was written"), self._telling(name):
            fd = _open(self, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                while content:
                    content = content[os.write(fd, content) :]
                set_mode(self.join(temporary), mode, fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            _replace(self, temporary, self, name)
        self.sync()

    def make(self, name: str, mode: int = 0o700) -> None:
        """Make a directory; FileExistsError where anything has this name."""
        with self._telling(name):
            os.mkdir(_checked(self, name), mode, dir_fd=self.fd)

    def rename(self, name: str, new: str, to: Directory | None = None) -> None:
        """Give an entry another name, here or in the directory C(to). A file of that name goes (rename(2))."""
        place = to or self
        with self._telling(name):
            _replace(self, _checked(self, name), place, _checked(place, new))

    def remove(self, name: str) -> bool:
        """Unlink what is no directory, a link itself; False where there is nothing."""
        try:
            os.unlink(_checked(self, name), dir_fd=self.fd)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._told(error, name) from None
        return True

    def remove_directory(self, name: str) -> None:
        """Remove an empty directory."""
        with self._telling(name):
            os.rmdir(_checked(self, name), dir_fd=self.fd)

    def sync(self) -> None:
        """Make the renames in this directory last."""
        with step(self.path, "its entries were brought to stable storage"):
            os.fsync(self.fd)

    @contextmanager
    def _telling(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._told(error, name) from None

    def _told(self, error: OSError, name: str) -> OSError:
        """Make an error tell the whole path: the system knows a name, or a number."""
        error.filename = self.join(name) if name else self.path or "/"
        error.filename2 = None
        return error


def _checked(directory: Directory, name: str) -> str:
    """Return a name that leads nowhere else; BackupError for another."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise BackupError(f"{directory.path}: {name!r} is no name of a file in it")
    return name


def _replace(source: Directory, name: str, place: Directory, new: str) -> None:
    """Rename, as rename(2) does.

    On SMB, a file that somebody has open cannot be replaced, and Linux has had it removed when it says so: it is tried
    until they have read it.
    """
    deadline = time.monotonic() + REPLACE_TIMEOUT
    while True:
        try:
            os.replace(name, new, src_dir_fd=source.fd, dst_dir_fd=place.fd)
        except PermissionError as error:
            if error.errno != errno.EACCES or time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_INTERVAL)
        else:
            return


def _open(directory: Directory, name: str, flags: int) -> int:
    try:
        return os.open(_checked(directory, name), flags | FLAGS, 0o600, dir_fd=directory.fd)
    except BlockingIOError:
        # Somebody has a lease on it, such as an NFS client of this machine. It is waited for, but for nothing else.
        place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise
            return os.open(f"/proc/self/fd/{place}", flags & ~(os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC)
        finally:
            os.close(place)

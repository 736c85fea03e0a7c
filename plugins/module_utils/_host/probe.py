# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ask a file system whether it answers at all: calls on a dead NFS server never return, and nothing interrupts them.

A child process asks, and is left behind where it hangs: the module lives on, and says what is wrong. The child ends
when the file system comes back, or goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import time
from typing import TYPE_CHECKING

from .._common.errors import SHORTAGES, BackupError, Unasked, why
from .files import scratch

if TYPE_CHECKING:
    from typing import NoReturn


PREFIX = ".vmfleet.json."
"""What the name of a file begins with that is made to see whether files can be made.

A repository that is being made begins like this too (C(_repository/access.py)), and passes over both.
"""
TIMEOUT = 30.0
"""Seconds until a file system counts as hanging: a busy one may need a while to flush."""
INTERVAL = 10.0
"""Seconds for which a Watch trusts an answer."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A full file system has answered; what that means is said where space is counted."""
UNWRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""Answers of a file system that is not to be written to."""
PROC_FDS = "/proc/self/fd"
_left_behind: list[int] = []
"""The children that hung when they were last looked at."""


class Probe:
    """One question to the file system of C(path), asked from the moment on that the object is made.

    It reads the directory; with C(writing) it also makes, flushes and removes a file, which a file system whose disk
    is gone cannot do from memory. Belongs to the event loop that runs, and has to be closed. Raises Unasked where there
    is nobody to ask.
    """

    def __init__(self, path: str, writing: bool = False) -> None:
        self.path = path
        self.asked = time.monotonic()
        _left_behind[:] = [child for child in _left_behind if not _ended(child)]
        loop = asyncio.get_running_loop()
        try:
            self._source, self._child = _start(path, writing)
        except OSError as error:
            reason = f"repository: no process could be started to ask the file system of {path}: {why(error)}"
            raise Unasked(reason) from error
        self._answer: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(self._source, self._receive)

    def _receive(self) -> None:
        # From now on the pipe can be read only to its end, which would call this again and again.
        self._answer.get_loop().remove_reader(self._source)
        self._answer.set_result(os.read(self._source, 16))

    async def answered(self, timeout: float) -> bool:
        """Wait for an answer until C(timeout) seconds after the question; return whether there is one."""
        left = self.asked + timeout - time.monotonic()
        done, _pending = await asyncio.wait({self._answer}, timeout=max(0.0, left))
        return bool(done)

    def check(self) -> None:
        """Raise the OSError that the file system has answered with, where it has; Unasked where it was not asked."""
        answer = self._answer.result()
        asker = f"repository: the process that asked the file system of {self.path}"
        if not answer:
            raise Unasked(f"{asker} was killed")
        code = int(answer)
        if code in SHORTAGES:
            raise Unasked(f"{asker} could not do so: {os.strerror(code)}")
        if code:
            raise OSError(code, os.strerror(code), self.path)

    def close(self) -> None:
        """Let go of the child, whatever it does."""
        self._answer.get_loop().remove_reader(self._source)
        os.close(self._source)
        # A child that has answered ends at once.
        if not _ended(self._child, wait=self._answer.done()):
            _left_behind.append(self._child)


async def probe(path: str, timeout: float | None = None, writing: bool = False) -> None:
    """Return once the file system of C(path) has answered; BackupError where it hangs, OSError where it refuses."""
    timeout = TIMEOUT if timeout is None else timeout
    question = Probe(path, writing)
    try:
        if not await question.answered(timeout):
            raise BackupError(_hangs(path, timeout))
        question.check()
    finally:
        question.close()


async def answers(path: str) -> bool:
    """Return whether the file system of C(path) answers, be it with an error."""
    question = Probe(path)
    try:
        return await question.answered(TIMEOUT)
    finally:
        question.close()


async def probe_if_there(path: str, writing: bool = False) -> None:
    """Do as probe() does for a directory that may be missing: then the nearest one above it is asked.

    That it is missing, or cannot be written to, is no error here: whoever opens it knows what that means.
    """
    try:
        await probe(path, writing=writing)
    except FileNotFoundError:
        above = os.path.dirname(path)
        if above != path:
            await probe_if_there(above, writing)
    except OSError as error:
        if not writing or error.errno not in UNWRITABLE:
            raise BackupError(f"repository: {path}: {why(error)}") from error


class Watch:
    """Asks the same file system again and again, with one child at most, whoever and how many ask."""

    def __init__(self, path: str, timeout: float | None = None, writing: bool = False) -> None:
        self.path = path
        self.timeout = TIMEOUT if timeout is None else timeout
        self.writing = writing
        self.hangs = False
        """Whether there was no answer when it was asked last. One that refuses has answered."""
        self.unasked = ""
        """Why nobody could ask it for longer than C(timeout); empty where somebody could."""
        self._unasked_since: float | None = None
        self._question: Probe | None = None
        self._good_until = 0.0

    async def ask(self) -> str:
        """Return why the file system cannot be used now; empty where it answers, or has less than C(INTERVAL) ago.

        The first one to meet with a file system that hangs waits C(timeout) for it; those after that do not wait.
        Empty, too, where nobody could ask, which is no fault of the file system: the next time, somebody may.
        """
        try:
            reason = await self._ask()
        except Unasked as error:
            now = time.monotonic()
            self._unasked_since = now if self._unasked_since is None else self._unasked_since
            if now - self._unasked_since > self.timeout:
                self.unasked = f"{error}; that it hangs could not have been seen for more than {self.timeout:g} s"
            return ""
        self._unasked_since, self.unasked = None, ""
        return reason

    async def _ask(self) -> str:
        if self._question is None and time.monotonic() < self._good_until:
            return ""
        question = self._question = self._question or Probe(self.path, self.writing)
        self.hangs = not await question.answered(self.timeout)
        if self.hangs:
            return _hangs(self.path, self.timeout)
        if self._question is question:
            self._question = None
            question.close()
        try:
            question.check()
        except OSError as error:
            return f"repository: {self.path}: {why(error)}"
        self._good_until = time.monotonic() + INTERVAL
        return ""


def _hangs(path: str, timeout: float) -> str:
    return (
        f"repository: {path} does not answer within {timeout:g} s: its file system hangs; bring it back, or unmount it"
        " (umount --force --lazy)"
    )


def _ended(child: int, wait: bool = False) -> bool:
    """Return whether a child has ended, and leave no zombie of it. C(wait) waits for its end."""
    try:
        return os.waitpid(child, 0 if wait else os.WNOHANG)[0] == child
    except ChildProcessError:
        # With SIGCHLD ignored, as the module may have inherited it, children vanish by themselves.
        return True


def _start(path: str, writing: bool) -> tuple[int, int]:
    """Start the child; return the file descriptor that its answer will come from, and its pid."""
    source, sink = os.pipe()
    # The module's handlers turn a signal into an exception, which would lead the child into the module's code.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.fork()
        if child == 0:
            _live(path, writing, sink)
    except OSError:
        os.close(source)
        raise
    finally:
        os.close(sink)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return source, child


def _live(path: str, writing: bool, sink: int) -> NoReturn:
    """Live as the child. It uses system calls only: locks of the parent's threads may be held for ever."""
    try:
        _close_inherited(path, sink)
        os.write(sink, b"%d" % _ask(path, writing))
    finally:
        os._exit(0)


def _close_inherited(path: str, sink: int) -> None:
    """Close all but C(sink): a lock, a monitor or Ansible's end of stdout is not to last as long as a child that hangs.

    Files below C(path) come last, sockets and pipes first: to close a file flushes it on NFS, which can hang as well.
    """
    opened = {int(fd): "" for fd in os.listdir(PROC_FDS)}
    for fd in opened:
        # One of them has listed the others, and is closed already.
        with contextlib.suppress(OSError):
            opened[fd] = os.readlink(f"{PROC_FDS}/{fd}")
    for fd in sorted(opened, key=lambda fd: (opened[fd].startswith(path), opened[fd].startswith("/"))):
        if fd != sink:
            with contextlib.suppress(OSError):
                os.close(fd)


def _ask(path: str, writing: bool) -> int:
    """Return the errno that the file system answers with; 0 where all is well."""
    try:
        os.statvfs(path)
        with os.scandir(path) as entries:
            next(entries, None)
        if writing:
            _write(path)
    except OSError as error:
        return 0 if error.errno in NO_SPACE else error.errno or errno.EIO
    return 0


def _write(path: str) -> None:
    with scratch(path, PREFIX) as fd:
        os.fsync(fd)

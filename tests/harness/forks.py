# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Child processes that begin as a copy of this one, and therefore need no time for imports."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import selectors
import signal
import sys
import threading
import time
import typing as t
import warnings

if t.TYPE_CHECKING:
    from collections.abc import Callable

    from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces

PR_SET_PDEATHSIG = 1

# What Python itself sets when it starts; everything else has its default.
PYTHONS_SIGNALS: dict[int, t.Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGPIPE: signal.SIG_IGN,
    signal.SIGXFSZ: signal.SIG_IGN,
}

_libc = ctypes.CDLL(None, use_errno=True)


class Timeout(Exception):
    """A process has not ended in time."""


class Fork:
    """Runs `main` as if it were a program of its own that gets `stdin`. It dies with the thread that has started it.

    Nothing of this process is seen or held there: no file but pipes as stdin, stdout and stderr, no handler of a
    signal, no hook of the test framework.
    """

    def __init__(self, main: Callable[[], None], stdin: bytes, inside: NameSpaces | None = None) -> None:
        """It runs in the name spaces `inside` where these are given; its process id is still the one here."""
        pipes = [os.pipe() for _dummy in range(3)]
        (source, feed), *told = pipes
        self._said: dict[int, bytearray] = {read_end: bytearray() for read_end, _write_end in told}
        self._open = set(self._said)
        self._status: int | None = None
        parent = os.getpid()
        # A signal that comes too early is not for the handlers of this process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with warnings.catch_warnings(), inside.for_children() if inside else contextlib.nullcontext():
                # The other threads belong to pytest-xdist, and hold no lock that a module needs.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
                if self.pid == 0:
                    _live(main, parent, (source, *(write_end for _read_end, write_end in told)), inside)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in (source, *(write_end for _read_end, write_end in told)):
            os.close(fd)
        # One that is killed at once does not read to the end.
        with contextlib.suppress(BrokenPipeError), open(feed, "wb", buffering=0) as sink:
            sink.write(stdin)

    def poll(self) -> int | None:
        """The exit status, or the negative number of the signal that has killed it; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it says on stdout and stderr, once it has ended and nobody holds the other ends of these any more."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for fd in self._open:
                selector.register(fd, selectors.EVENT_READ)
            while self._open:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise Timeout
                for key, _events in ready:
                    piece = os.read(key.fd, 1 << 16)
                    self._said[key.fd] += piece
                    if not piece:
                        selector.unregister(key.fd)
                        self._open.remove(key.fd)
                        os.close(key.fd)
        while self.poll() is None:
            if time.monotonic() >= deadline:
                raise Timeout
            time.sleep(0.001)
        output, errors = (said.decode("utf-8", "replace") for said in self._said.values())
        return output, errors


def _live(main: Callable[[], None], parent: int, streams: tuple[int, ...], inside: NameSpaces | None) -> t.NoReturn:
    """The child's whole life."""
    status = 1
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # A parent of other name spaces has no process id in these.
        if os.getppid() == (0 if inside else parent):
            _forget(streams)
            if inside:
                inside.enter()
            status = _run(main)
    finally:
        os._exit(status)


def _forget(streams: tuple[int, ...]) -> None:
    """Be as a new interpreter is."""
    # What is there now stays there: to look through it would copy all its memory, and to free it would close files
    # under numbers that the module has got for its own by then.
    gc.freeze()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, PYTHONS_SIGNALS.get(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    # What asyncio says of a lost exception goes to stderr then. pytest's handlers stand at other loggers as well (those
    # that do not propagate), and one of them would write to its file by a number that is another file's by now.
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.NullHandler)]
    logging.root.setLevel(logging.WARNING)


def _run(main: Callable[[], None]) -> int:
    """Run `main` to its end, whatever that is; returns the exit status."""
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 - nobody else is there to say what happened
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            # As Python does, so that whoever waits knows what has ended it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    sys.stdout.flush()
    sys.stderr.flush()
    return status

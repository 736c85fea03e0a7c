# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keep calls on a file system that may begin to hang out of the way: a call in a thread, a module in a child process.

Such a call never returns, and nothing can interrupt it. Whoever waits for one in a thread gets an error when the file
system is seen to hang; the call is left behind with its thread, and with the locks that were taken for it.
A process does not end before the last call of its threads has: not for a signal, nor for itself. Ansible waits for the
process that it has started, which therefore leaves all calls that may never return to its child.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from .._common.errors import RepositoryHangs
from .._common.module import run_module
from .._common.printable import printable
from .files import DirectCalls
from .probe import Watch
from .threads import CallThread, answer_in_thread, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, NoReturn, ParamSpec, TypeVar

    from ansible.module_utils.basic import AnsibleModule

    P = ParamSpec("P")
    T = TypeVar("T")
    Main = Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]]


PR_SET_PDEATHSIG = 1
MOMENT = 1.0
"""Seconds that a call may take before the file system is asked whether it answers at all."""
GARBAGE = 10_000
"""New objects after which unused ones are looked for. An answer of QEMU about a disk of many layers has thousands."""
LONG_AT_ONCE = 6
"""How many calls that take long are made at the same time."""


class ThreadedCalls(DirectCalls):
    """Calls in threads: run() and close() one after the other in one of them, run_long() beside them.

    From the moment on that the file system is seen to hang, all of them raise RepositoryHangs, and nothing is begun any
    more. Belongs to the event loop that runs. Leaving the context ends the thread, unless that hangs.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._hangs = ""
        self._awaited: set[asyncio.Future[Any]] = set()
        self._asking: asyncio.Task[None] | None = None
        self._thread: CallThread | None = None
        self._places = asyncio.Semaphore(LONG_AT_ONCE)

    async def __aenter__(self) -> ThreadedCalls:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._thread is None:
            return
        # To close a file can hang as well, and nobody has waited for that.
        with contextlib.suppress(RepositoryHangs):
            await self.run(self._thread.end)
            self._thread.join()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function) after the calls before it, and return what it returns; RepositoryHangs where it hangs."""
        answer = self._begin()
        self._put(lambda: self._call(answer, lambda: function(*args, **kwargs)))
        found: T = await answer
        return found

    async def run_long(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call C(function) beside the others, which do not wait for it, and return what it returns."""
        async with self._places:
            answer = self._begin()
            call = (answer, lambda: function(*args, **kwargs))
            threading.Thread(target=self._call, args=call, daemon=True).start()
            found: T = await answer
            return found

    def close(self, fd: int) -> None:
        self._put(lambda: _close(fd))

    def _put(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = CallThread()
        self._thread.put(work)

    def _call(self, answer: asyncio.Future[Any], function: Callable[[], Any]) -> None:
        # Where it hangs, its caller was told already.
        if not self._hangs:
            answer_in_thread(answer, function)

    def _begin(self) -> asyncio.Future[Any]:
        """Return an answer to wait for."""
        if self._hangs:
            raise RepositoryHangs(self._hangs)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._awaited.add(answer)
        answer.add_done_callback(self._awaited.discard)
        if self._asking is None:
            self._asking = loop.create_task(self._ask())
        return answer

    async def _ask(self) -> None:
        """Watch over the file system for as long as somebody waits for an answer."""
        try:
            while self._awaited:
                await asyncio.sleep(MOMENT)
                await self._give_up_what_hangs()
        finally:
            self._asking = None

    async def _give_up_what_hangs(self) -> None:
        reason = await self.watch.ask() if self._awaited else ""
        if reason and self.watch.hangs:
            self._hangs = reason
            for answer in self._awaited:
                settle(answer, None, RepositoryHangs(reason))


def _close(fd: int) -> None:
    # Nobody can do anything about an error. The fsync before it has told those that matter.
    with contextlib.suppress(OSError):
        os.close(fd)


def run_in_worker(module: AnsibleModule, main: Main, watched: str = "", writing: bool = False) -> NoReturn:
    """Do as run_module() does, and end even where the child cannot.

    What C(main) does not see to itself, can be seen to from here: when the repository at C(watched) is seen to hang,
    the child is killed, and the module fails. C(writing) is how it is asked.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    source, sink = os.pipe()
    said = os.memfd_create("stdout"), os.memfd_create("stderr")
    child = os.fork()
    if child == 0:
        _work(module, main, parent, sink, said)
    os.close(sink)
    reason = _wait(source, watched, writing)
    if reason:
        os.kill(child, signal.SIGKILL)
        module.fail_json(msg=printable(reason))
    _repeat(said)
    # The child has printed the whole result.
    raise SystemExit(_leave(child, os.read(source, 2)))


def _wait(source: int, watched: str, writing: bool) -> str:
    """Wait for the child's last word; return why it will not come."""
    timeout = MOMENT if watched else None
    return "" if select.select([source], [], [], timeout)[0] else asyncio.run(_watch_over(source, watched, writing))


async def _watch_over(source: int, watched: str, writing: bool) -> str:
    watch = Watch(watched, writing=writing)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(source, ended.set)
    while True:
        # Nothing more will come only where the file system hangs. All other work may take as long as it needs.
        reason = await watch.ask()
        if ended.is_set():
            return ""
        if watch.hangs:
            return reason
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), MOMENT)


def _repeat(said: tuple[int, int]) -> None:
    """Say what the child has said."""
    for place, file in enumerate(said, start=1):
        os.lseek(file, 0, os.SEEK_SET)
        with open(file, "rb") as source, open(place, "wb", closefd=False) as sink:
            shutil.copyfileobj(source, sink)


def _leave(child: int, word: bytes) -> int:
    """Return the exit status that the child has told. Where a signal has killed it, that kills this process too."""
    status, left_behind = word or (0, False)
    if not left_behind:
        # Where SIGCHLD is ignored, nothing is left to wait for.
        with contextlib.suppress(ChildProcessError):
            ended = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(ended):
                os.kill(os.getpid(), os.WTERMSIG(ended))
    return status if word else 1


def _work(module: AnsibleModule, main: Main, parent: int, sink: int, said: tuple[int, int]) -> NoReturn:
    """Live as the child."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # A child that cannot end keeps its files open. Ansible reads the module's output to its end, and would wait.
        for place, file in enumerate((os.open(os.devnull, os.O_RDONLY), *said)):
            os.dup2(file, place)
        # What is loaded by now is never garbage.
        gc.freeze()
        gc.set_threshold(GARBAGE)
        if os.getppid() == parent:
            status = _run(module, main)
            left_behind = threading.active_count() > 1
            os.write(sink, bytes((status, left_behind)))
    finally:
        os._exit(status)


def _run(module: AnsibleModule, main: Main) -> int:
    """Run the module to its end, whatever that is; return the exit status."""
    status = 1
    try:
        run_module(module, main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status

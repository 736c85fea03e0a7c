# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Do a module's work in a child process, which is left behind where the repository's file system hangs.

A process does not end before the last call of its threads has: not for a signal, nor for itself. Ansible waits for the
process that it has started, which therefore leaves all calls that may never return to its child.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING

from .io_thread import MOMENT
from .probe import Watch
from .run_module import run_module

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, NoReturn

    from ansible.module_utils.basic import AnsibleModule

    Main = Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]]


PR_SET_PDEATHSIG = 1


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
        module.fail_json(msg=reason)
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

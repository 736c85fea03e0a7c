# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process that works in another one, and ends as that does, or before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from ansible.module_utils.basic import AnsibleModule

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import probe, worker
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import run_in_worker
from ansible_collections.vmfleet.backup.tests.harness.forks import Fork
from ansible_collections.vmfleet.backup.tests.harness.modules import module_input
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Task = Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]]


def start(task: Task, watched: str = "", children: int = signal.SIG_DFL) -> Fork:
    """A module that does this; `children` is what it has inherited for SIGCHLD."""

    def main() -> None:
        sys.argv = ["module"]
        signal.signal(signal.SIGCHLD, children)
        run_in_worker(AnsibleModule({}), task, watched)

    return Fork(main, module_input({}).encode())


def said(process: Fork) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.communicate(PATIENCE)[0])
    return found


async def succeed(_module: AnsibleModule) -> dict[str, Any]:
    return {"changed": False, "worker": os.getpid()}


async def fail(_module: AnsibleModule) -> dict[str, Any]:
    raise BackupError("it does not work", why="so")


async def break_down(_module: AnsibleModule) -> dict[str, Any]:
    raise ZeroDivisionError


async def kill_itself(_module: AnsibleModule) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def succeed_and_leave_a_thread(_module: AnsibleModule) -> dict[str, Any]:
    threading.Thread(target=time.sleep, args=(2 * PATIENCE,)).start()
    return {"changed": False}


async def sleep(_module: AnsibleModule) -> dict[str, Any]:
    await asyncio.sleep(2 * PATIENCE)
    raise AssertionError


def test_the_result_is_the_childs() -> None:
    process = start(succeed)
    assert said(process)["worker"] != process.pid
    assert process.poll() == 0


def test_so_is_the_failure() -> None:
    process = start(fail)
    found = said(process)
    assert (found["failed"], found["msg"], found["why"]) == (True, "it does not work", "so")
    assert process.poll() == 1


def test_a_defect_shows() -> None:
    process = start(break_down)
    output, errors = process.communicate(PATIENCE)
    assert not output
    assert "ZeroDivisionError" in errors
    assert process.poll() == 1


def test_a_child_that_is_killed() -> None:
    process = start(kill_itself)
    assert process.communicate(PATIENCE) == ("", "")
    assert process.poll() == -signal.SIGKILL


def test_a_thread_that_does_not_end_holds_up_nobody() -> None:
    process = start(succeed_and_leave_a_thread)
    found = said(process)
    # ansible-core up to 2.20 puts it in by default.
    found.pop("invocation", None)
    assert found == {"changed": False}
    assert process.poll() == 0


def test_children_that_vanish_by_themselves() -> None:
    process = start(fail, children=signal.SIG_IGN)
    assert said(process)["failed"] is True
    assert process.poll() == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    async def tell_and_sleep(module: AnsibleModule) -> dict[str, Any]:
        (tmp_path / "new").write_text(str(os.getpid()))
        (tmp_path / "new").rename(tmp_path / "child")
        return await sleep(module)

    process = start(tell_and_sleep)
    wait_until((tmp_path / "child").exists, "the child")
    process.send_signal(number)
    # Comes back when nobody holds its output any more.
    process.communicate(PATIENCE)
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not _is_alive(child), "the end of the child")


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_child_in_a_repository_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MOMENT", 0.01)
    monkeypatch.setattr(probe, "INTERVAL", 0.01)
    # So long a healthy one may take on a busy machine.
    monkeypatch.setattr(probe, "TIMEOUT", 2.0)
    hangs = tmp_path / "hangs"

    def ask(*_args: Any) -> int:
        while hangs.exists():
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(probe, "_ask", ask)
    process = start(sleep, str(tmp_path))
    time.sleep(0.5)
    assert process.poll() is None
    hangs.touch()
    assert f"{tmp_path} does not answer" in said(process)["msg"]
    assert process.poll() == 1
    hangs.unlink()

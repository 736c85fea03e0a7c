# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Asking a file system, and what becomes of the child that asks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Unasked
from ansible_collections.vmfleet.backup.plugins.module_utils._host import probe as host_probe
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Probe, Watch, probe, probe_if_there
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import check_creatable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import NoReturn

AT_ONCE = 0.01
"""Seconds to wait for somebody who does not answer, however long one waits."""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The pids of all children that were forked. None of them outlives the test."""
    pids: list[int] = []
    fork = os.fork

    def remember() -> int:
        pid = fork()
        pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", remember)
    yield pids
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    host_probe._left_behind.clear()


def exists(pid: int) -> bool:
    """Whether there is such a process; a zombie is one."""
    return os.path.exists(f"/proc/{pid}")


class HungFileSystem:
    """A file system that does not answer until it is told to: its statvfs waits for a writer of a FIFO."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._gate = directory / "gate"
        self._asked = directory / "asked"
        self._stack = stack
        os.mkfifo(self._gate)

    def statvfs(self, _path: str) -> None:
        # A file would be open for a moment after it is there, and some tests count the child's open files.
        self._asked.mkdir(exist_ok=True)
        os.close(os.open(self._gate, os.O_RDONLY))

    @property
    def asked(self) -> bool:
        return self._asked.exists()

    def come_back(self) -> None:
        # Left open: whoever asks later is answered as well.
        self._stack.callback(os.close, os.open(self._gate, os.O_RDWR))


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HungFileSystem]:
    (tmp_path / "control").mkdir()
    with contextlib.ExitStack() as stack:
        file_system = HungFileSystem(tmp_path / "control", stack)
        monkeypatch.setattr(os, "statvfs", file_system.statvfs)
        yield file_system


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "repository").mkdir()
    return str(tmp_path / "repository")


@pytest.fixture
def named_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as NFS, where every file has a name."""

    def open_named(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opened(path, flags, mode)

    opened = os.open
    monkeypatch.setattr(os, "open", open_named)


@pytest.mark.usefixtures("named_only")
def test_good_file_system_without_nameless_files(path: str) -> None:
    asyncio.run(probe(path, writing=True))
    assert not os.listdir(path)


@pytest.mark.usefixtures("named_only")
def test_refusal_of_a_file_system_without_nameless_files(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fails_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        asyncio.run(probe(path, writing=True))
    assert not os.listdir(path)


@pytest.mark.parametrize("writing", [False, True])
def test_good_file_system(path: str, writing: bool, children: list[int]) -> None:
    asyncio.run(probe(path, writing=writing))
    assert len(children) == 1
    assert not exists(children[0])
    assert not os.listdir(path)


def test_child_that_vanishes_by_itself(path: str, children: list[int]) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        asyncio.run(probe(path))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not exists(children[0])


def fails_with(code: int) -> Callable[..., None]:
    def fail(*_arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["statvfs", "scandir", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_refusal(call: str, code: int, path: str, children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, fails_with(code))
    with pytest.raises(OSError, match=os.strerror(code)) as refused:
        asyncio.run(probe(path, writing=True))
    assert (refused.value.errno, refused.value.filename) == (code, path)
    assert not exists(children[0])
    monkeypatch.undo()
    # What was made for the question is gone.
    assert not os.listdir(path)


def test_refusal_of_a_missing_directory(path: str) -> None:
    with pytest.raises(FileNotFoundError) as refused:
        asyncio.run(probe(path + "/missing"))
    assert refused.value.filename == path + "/missing"


def test_directory_that_may_be_missing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(probe_if_there(path + "/missing"))
    asyncio.run(probe_if_there(path))
    monkeypatch.setattr(os, "statvfs", fails_with(errno.EIO))
    with pytest.raises(BackupError, match=f"^repository: {path}: {os.strerror(errno.EIO)}$"):
        asyncio.run(probe_if_there(path))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_directory_that_cannot_be_written_to_is_none_that_hangs(
    code: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fails_with(code))
    asyncio.run(probe_if_there(path, writing=True))
    monkeypatch.setattr(os, "fsync", fails_with(errno.EIO))
    with pytest.raises(BackupError, match=f"^repository: {path}: {os.strerror(errno.EIO)}$"):
        asyncio.run(probe_if_there(path, writing=True))


def test_directory_above_one_that_is_missing_is_asked(
    path: str, hung: HungFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the directories that are missing, each of which is asked for by a process of its own.
    monkeypatch.setattr(host_probe, "TIMEOUT", 5)
    missing = path + "/missing/repository"
    statvfs = os.statvfs

    def hang_here(asked: str) -> None:
        if asked == path:
            statvfs(asked)
        elif not os.path.exists(asked):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), asked)

    monkeypatch.setattr(os, "statvfs", hang_here)
    with pytest.raises(BackupError, match=f"^repository: {path} does not answer"):
        asyncio.run(probe_if_there(missing))
    hung.come_back()


def test_reading_does_not_write(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("open", "fsync"):
        monkeypatch.setattr(os, call, fails_with(errno.EROFS))
    asyncio.run(probe(path))


@pytest.mark.parametrize("code", sorted(host_probe.NO_SPACE))
def test_full_file_system_answers(code: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fails_with(code))
    asyncio.run(probe(path, writing=True))
    assert asyncio.run(Watch(path, writing=True).ask()) == ""


@pytest.mark.usefixtures("named_only")
def test_probing_is_not_in_the_way_of_a_new_repository(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "unlink", lambda _path: None)
    asyncio.run(probe(path, writing=True))
    assert len(os.listdir(path)) == 1
    check_creatable(path)


@pytest.mark.usefixtures("hung")
def test_hung_file_system(path: str, children: list[int]) -> None:
    with pytest.raises(BackupError, match=rf"^repository: {path} does not answer within 0\.01 s: .* hangs"):
        asyncio.run(probe(path, AT_ONCE))
    assert exists(children[0])


def test_child_left_behind_is_no_zombie_for_long(path: str, hung: HungFileSystem, children: list[int]) -> None:
    with pytest.raises(BackupError):
        asyncio.run(probe(path, AT_ONCE))
    hung.come_back()
    while exists(children[0]):
        asyncio.run(probe(path))
    assert host_probe._left_behind == []


def test_others_go_on_meanwhile(path: str, hung: HungFileSystem) -> None:
    async def repair() -> None:
        while not hung.asked:
            await asyncio.sleep(0.001)
        hung.come_back()

    async def both() -> None:
        await asyncio.gather(probe(path), repair())

    asyncio.run(both())


@pytest.mark.usefixtures("hung")
def test_cancelled_probe_leaves_its_child(path: str, children: list[int]) -> None:
    async def cancel() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(probe(path), AT_ONCE)

    before = os.listdir("/proc/self/fd")
    asyncio.run(cancel())
    assert os.listdir("/proc/self/fd") == before
    assert host_probe._left_behind == children


def open_files(pid: int) -> set[str]:
    """What a process has open, as /proc tells it."""
    return {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


def test_child_that_hangs_holds_nothing(tmp_path: Path, path: str, hung: HungFileSystem, children: list[int]) -> None:
    source, sink = os.pipe()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    inside = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT)
    for fd in (lock, inside):
        fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BackupError):
        asyncio.run(probe(path, AT_ONCE))
    while not hung.asked:
        time.sleep(0.001)

    for fd in (sink, lock, inside):
        os.close(fd)
    os.set_blocking(source, False)
    assert os.read(source, 1) == b""
    os.close(source)
    for file in (tmp_path / "lock", f"{path}/lock"):
        fd = os.open(file, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
    # Only the way to its parent is left. Standard output is not: Ansible waits for the end of that.
    assert len(open_files(children[0])) == 1


def test_files_of_the_file_system_are_closed_last(
    tmp_path: Path, path: str, hung: HungFileSystem, children: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a file is flushed when it is closed, and that is where the child may hang already."""
    inside = os.open(f"{path}/image", os.O_RDWR | os.O_CREAT)
    source, sink = os.pipe()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    assert inside < source < sink < lock
    parent, close = os.getpid(), os.close

    def hang_on_flush(fd: int) -> None:
        if os.getpid() != parent and fd == inside:
            hung.statvfs(path)
        close(fd)

    monkeypatch.setattr(os, "close", hang_on_flush)
    with pytest.raises(BackupError):
        asyncio.run(probe(path, AT_ONCE))
    while not hung.asked:
        time.sleep(0.001)
    left = open_files(children[0])
    assert os.readlink(f"/proc/self/fd/{inside}") in left
    assert not {os.readlink(f"/proc/self/fd/{fd}") for fd in (source, lock)} & left
    for fd in (inside, source, sink, lock):
        close(fd)


def test_signal_does_not_send_the_child_home(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the child would unwind into the module's own code, which would then run twice."""
    parent, fork = os.getpid(), os.fork

    def interrupted() -> int:
        pid = fork()
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    def terminate(*_arguments: object) -> NoReturn:
        raise SystemExit(1)

    monkeypatch.setattr(os, "fork", interrupted)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        asyncio.run(probe(path))
    finally:
        if os.getpid() != parent:
            os._exit(1)
        signal.signal(signal.SIGTERM, before)
    # The module itself still hears it.
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.usefixtures("hung", "children")
def test_next_question_within_the_same_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        with pytest.raises(BackupError, match="does not answer"):
            await probe(path, AT_ONCE)
        # Its pipe has the file descriptor of the first one.
        monkeypatch.setattr(os, "statvfs", lambda _path: None)
        await probe(path)

    asyncio.run(ask())


def test_answer_is_read_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = os.read

    def count(fd: int, length: int) -> bytes:
        reads.append(fd)
        return read(fd, length)

    async def ask() -> None:
        question = Probe(path)
        monkeypatch.setattr(os, "read", count)
        assert await question.answered(60)
        # The child's end is to be seen there now.
        select.select([question._source], [], [])
        for _iteration in range(3):
            await asyncio.sleep(0)
        question.close()
        assert reads == [question._source]

    asyncio.run(ask())


@pytest.mark.usefixtures("hung")
def test_child_that_is_killed(path: str, children: list[int]) -> None:
    async def kill() -> None:
        question = Probe(path)
        os.kill(question._child, signal.SIGKILL)
        assert await question.answered(60)
        try:
            question.check()
        finally:
            question.close()

    with pytest.raises(Unasked, match="was killed"):
        asyncio.run(kill())
    assert not exists(children[0])


def test_no_process_to_ask_with(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", fails_with(errno.EAGAIN))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unasked, match=f"to ask the file system of {path}: Resource temporarily unavailable"):
        asyncio.run(probe(path))
    assert os.listdir("/proc/self/fd") == before


def test_answer_that_is_there_is_seen_without_waiting(path: str) -> None:
    async def look() -> bool:
        question = Probe(path)
        # The event loop gets no chance to take it meanwhile.
        select.select([question._source], [], [])
        answered = await question.answered(0)
        question.close()
        return answered

    assert asyncio.run(look())


def test_watch_trusts_an_answer_for_a_while(path: str, children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(host_probe, "time", SimpleNamespace(monotonic=lambda: now))

    async def follow() -> None:
        nonlocal now
        watch = Watch(path)
        for elapsed, asked in ((0, 1), (9, 1), (2, 2), (9, 2), (1, 3)):
            now += elapsed
            assert await watch.ask() == ""
            assert len(children) == asked

    asyncio.run(follow())
    assert not any(map(exists, children))


def test_watch_says_why_and_asks_again(path: str, children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow() -> None:
        watch = Watch(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", fails_with(errno.ESTALE))
            for _round in range(2):
                assert await watch.ask() == f"repository: {path}: Stale file handle"
        assert await watch.ask() == ""

    asyncio.run(follow())
    assert len(children) == 3
    assert not any(map(exists, children))


def test_watch_keeps_to_one_child_that_hangs(path: str, hung: HungFileSystem, children: list[int]) -> None:
    async def follow() -> None:
        watch = Watch(path, AT_ONCE)
        for _round in range(3):
            assert "does not answer within 0.01 s" in await watch.ask()
        assert {"does not answer" in reason for reason in await asyncio.gather(watch.ask(), watch.ask())} == {True}
        assert len(children) == 1
        hung.come_back()
        while await watch.ask():
            pass
        assert len(children) == 1

    asyncio.run(follow())
    assert not exists(children[0])


def test_watch_is_shared(path: str, children: list[int]) -> None:
    async def follow() -> list[str]:
        watch = Watch(path)
        return await asyncio.gather(*(watch.ask() for _vm in range(5)))

    assert asyncio.run(follow()) == [""] * 5
    assert len(children) == 1


def test_watch_whose_child_is_killed(path: str, hung: HungFileSystem, children: list[int]) -> None:
    async def follow() -> None:
        watch = Watch(path, AT_ONCE)
        assert "does not answer" in await watch.ask()
        os.kill(children[0], signal.SIGKILL)
        # That tells nothing, and the next one finds what there is.
        while await watch.ask():
            pass
        assert not watch.hangs
        assert "does not answer" in await watch.ask()
        hung.come_back()
        while await watch.ask():
            pass
        assert len(children) == 2

    asyncio.run(follow())


def kill_itself(*_arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        ("fork", fails_with(errno.EAGAIN)),
        ("pipe", fails_with(errno.EMFILE)),
        ("scandir", fails_with(errno.ENFILE)),
        ("statvfs", fails_with(errno.ENOMEM)),
        ("statvfs", kill_itself),
    ],
)
def test_watch_that_cannot_ask_says_so_when_it_lasts(
    call: str, instead: Callable[..., None], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def follow() -> None:
        watch = Watch(path, 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, instead)
            for _round in range(2):
                assert await watch.ask() == watch.unasked == ""
            await asyncio.sleep(0.2)
            assert await watch.ask() == ""
            assert watch.unasked.startswith("repository: ")
            assert watch.unasked.endswith("; that it hangs could not have been seen for more than 0.1 s")
        assert await watch.ask() == watch.unasked == ""

    asyncio.run(follow())

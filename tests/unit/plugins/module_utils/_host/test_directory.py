# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory, WrongEntry

if t.TYPE_CHECKING:
    from pathlib import Path

LIMIT = 1 << 16


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory that nobody may touch, with a file in it."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "file").write_text("canary")
    return path


@pytest.fixture
def opened(place: Path) -> t.Iterator[Directory]:
    with Directory.at(str(place)) as directory:
        yield directory


def put_socket(path: Path) -> None:
    # A path may be too long for a socket.
    with Directory.at(str(path.parent)) as parent, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{parent.fd}/{path.name}")


ODD: dict[str, t.Callable[[Path, Path], object]] = {
    "a symbolic link to ": lambda path, outside: path.symlink_to(outside / "file"),
    "a symbolic link to /": lambda path, outside: path.symlink_to(outside),
    "a symbolic link to no": lambda path, _outside: path.symlink_to("nothing"),
    "a named pipe": lambda path, _outside: os.mkfifo(path),
    "a socket": lambda path, _outside: put_socket(path),
}
"""What can stand in the place of a file and of a directory, by what is told of it."""


def put(what: str, path: Path, outside: Path) -> None:
    ODD[what](path, outside)


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_file_is_told_and_not_read(place: Path, outside: Path, opened: Directory, what: str) -> None:
    put(what, place / "x", outside)
    for call in (lambda: opened.read("x", LIMIT), lambda: opened.open("x"), lambda: opened.open("x", os.O_RDWR)):
        with pytest.raises(WrongEntry, match=f"{place}/x is {what}.*, and not a file; .*(move|moving)"):
            call()


def test_a_directory_is_no_file(place: Path, opened: Directory) -> None:
    (place / "x").mkdir()
    with pytest.raises(WrongEntry, match=f"{place}/x is a directory, and not a file; .*move it away"):
        opened.read("x", LIMIT)


@pytest.mark.skipif(os.geteuid() != 0, reason="devices are made by root")
def test_a_device_is_not_opened(place: Path, opened: Directory) -> None:
    # That of /dev/zero never ends.
    os.mknod(place / "x", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    with pytest.raises(WrongEntry, match="is a character device, and not a file"):
        opened.read("x", LIMIT)


@pytest.mark.parametrize("what", [*ODD, "a file"])
def test_what_is_no_directory_is_told_and_not_entered(place: Path, outside: Path, opened: Directory, what: str) -> None:
    if what == "a file":
        (place / "x").touch()
    else:
        put(what, place / "x", outside)
    with pytest.raises(WrongEntry, match=f"{place}/x is {what}.*, and not a directory; .*(move|moving)"):
        opened.directory("x")
    with pytest.raises(WrongEntry, match=f"{place}/x is {what}"):
        Directory.at(str(place), "x", "y")
    assert not opened.is_directory("x")


def test_links_lead_to_the_first_directory(tmp_path: Path, place: Path) -> None:
    (place / "inner").mkdir()
    (tmp_path / "link").symlink_to(place)
    with Directory.at(str(tmp_path / "link"), "inner") as inner:
        assert os.path.samestat(os.fstat(inner.fd), (place / "inner").stat())
        assert inner.path == str(tmp_path / "link" / "inner")


@pytest.mark.usefixtures("place")
def test_a_missing_directory_is_missing(tmp_path: Path) -> None:
    for names in (("no",), ("place", "no")):
        with pytest.raises(FileNotFoundError) as error:
            Directory.at(str(tmp_path), *names)
        assert error.value.filename == os.path.join(str(tmp_path), *names)


def test_nothing_stays_open(tmp_path: Path, place: Path, outside: Path) -> None:
    (place / "link").symlink_to(outside)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WrongEntry):
        Directory.at(str(tmp_path), "place", "link")
    with pytest.raises(FileNotFoundError):
        Directory.at(str(tmp_path), "place", "no")
    with Directory.at(str(tmp_path), "place") as found, pytest.raises(WrongEntry):
        found.open("link")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../place", "/etc/passwd", "a\0b"])
def test_what_is_no_name_is_refused(opened: Directory, name: str) -> None:
    calls: list[t.Callable[[], object]] = [
        lambda: opened.read(name, LIMIT),
        lambda: opened.open(name, os.O_WRONLY | os.O_CREAT),
        lambda: opened.write(name, b""),
        lambda: opened.status(name),
        lambda: opened.directory(name),
        lambda: opened.make(name),
        lambda: opened.remove(name),
        lambda: opened.remove_directory(name),
        lambda: opened.rename(name, "b"),
        lambda: opened.rename("b", name),
    ]
    for call in calls:
        with pytest.raises(BackupError, match="is no name of a file in it"):
            call()
    assert opened.names() == []


@pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
def test_a_file_is_read_whole(place: Path, opened: Directory, size: int) -> None:
    (place / "x").write_bytes(b"x" * size)
    assert opened.read("x", LIMIT) == b"x" * size


@pytest.mark.parametrize("size", [LIMIT + 1, 2 * LIMIT, 1 << 40])
def test_a_file_that_is_too_large_is_told(place: Path, opened: Directory, size: int) -> None:
    with (place / "x").open("wb") as file:
        file.truncate(size)
    with pytest.raises(WrongEntry, match=f"{place}/x has more than {LIMIT} bytes"):
        opened.read("x", LIMIT)


@pytest.mark.parametrize("more", [10, LIMIT])
def test_a_file_that_has_grown_is_read_to_its_end_or_its_limit(place: Path, opened: Directory, more: int) -> None:
    (place / "x").write_bytes(b"x")
    found = opened.regular("x")
    (place / "x").write_bytes(b"x" * (1 + more))
    if more < LIMIT:
        assert opened.read("x", LIMIT, found) == b"x" * (1 + more)
    else:
        with pytest.raises(WrongEntry):
            opened.read("x", LIMIT, found)


def test_a_pipe_that_has_taken_the_place_of_a_file_is_not_waited_for(place: Path, opened: Directory) -> None:
    (place / "x").write_bytes(b"x")
    found = opened.regular("x")
    (place / "x").unlink()
    os.mkfifo(place / "x")
    assert opened.read("x", LIMIT, found) == b""


def test_a_lease_of_another_process_is_waited_for(place: Path, opened: Directory) -> None:
    (place / "x").write_bytes(b"x")
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = os.open(place / "x", os.O_RDWR)
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            # The default of SIGIO, by which the kernel asks for it back, is the end of this process, and of the lease.
            os.write(ready[1], b".")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    try:
        assert opened.read("x", LIMIT) == b"x"
    finally:
        os.write(go[1], b".")
        os.waitpid(child, 0)


def test_a_missing_file_is_missing(place: Path, opened: Directory) -> None:
    assert opened.status("x") is None
    assert not opened.remove("x")
    for call in (lambda: opened.read("x", LIMIT), lambda: opened.open("x"), lambda: opened.directory("x")):
        with pytest.raises(FileNotFoundError) as error:
            call()
        assert error.value.filename == f"{place}/x"


@pytest.mark.parametrize("what", [None, *ODD])
def test_what_stands_in_the_place_of_a_file_is_replaced_and_not_followed(
    place: Path, outside: Path, opened: Directory, what: str | None
) -> None:
    if what:
        put(what, place / "x", outside)
        put(what, place / "x.new", outside)
    opened.write("x", b"new", 0o440)
    assert (place / "x").read_bytes() == b"new"
    assert stat.S_IMODE((place / "x").lstat().st_mode) == 0o440
    assert opened.names() == ["x"]
    assert (outside / "file").read_text() == "canary"


@pytest.mark.parametrize("name", ["x", "x.new"])
def test_a_directory_is_not_replaced(place: Path, opened: Directory, name: str) -> None:
    opened.make(name)
    with pytest.raises(WrongEntry, match=f"{place}/{name} is a directory, and not a file"):
        opened.write("x", b"new")
    assert opened.names() == [name]


def test_a_file_that_cannot_be_written_stays_as_it_is(
    place: Path, opened: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.write("x", b"old")

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device while it was written") as error:
        opened.write("x", b"new")
    assert error.value.filename == f"{place}/x"
    assert (place / "x").read_bytes() == b"old"


def test_a_long_content_is_written_whole(place: Path, opened: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    opened.write("x", b"0123456789")
    assert (place / "x").read_bytes() == b"0123456789"


def test_a_link_is_removed_itself(place: Path, outside: Path, opened: Directory) -> None:
    (place / "x").symlink_to(outside / "file")
    assert opened.remove("x")
    assert (outside / "file").exists()
    assert opened.names() == []


def test_a_link_is_no_directory_to_remove(place: Path, outside: Path, opened: Directory) -> None:
    (place / "x").symlink_to(outside)
    with pytest.raises(NotADirectoryError) as error:
        opened.remove_directory("x")
    assert error.value.filename == f"{place}/x"


def test_errors_tell_the_whole_path(place: Path, opened: Directory) -> None:
    (place / "x").mkdir()
    (place / "x" / "y").touch()
    calls: list[t.Callable[[], object]] = [
        lambda: opened.make("x"),
        lambda: opened.remove("x"),
        lambda: opened.remove_directory("x"),
        lambda: opened.rename("x", "x" * 300),
    ]
    for call in calls:
        with pytest.raises(OSError, match="x") as error:
            call()
        assert (error.value.filename, error.value.filename2) == (f"{place}/x", None)


def test_entries_tell_what_they_are(place: Path, outside: Path, opened: Directory) -> None:
    (place / "b").mkdir()
    (place / "a").touch()
    (place / "c").symlink_to(outside)
    assert opened.names() == ["a", "b", "c"]
    found = {entry.name: entry.is_dir(follow_symlinks=False) for entry in opened.entries()}
    assert found == {"a": False, "b": True, "c": False}
    assert (opened.is_directory("b"), opened.is_directory("c"), opened.is_directory("no")) == (True, False, False)


def test_an_entry_gets_another_name(place: Path, opened: Directory) -> None:
    opened.make("dir", 0o700)
    assert stat.S_IMODE((place / "dir").stat().st_mode) == 0o700
    opened.write("a", b"a")
    opened.rename("a", "b")
    with opened.directory("dir") as inner:
        opened.rename("b", "c", inner)
        assert inner.names() == ["c"]
    assert opened.names() == ["dir"]


def test_a_directory_stays_what_was_opened(place: Path, outside: Path, opened: Directory) -> None:
    """Whoever puts a link in its place meanwhile does not lead us away."""
    opened.make("dir")
    with opened.directory("dir") as inner:
        (place / "dir").rename(place / "moved")
        (place / "dir").symlink_to(outside)
        inner.write("file", b"new")
        assert inner.remove("file")
    assert (outside / "file").read_text() == "canary"

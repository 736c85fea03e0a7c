# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Targets: how they are made, reserved and opened."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qemu_img, target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("image_format", "size", "compress", "direct"),
    [
        ("qcow2", MIB, False, True),
        ("qcow2", MIB + 512, False, True),
        ("qcow2", MIB, True, False),
        ("raw", MIB, False, True),
        ("raw", MIB + 512, False, False),
    ],
)
def test_direct_access(image_format: str, size: int, compress: bool, direct: bool) -> None:
    assert Target("/b/x", image_format, size, compress=compress).direct is direct


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("target", "protocol", "more"),
    [
        (Target("/t/x", "qcow2", MIB), "file", {"driver": "qcow2", "backing": None}),
        (Target("/dev/vg/x", "raw", MIB, block_device=True), "host_device", {"driver": "raw"}),
    ],
    ids=["qcow2 file", "raw device"],
)
def test_node_takes_nothing_from_its_source(target: Target, protocol: str, more: dict[str, Any], direct: bool) -> None:
    text = target.node("/dev/fdset/1", direct)
    assert text.startswith("json:")
    flags = {"cache": {"direct": direct, "no-flush": False}, "read-only": False, "auto-read-only": False}
    file = {"driver": protocol, "filename": "/dev/fdset/1", "aio": "threads", "locking": "auto", "discard": "unmap"}
    expected = {**more, "file": {**file, **flags}, "discard": "ignore", "detect-zeroes": "on", **flags}
    assert json.loads(text[len("json:") :]) == expected


class TestCreate:
    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], tuple[int, ...]]]:
        run: list[tuple[list[str], tuple[int, ...]]] = []

        async def record(command: list[str], pass_fds: tuple[int, ...] = ()) -> str:
            run.append((command, pass_fds))
            return ""

        monkeypatch.setattr(qemu_img, "run", record)
        return run

    @pytest.mark.parametrize(
        ("compress", "backing", "options"),
        [
            (False, None, ""),
            (True, None, "-o compression_type=zstd"),
            (False, ("/b/base", "raw"), "-u -b /b/base -F raw"),
        ],
    )
    def test_image(
        self,
        commands: list[Any],
        compress: bool,
        backing: tuple[str, str] | None,
        options: str,
        tmp_path: Path,
    ) -> None:
        path = tmp_path / "x"
        fd = asyncio.run(target_image.create(Target(str(path), "qcow2", MIB, compress=compress), backing, (3,)))
        name = f"/proc/self/fd/{fd}"
        assert os.path.samefile(name, path)
        os.close(fd)
        assert commands == [
            (["qemu-img", "create", "-q", "-f", "qcow2", *options.split(), "--", name, str(MIB)], (3, fd))
        ]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_compression_is_an_option_of_qcow2_only(self, commands: list[Any], tmp_path: Path) -> None:
        os.close(asyncio.run(target_image.create(Target(str(tmp_path / "x"), "vmdk", MIB, compress=True))))
        assert "-o" not in commands[0][0]

    def test_raw_image_needs_no_program(self, commands: list[Any], tmp_path: Path) -> None:
        path = tmp_path / "x"
        os.close(asyncio.run(target_image.create(Target(str(path), "raw", MIB + 512))))
        assert path.stat().st_size == MIB + 512
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not commands

    @pytest.mark.parametrize("kind", ["file", "directory", "link", "broken link"])
    def test_nothing_is_overwritten_or_followed(self, kind: str, commands: list[Any], tmp_path: Path) -> None:
        path, victim = tmp_path / "x", tmp_path / "victim"
        if kind == "file":
            path.write_text("mine")
        elif kind == "directory":
            path.mkdir()
        else:
            path.symlink_to(victim)
            if kind == "link":
                victim.write_text("mine")
        with pytest.raises(FileExistsError):
            asyncio.run(target_image.create(Target(str(path), "raw", MIB)))
        assert not commands
        assert victim.exists() is (kind == "link")
        if kind in ("file", "link"):
            assert path.read_text() == "mine"


class TestCopyOfANewImage:
    """The stand-in for qemu-img makes an image with data in its first page, in its sixth and in its last but one."""

    CONTENT = b"QFI\xfb" + bytes(5 * 4096 - 4) + bytes(100) + b"table" + bytes(40960) + b"end" + bytes(4096)

    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        run: list[list[str]] = []

        async def make(command: list[str], pass_fds: tuple[int, ...] = ()) -> str:  # noqa: ARG001
            run.append(command)
            with open(command[-2], "r+b") as image:
                image.write(self.CONTENT)
            return ""

        monkeypatch.setattr(qemu_img, "run", make)
        return run

    @staticmethod
    def create(directory: Path, *targets: Target, backing: tuple[str, str] | None = None) -> list[Path]:
        """Make these images, one after the other, with one memory."""
        made: dict[tuple[str, ...], target_image.Blank] = {}
        paths = [directory / str(number) for number in range(len(targets))]
        for path, target in zip(paths, targets, strict=True):
            os.close(asyncio.run(target_image.create(replace(target, path=str(path)), backing, made=made)))
        return paths

    @pytest.mark.parametrize("backing", [None, ("../s1/x.qcow2", "qcow2")])
    def test_it_is_the_same(self, backing: tuple[str, str] | None, commands: list[list[str]], tmp_path: Path) -> None:
        paths = self.create(tmp_path, *[Target("", "qcow2", SIZE)] * 3, backing=backing)
        assert len(commands) == 1
        for path in paths:
            assert path.read_bytes() == self.CONTENT
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Three pages, of fourteen, and perhaps a block in which the file system writes down where they are.
        assert paths[1].stat().st_blocks * 512 <= 4 * 4096

    @pytest.mark.parametrize(
        "other",
        [
            Target("", "qcow2", SIZE + 512),
            Target("", "qcow2", SIZE, compress=True),
            Target("", "qcow2", SIZE, compress=True, compression_type="zlib"),
            Target("", "qed", SIZE),
        ],
    )
    def test_other_kinds_are_made_anew(self, other: Target, commands: list[list[str]], tmp_path: Path) -> None:
        self.create(tmp_path, Target("", "qcow2", SIZE), other)
        assert len(commands) == 2

    def test_another_parent_makes_another_kind(self, commands: list[list[str]], tmp_path: Path) -> None:
        made: dict[tuple[str, ...], target_image.Blank] = {}
        for number, parent in enumerate(("../s1/x.qcow2", "../s2/x.qcow2", "../s1/x.qcow2")):
            target = Target(str(tmp_path / str(number)), "qcow2", SIZE)
            os.close(asyncio.run(target_image.create(target, (parent, "qcow2"), made=made)))
        assert len(commands) == 2

    def test_formats_with_identifiers_are_made_anew(self, commands: list[list[str]], tmp_path: Path) -> None:
        self.create(tmp_path, *[Target("", "vmdk", SIZE)] * 2)
        assert len(commands) == 2

    def test_nothing_is_overwritten(self, commands: list[list[str]], tmp_path: Path) -> None:
        (tmp_path / "1").write_text("mine")
        with pytest.raises(FileExistsError):
            self.create(tmp_path, *[Target("", "qcow2", SIZE)] * 2)
        assert (tmp_path / "1").read_text() == "mine"
        assert len(commands) == 1


def allocator(*codes: int) -> Any:
    """A libc whose fallocate fails with these errors, one after the other, and then works."""

    class Library:
        calls: list[list[int]] = []  # noqa: RUF012

        def __init__(self, *_args: Any, **_options: Any) -> None:
            self.codes = iter(codes)

        def fallocate(self, *arguments: Any) -> int:
            self.calls.append([argument.value for argument in arguments])
            code = next(self.codes, 0)
            ctypes.set_errno(code)
            return -1 if code else 0

    return Library


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(b"header")
    return path


class TestReserve:
    def target(self, path: Path, **values: Any) -> Target:
        return Target(str(path), "qcow2", SIZE, **{"expected": 8 * MIB, **values})

    def test_space_is_allocated_and_the_size_is_kept(self, image: Path) -> None:
        assert target_image.reserve(self.target(image))
        status = image.stat()
        assert status.st_size == len(b"header")
        assert status.st_blocks * 512 >= 8 * MIB

    def test_surplus_is_given_back_by_the_flush(self, image: Path) -> None:
        target_image.reserve(self.target(image))
        status = preallocate.flush(str(image))
        assert (status.st_ino, status.st_size) == (image.stat().st_ino, len(b"header"))
        assert status.st_blocks * 512 < MIB
        assert image.read_bytes() == b"header"

    @pytest.mark.parametrize(
        "code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV], ids=errno.errorcode.get
    )
    def test_file_system_cannot(self, code: int, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", allocator(code))
        assert not target_image.reserve(self.target(image))

    def test_file_system_that_only_says_so(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", allocator())
        assert not target_image.reserve(self.target(image))

    def test_interrupted_call_is_made_again(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = allocator(errno.EINTR, errno.EINTR)
        monkeypatch.setattr(ctypes, "CDLL", library)
        target_image.reserve(self.target(image))
        assert [call[1:] for call in library.calls] == [[preallocate.FALLOC_FL_KEEP_SIZE, 0, 8 * MIB]] * 3

    def test_no_space(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", allocator(errno.ENOSPC))
        free = os.statvfs_result((4096, 4096, 0, 0, 100, 0, 0, 0, 0, 0))
        monkeypatch.setattr(os, "fstatvfs", lambda _fd: free)
        with pytest.raises(BackupError) as failed:
            target_image.reserve(self.target(image))
        assert str(failed.value) == (
            f"target: {image}: No space left on device while its space was reserved: the"
            " backup needs up to 8388608 bytes there, and 409600 are free"
        )

    def test_image_that_is_being_written_keeps_its_data(self, image: Path) -> None:
        os.truncate(image, MIB)
        with image.open("r+b") as writer:
            writer.seek(MIB // 2)
            writer.write(b"data")
            assert preallocate.top_up(str(image), 8 * MIB)
            writer.write(b"more")
        assert image.read_bytes() == b"header" + bytes(MIB // 2 - 6) + b"datamore" + bytes(MIB // 2 - 8)
        assert image.stat().st_blocks * 512 >= 8 * MIB

    @pytest.mark.parametrize("values", [{"expected": 0}, {"block_device": True}], ids=["nothing", "device"])
    def test_nothing_to_reserve(self, values: dict[str, Any], image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", allocator(errno.EIO))
        assert target_image.reserve(self.target(image, **values))

    def test_no_file_is_left_open(self, image: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        target_image.reserve(self.target(image))
        preallocate.flush(str(image))
        assert len(os.listdir("/proc/self/fd")) == before


class TestOpenPair:
    def test_one_to_read_and_one_to_write(self, image: Path) -> None:
        fds = target_image.open_pair(Target(str(image), "qcow2", MIB), direct=False)
        try:
            os.pwrite(fds[1], b"H", 0)
            assert os.pread(fds[0], 6, 0) == b"Header"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fds[0], b"x", 0)
        finally:
            for fd in fds:
                os.close(fd)

    @pytest.mark.parametrize("direct", [True, False])
    def test_page_cache_is_passed_by_where_asked(
        self, direct: bool, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags: list[int] = []
        really = os.open

        def record(path: str, flag: int, *args: int) -> int:
            if not flag & os.O_PATH:
                flags.append(flag)
            return really(path, flag & ~os.O_DIRECT, *args)

        monkeypatch.setattr(os, "open", record)
        for fd in target_image.open_pair(Target(str(image), "qcow2", MIB), direct):
            os.close(fd)
        assert [bool(flag & os.O_DIRECT) for flag in flags] == [direct] * 2

    def test_first_is_closed_when_the_second_fails(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        really = os.open

        def refuse_writing(path: str, flags: int, *args: int) -> int:
            if flags & os.O_RDWR:
                raise OSError(errno.EINVAL, "no O_DIRECT")
            return really(path, flags, *args)

        before = os.listdir("/proc/self/fd")
        monkeypatch.setattr(os, "open", refuse_writing)
        with pytest.raises(OSError, match="no O_DIRECT"):
            target_image.open_pair(Target(str(image), "qcow2", MIB), direct=False)
        monkeypatch.undo()
        assert len(os.listdir("/proc/self/fd")) == len(before)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The life of a throwaway VM: its work directory, its console, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import PROCESSES, Process, spaces
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import boot
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_options import BootOptions

OPTIONS = BootOptions("/usr/bin/qemu", "/var/tmp", 10, "login:", agent=False)


def test_qemu_of_another_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="qemu: /nowhere is not installed"):
        boot.find_qemu("/nowhere")
    qemu = tmp_path / "qemu"
    qemu.touch(mode=0o755)
    assert boot.find_qemu(str(qemu)) == str(qemu)


def test_places(tmp_path: Path) -> None:
    me = Process.of(os.getpid())
    assert me
    dead = tmp_path / f"{boot.PREFIX}{me.pid}-{me.start + 1}-{spaces()[PROCESSES]}-abc"
    elsewhere = tmp_path / f"{boot.PREFIX}{me.pid}-{me.start + 1}-1-abc"
    other = tmp_path / "vmfleet-boot-notes"
    for path in (dead, elsewhere, other):
        path.mkdir()
        (path / "file").touch()
    with boot.work_dir(str(tmp_path)) as place:
        (Path(place) / "overlay").touch()
        boot.clear_work_dirs(str(tmp_path))
        assert (Path(place) / "overlay").exists()
    assert set(tmp_path.iterdir()) == {elsewhere, other}


def test_console_without_what_moves_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "console"
    assert boot._read(str(path)) == ""
    path.write_bytes(b"\x1b[2J\x1b[01;31mred\x1b[0m\r\n\x07\xff end\n")
    assert boot._read(str(path)) == "red\n\ufffd end\n"
    path.write_bytes(b"x" * boot.CONSOLE_LIMIT + b"tail")
    assert len(boot._read(str(path))) == boot.CONSOLE_LIMIT


LONG = ["/bin/sleep", "86401"]


def left_running() -> list[int]:
    """The children of this process, those included that have ended and were not waited for."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def test_nothing_is_left_running(tmp_path: Path) -> None:
    result = asyncio.run(boot.watch(LONG, str(tmp_path), replace(OPTIONS, timeout=0)))
    assert "no sign of life ('login:' on its console) within 0 s: its console said nothing" in result.error
    assert result.is_backup_fault
    assert not left_running()


def test_nothing_is_left_running_by_one_that_is_interrupted(tmp_path: Path) -> None:
    async def interrupted() -> None:
        watching = asyncio.ensure_future(boot.watch(LONG, str(tmp_path), OPTIONS))
        while not left_running():
            await asyncio.sleep(0.01)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    asyncio.run(interrupted())
    assert not left_running()


def test_one_that_fills_the_disk_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "MIN_FREE", 1 << 60)
    (tmp_path / "console").write_text("much\n")
    result = asyncio.run(boot.watch(LONG, str(tmp_path), OPTIONS))
    assert "give a tmpdir with more room" in result.error
    assert (result.console, result.is_backup_fault) == (("much",), False)
    assert not left_running()


def test_qemu_that_does_not_start(tmp_path: Path) -> None:
    result = asyncio.run(boot.watch(["/bin/sh", "-c", "echo no such machine >&2; exit 1"], str(tmp_path), OPTIONS))
    assert "QEMU ended before the guest gave a sign of life: no such machine; give boot_options" in result.error
    assert not result.is_backup_fault

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""qemu-img's argument lists, and what becomes of a command's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_commands, qemu_img


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            qemu_img.create_command("/b/x.qcow2", "qcow2", 1024),
            "qemu-img create -q -f qcow2 -- /b/x.qcow2 1024",
        ),
        (
            qemu_img.create_command("/b/x", "qcow2", 0, {"b": "2", "a": "1"}, ("../s1/x", "raw")),
            "qemu-img create -q -f qcow2 -o a=1,b=2 -u -b ../s1/x -F raw -- /b/x 0",
        ),
        (image_commands.info_command("/b/x"), "qemu-img info --output=json -- /b/x"),
        (image_commands.info_command("/b/x", "raw", shared=True), "qemu-img info --output=json -U -f raw -- /b/x"),
        (
            qemu_img.measure_command("/b/x", "raw", "qcow2"),
            "qemu-img measure -U --output=json -f raw -O qcow2 -- /b/x",
        ),
        (qemu_img.measure_command("json:{}", "", "qcow2"), "qemu-img measure -U --output=json -O qcow2 -- json:{}"),
        (
            image_commands.read_command("json:{}", 1024),
            "qemu-img convert -U -n --target-is-zero -m 16 -W --target-image-opts -- json:{} driver=null-co,size=1024",
        ),
        (image_commands.compare_command("/b/x", "/b/y"), "qemu-img compare -U -- /b/x /b/y"),
        (image_commands.map_command("/b/x", "vmdk"), "qemu-img map --output=json -f vmdk -- /b/x"),
        (
            image_commands.map_command("/b/x", "qcow2", shared=True),
            "qemu-img map --output=json -U -f qcow2 -- /b/x",
        ),
        (image_commands.options_command("vmdk"), "qemu-img create -f vmdk -o help"),
    ],
)
def test_argument_lists(command: list[str], expected: str) -> None:
    assert command == expected.split()


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


async def written(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def gone(pid: Path) -> None:
    """Wait for the end of a process; nobody may be there to take its status."""
    status = Path("/proc", pid.read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while status.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


class TestRun:
    def test_output_is_returned_without_errors(self) -> None:
        assert asyncio.run(qemu_img.run(shell("echo said; echo noise >&2"))) == "said\n"

    def test_output_is_read_as_json(self) -> None:
        assert asyncio.run(qemu_img.run_json(shell("""echo '{"format": "raw"}'"""))) == {"format": "raw"}

    def test_failure_has_the_command_and_its_words(self) -> None:
        with pytest.raises(ToolError) as failed:
            asyncio.run(qemu_img.run(shell("echo said; echo 'No such file' >&2; exit 3")))
        assert str(failed.value) == "sh -c echo said; echo 'No such file' >&2; exit 3: No such file"

    @pytest.mark.parametrize(
        ("printed", "told"), [(r"one\n\ntwo\n", "one / two"), (r"a\nb\nc\nd\ne\n", "a / b / c and 2 more lines")]
    )
    def test_long_complaints_are_cut(self, printed: str, told: str) -> None:
        with pytest.raises(ToolError) as failed:
            asyncio.run(qemu_img.run(shell(f"printf '{printed}' >&2; exit 1")))
        assert str(failed.value).endswith(f"exit 1: {told}")

    def test_failure_has_paths_and_no_json(self) -> None:
        name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "/b/x"}})
        command = [*shell("echo \"qemu-img: Could not open '$1'\" >&2; exit 1"), "sh", name]
        with pytest.raises(ToolError) as failed:
            asyncio.run(qemu_img.run(command))
        assert str(failed.value).endswith(" sh /b/x: qemu-img: Could not open '/b/x'")

    def test_failure_has_paths_and_no_descriptors(self, tmp_path: Path) -> None:
        files = [(tmp_path / str(number)).open("wb") for number in range(12)]
        fds = tuple(file.fileno() for file in files)
        words = " ".join(f"/proc/self/fd/{fd}" for fd in fds)
        with pytest.raises(ToolError) as failed:
            asyncio.run(qemu_img.run(shell(f"echo 'Could not open {words}' >&2; exit 1"), pass_fds=fds))
        assert str(failed.value).endswith("Could not open " + " ".join(file.name for file in files))
        for file in files:
            file.close()

    @pytest.mark.parametrize(
        "name",
        [
            'json:{"driver": "raw", "file": {"pool": "vms", "image": "web01", "driver": "rbd"}}',
            'json:{"driver": "quorum", "children": [], "vote-threshold": 2}',
            'json:{"driver": "raw", "file": "n0"}',
            'json:{"driver": "raw", "file": {"driver": "file", "fil...',
        ],
        ids=["rbd", "quorum", "reference", "cut short"],
    )
    def test_failure_with_a_disk_that_has_no_path(self, name: str) -> None:
        with pytest.raises(ToolError) as failed:
            asyncio.run(qemu_img.run([*shell("exit 1"), "sh", name]))
        assert str(failed.value).endswith(f"sh {name}: ")

    def test_missing_program_is_told_apart(self, tmp_path: Path) -> None:
        with pytest.raises(qemu_img.NotInstalled, match="is not installed on this hypervisor"):
            asyncio.run(qemu_img.run([str(tmp_path / "qemu-img")]))

    def test_command_that_hangs_is_killed(self, tmp_path: Path) -> None:
        async def hang() -> None:
            with pytest.raises(ToolError, match=r"no end within 0\.3 s; does its file system hang\?"):
                await qemu_img.run(shell(f"echo $$ > {tmp_path}/pid; exec sleep 60"), timeout=0.3)
            await gone(tmp_path / "pid")

        asyncio.run(hang())

    def test_long_command_that_stands_still_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(qemu_img, "LOOK_INTERVAL", 0.01)
        monkeypatch.setattr(qemu_img, "Patience", lambda pid: Patient(tmp_path / "pid", pid))

        class Patient:
            def __init__(self, place: Path, pid: int) -> None:
                self._place = place
                self._pid = pid

            def ends(self) -> str:
                return f"process {self._pid} sleeps" if self._place.exists() and self._place.read_text() else ""

        async def hang() -> None:
            with pytest.raises(ToolError) as failed:
                await qemu_img.run_long(shell(f"echo $$ > {tmp_path}/pid; exec sleep 60"))
            pid = (tmp_path / "pid").read_text().strip()
            assert str(failed.value).endswith(f"sleep 60: process {pid} sleeps; does its file system hang?")
            await gone(tmp_path / "pid")

        asyncio.run(hang())

    def test_command_of_a_task_that_is_cancelled_is_killed(self, tmp_path: Path) -> None:
        async def cancel() -> None:
            task = asyncio.ensure_future(qemu_img.run(shell(f"echo $$ > {tmp_path}/pid; exec sleep 60")))
            await written(tmp_path / "pid")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Others may write to the same place at once.
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / "pid").read_text()), 0)

        asyncio.run(cancel())

    def test_long_command_dies_with_its_parent(self, tmp_path: Path) -> None:
        def work() -> None:
            asyncio.run(qemu_img.run_long(shell(f"echo $$ > {tmp_path}/pid; exec sleep 60")))

        async def kill() -> None:
            parent = multiprocessing.get_context("fork").Process(target=work)
            parent.start()
            await written(tmp_path / "pid")
            parent.kill()
            parent.join()
            await gone(tmp_path / "pid")

        asyncio.run(kill())

    def test_long_command_is_like_any_other(self, tmp_path: Path) -> None:
        assert asyncio.run(qemu_img.run_long(shell("echo said; echo noise >&2"))) == "said\n"
        with pytest.raises(ToolError, match=r"^sh -c echo no >&2; exit 3: no$"):
            asyncio.run(qemu_img.run_long(shell("echo no >&2; exit 3")))
        with pytest.raises(qemu_img.NotInstalled, match="is not installed on this hypervisor"):
            asyncio.run(qemu_img.run_long([str(tmp_path / "qemu-img")]))

    def test_output_is_handed_on_as_it_comes(self, tmp_path: Path) -> None:
        pieces: list[bytes] = []
        script = f"echo one; read none < {tmp_path}/gate; echo two; echo noise >&2"
        os.mkfifo(tmp_path / "gate")

        async def hear() -> None:
            reading = asyncio.ensure_future(qemu_img.run_reading(shell(script), pieces.append))
            while not pieces:
                await asyncio.sleep(0.01)
            assert b"".join(pieces) == b"one\n"
            (tmp_path / "gate").write_text("go on\n")
            await reading

        asyncio.run(hear())
        assert b"".join(pieces) == b"one\ntwo\n"

    def test_a_reader_that_raises_ends_the_command(self, tmp_path: Path) -> None:
        def refuse(piece: bytes) -> None:
            raise ValueError(piece)

        async def hear() -> None:
            with pytest.raises(ValueError, match="said"):
                await qemu_img.run_reading(shell(f"echo $$ > {tmp_path}/pid; echo said; exec sleep 60"), refuse)
            await gone(tmp_path / "pid")

        asyncio.run(hear())

    def test_a_command_that_is_read_can_fail(self) -> None:
        pieces: list[bytes] = []
        with pytest.raises(ToolError, match=r"^sh -c echo said; echo no >&2; exit 3: no$"):
            asyncio.run(qemu_img.run_reading(shell("echo said; echo no >&2; exit 3"), pieces.append))
        with pytest.raises(ToolError, match=r"no end within 0\.3 s"):
            asyncio.run(qemu_img.run_reading(shell("echo said; exec sleep 60"), pieces.append, timeout=0.3))

    def test_locks_are_inherited(self, tmp_path: Path) -> None:
        with open(tmp_path / "lock", "w", encoding="ascii") as lock:
            command = shell(f"readlink /proc/self/fd/{lock.fileno()} || true")
            assert asyncio.run(qemu_img.run(command)) == ""
            assert asyncio.run(qemu_img.run(command, pass_fds=(lock.fileno(),))) == f"{lock.name}\n"

    def test_answers_are_english_and_nothing_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
        monkeypatch.setenv("VMFLEET_TEST", "kept")
        script = "echo $LC_ALL $VMFLEET_TEST; readlink /proc/self/fd/0"
        assert asyncio.run(qemu_img.run(shell(script))) == f"C kept\n{os.devnull}\n"

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What drive_backup refuses after a look at the VM and the target."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import preflight
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.steps import Copy, CopyState
from ansible_collections.vmfleet.backup.plugins.module_utils._host import target_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qemu_img, target_image
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, bitmap, disk, job, record, vm

if TYPE_CHECKING:
    from pathlib import Path

LOCKED = ToolError('qemu-img info: Failed to get shared "write" lock')
DATA = [{"start": 0, "length": SIZE, "depth": 0, "data": True}]
HOLE = [{"start": 0, "length": SIZE, "depth": 0, "data": False}]
BACKED = [{"start": 0, "length": SIZE, "depth": 1, "data": True}]


class Tool:
    """qemu-img with an answer or an error for each of its commands."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "create": "Supported options:",
            "info": {"format": "qcow2", "virtual-size": SIZE},
            "map": HOLE,
            "measure": {"required": SIZE // 2, "fully-allocated": 2 * SIZE},
        }
        self.commands: list[list[str]] = []

    async def run(self, command: list[str], *_args: Any, **_options: Any) -> Any:
        self.commands.append(command)
        answer = self.answers[command[1]]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    tool = Tool()
    monkeypatch.setattr(qemu_img, "run", tool.run)
    monkeypatch.setattr(qemu_img, "run_json", tool.run)
    return tool


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "x.qcow2"


def copy_of(target: Path, found: str = CopyState.ABSENT, **values: Any) -> Copy:
    looked_at = {name: values.pop(name) for name in ("record", "reason", "disk") if name in values}
    drive = Drive("drive0", str(target), **values)
    return Copy(drive, looked_at.pop("disk", disk()), "j0", found, **looked_at)


def prepare(copy: Copy, overwrite: bool = False, **state: Any) -> target_image.Target:
    return asyncio.run(preflight.prepare_target(vm(copy.disk, **state), copy, overwrite))


def refused(copy: Copy, overwrite: bool = False, **state: Any) -> str:
    with pytest.raises(Refused) as refusal:
        prepare(copy, overwrite, **state)
    assert str(refusal.value).startswith(f"{refusal.value.option}: ")
    return str(refusal.value)


class TestPrepareTarget:
    @pytest.mark.parametrize(
        ("values", "image_format"), [({}, "qcow2"), ({"format": "raw"}, "raw"), ({"compress": True}, "qcow2")]
    )
    def test_new_image(self, values: dict[str, Any], image_format: str, target: Path) -> None:
        prepared = prepare(copy_of(target, **values))
        assert prepared == target_image.Target(
            path=f"{target}.partial",
            format=image_format,
            size=SIZE,
            expected=prepared.expected,
            compress=bool(values.get("compress")),
        )
        assert SIZE // 2 < prepared.expected <= 2 * SIZE
        assert not os.listdir(target.parent)

    def test_existing_image(self, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["info"] = {"format": "vmdk", "virtual-size": SIZE}
        prepared = prepare(copy_of(target, CopyState.OCCUPIED, mode="existing"))
        assert (prepared.path, prepared.format) == (str(target), "vmdk")

    @pytest.mark.parametrize("path", ["x.qcow2", "x.qcow2.partial", "link", "missing/../x.qcow2"])
    def test_image_of_the_vm_itself(self, path: str, target: Path) -> None:
        if path in ("x.qcow2.partial", "link"):
            target.parent.joinpath("own").touch()
            target.parent.joinpath(path).symlink_to("own")
        own = target.parent / ("own" if path in ("x.qcow2.partial", "link") else path)
        asked = target.parent / "link" if path == "link" else target
        assert "is an image of VM web01 itself" in refused(copy_of(asked), files=("/elsewhere", str(own)))

    @pytest.mark.parametrize(
        ("bitmaps", "reason"),
        [
            ((), "bitmap: disk drive0 of VM web01 has no bitmap 'b0'; it has: none"),
            (
                (bitmap("b1"), bitmap("b2")),
                "bitmap: disk drive0 of VM web01 has no bitmap 'b0'; it has: b1, b2",
            ),
            (
                (bitmap("b0", recording=False),),
                "bitmap: b0 of disk drive0, VM web01, is disabled: it has missed writes; make a full backup",
            ),
        ],
    )
    def test_bitmap(self, bitmaps: tuple[Any, ...], reason: str, target: Path) -> None:
        copy = copy_of(target, sync="incremental", bitmap="b0", disk=disk(bitmaps=bitmaps))
        assert refused(copy) == reason

    def test_usable_bitmap(self, target: Path) -> None:
        prepare(copy_of(target, sync="incremental", bitmap="b0", disk=disk(bitmaps=(bitmap("b0"),))))

    def test_unknown_format(self, target: Path, tool: Tool) -> None:
        tool.answers["create"] = ToolError("qemu-img create: Unknown file format 'tar'")
        assert refused(copy_of(target, format="tar")) == "format: qemu-img cannot make an image of format 'tar'"

    def test_missing_program_is_no_matter_of_the_format(self, target: Path, tool: Tool) -> None:
        tool.answers["create"] = qemu_img.NotInstalled("qemu-img is not installed")
        with pytest.raises(ToolError, match="is not installed"):
            prepare(copy_of(target))

    @pytest.mark.parametrize(
        ("asked", "info", "reason"),
        [
            ({}, ToolError("Could not open"), "cannot be used: Could not open"),
            ({}, {"format": "raw", "virtual-size": SIZE}, "looks raw; say format: raw"),
            ({}, {"format": "qcow2", "virtual-size": SIZE - 512}, f"has {SIZE - 512} bytes, and disk drive0 has"),
            (
                {"compress": True, "format": "raw"},
                {"format": "raw", "virtual-size": SIZE},
                "is a raw image, which cannot be compressed",
            ),
        ],
    )
    def test_existing_image_that_does_not_fit(
        self, asked: dict[str, Any], info: Any, reason: str, target: Path, tool: Tool
    ) -> None:
        target.touch()
        tool.answers["info"] = info
        assert reason in refused(copy_of(target, mode="existing", **asked))

    def test_raw_image_that_was_said_to_be_one(self, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["info"] = {"format": "raw", "virtual-size": SIZE}
        assert prepare(copy_of(target, CopyState.OCCUPIED, mode="existing", format="raw")).format == "raw"

    def test_size_is_one_of_whole_sectors(self, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["info"] = {"format": "qcow2", "virtual-size": SIZE}
        prepare(copy_of(target, mode="existing", disk=disk(virtual_size=SIZE - 511)))

    @pytest.mark.parametrize(
        ("found", "values", "extents", "reason"),
        [
            (CopyState.OCCUPIED, {"reason": "it has no receipt"}, [], "exists, and it has no receipt"),
            (
                CopyState.OCCUPIED,
                {"reason": "it has no receipt", "mode": "existing"},
                DATA,
                "exists, and it has no receipt",
            ),
            (
                CopyState.OCCUPIED,
                {"reason": "its receipt is for another VM (x)", "mode": "existing", "record": record()},
                HOLE,
                "exists, and its receipt is for another VM (x)",
            ),
            (CopyState.DONE, {"record": record()}, [], "exists, and was made at another moment"),
        ],
        ids=["new", "existing with data", "existing with another receipt", "done at another moment"],
    )
    def test_overwriting_is_to_be_asked_for(
        self, found: str, values: dict[str, Any], extents: Any, reason: str, target: Path, tool: Tool
    ) -> None:
        target.touch()
        tool.answers["map"] = extents
        text = refused(copy_of(target, found, **values))
        assert reason in text
        assert text.endswith("use another target, or overwrite: true")
        prepare(copy_of(target, found, **values), overwrite=True)

    @pytest.mark.parametrize("extents", [HOLE, BACKED, []], ids=["hole", "backing file's data", "nothing"])
    def test_empty_image_is_written_to(self, extents: Any, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["map"] = extents
        prepare(copy_of(target, CopyState.OCCUPIED, mode="existing", reason="it has no receipt"))

    @pytest.mark.parametrize(
        ("values", "reason"),
        [({}, "is in use by another process"), ({"mode": "existing"}, "cannot be used")],
    )
    def test_target_in_use(self, values: dict[str, Any], reason: str, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["info"] = LOCKED
        assert reason in refused(copy_of(target, CopyState.OCCUPIED, **values), overwrite=True)

    def test_target_that_is_no_image_can_be_replaced(self, target: Path, tool: Tool) -> None:
        target.touch()
        tool.answers["info"] = ToolError("qemu-img info: Could not read")
        prepare(copy_of(target, CopyState.OCCUPIED), overwrite=True)

    def test_device_in_use(self, target: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
        target.touch()
        tool.answers["info"] = {"format": "raw", "virtual-size": SIZE}
        monkeypatch.setattr(target_files, "is_block_device", lambda _path: True)

        def busy(_path: str, flags: int) -> int:
            assert flags & os.O_EXCL
            raise OSError(16, "Device or resource busy")

        asked = copy_of(target, CopyState.OCCUPIED, mode="existing", format="raw", receipt="/r/x.json")
        assert prepare(asked).block_device
        monkeypatch.setattr(os, "open", busy)
        assert "is in use (mounted, or part of a volume): Device or resource busy" in refused(asked)


class TestBusy:
    def test_vm_without_jobs(self, target: Path) -> None:
        preflight.refuse_busy(vm(jobs=(job("old", "concluded"),)), [copy_of(target)])

    def test_any_other_job(self, target: Path) -> None:
        with pytest.raises(BackupError) as refusal:
            preflight.refuse_busy(vm(jobs=(job("old", "concluded"), job("mirror0"))), [copy_of(target)])
        assert str(refusal.value) == (
            "VM web01 is busy: job mirror0 (backup, running); wait for its end, or cancel it with block_job, then"
            f" repeat the backup of disk drive0 to {target}"
        )

    @pytest.mark.parametrize(("asked", "taken"), [("mine", True), ("", False), ("other", False)])
    def test_id_of_an_ended_job(self, asked: str, taken: bool, target: Path) -> None:
        found = vm(jobs=(job("mine", "concluded"),))
        if not taken:
            preflight.refuse_busy(found, [copy_of(target, job_id=asked)])
            return
        with pytest.raises(Refused, match=r"^job_id: mine is taken by an ended job"):
            preflight.refuse_busy(found, [copy_of(target, job_id=asked)])


INCREMENT = {"sync": "incremental", "bitmap": "b0"}


class TestLostIncrement:
    def test_gap_is_told(self, target: Path) -> None:
        copy = copy_of(target, CopyState.DEAD, record=record(**INCREMENT), reason="its QEMU has ended")
        with pytest.raises(BackupError) as refusal:
            preflight.refuse_lost_increment(copy, accepted=False)
        assert "is lost (its QEMU has ended), and QEMU may have cleared bitmap b0" in str(refusal.value)
        assert str(refusal.value).endswith(f"and removes {target}.receipt.json.partial")
        preflight.refuse_lost_increment(copy, accepted=True)

    @pytest.mark.parametrize(
        ("found", "values"),
        [
            (CopyState.DEAD, {"sync": "full"}),
            (CopyState.DEAD, {"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}),
            (CopyState.DEAD, {**INCREMENT, "phase": "preparing"}),
            (CopyState.DEAD, {**INCREMENT, "phase": "cancelling"}),
            (CopyState.ENDED, INCREMENT),
            (CopyState.ABSENT, None),
        ],
        ids=["full", "bitmap kept", "not started", "given up", "ended", "nothing"],
    )
    def test_no_gap(self, found: str, values: dict[str, Any] | None, target: Path) -> None:
        preflight.refuse_lost_increment(copy_of(target, found, record=values and record(**values)), accepted=False)

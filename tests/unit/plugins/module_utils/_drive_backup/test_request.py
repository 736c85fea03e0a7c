# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is asked of drive_backup, and what is refused without a look at the VM."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup import request
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive, check_drives

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that pass for block devices."""
    paths: set[str] = set()
    monkeypatch.setattr(request, "is_block_device", paths.__contains__)
    return paths


class TestDrive:
    @pytest.mark.parametrize(
        ("values", "image", "receipt"),
        [
            ({}, "/b/x.qcow2.partial", "/b/x.qcow2.receipt.json"),
            ({"mode": "existing"}, "/b/x.qcow2", "/b/x.qcow2.receipt.json"),
            ({"receipt": "/r/x.json"}, "/b/x.qcow2.partial", "/r/x.json"),
            ({"target": "/dev/sdx", "mode": "existing"}, "/dev/sdx", ""),
            ({"target": "/dev/sdx", "mode": "existing", "receipt": "/r/x.json"}, "/dev/sdx", "/r/x.json"),
        ],
    )
    def test_paths(self, values: dict[str, str], image: str, receipt: str, devices: set[str]) -> None:
        devices.add("/dev/sdx")
        drive = Drive(**{"device": "drive0", "target": "/b/x.qcow2", **values})  # type: ignore[arg-type]
        assert (drive.image_path, drive.receipt_path) == (image, receipt)

    @pytest.mark.parametrize(
        ("values", "more"),
        [
            ({}, {}),
            ({"speed": 5, "sync": "top"}, {"speed": 5, "sync": "top"}),
            (
                {"on_source_error": "stop", "on_target_error": "enospc"},
                {"on-source-error": "stop", "on-target-error": "enospc"},
            ),
            ({"bitmap": "b0", "bitmap_mode": "never"}, {"bitmap": "b0", "bitmap-mode": "never"}),
            ({"compress": True}, {"compress": True}),
        ],
    )
    def test_arguments_are_qemus_own(self, values: dict[str, Any], more: dict[str, Any]) -> None:
        defaults = {"sync": "full", "speed": 0, "on-source-error": "report", "on-target-error": "report"}
        assert Drive("drive0", "/b/x", **values).arguments() == {**defaults, **more}


class TestCheckDrives:
    @pytest.fixture
    def check(self, tmp_path: Path) -> Any:
        """Check drives; `@` in a path is a directory of the test."""
        (tmp_path / "there.qcow2").touch()
        (tmp_path / "link").symlink_to(tmp_path)

        def made(number: int, drive: dict[str, Any]) -> Drive:
            given: dict[str, Any] = {"device": f"drive{number}", "target": f"@/{number}.qcow2", "receipt": "", **drive}
            for name in ("target", "receipt"):
                given[name] = given[name].replace("@", str(tmp_path))
            return Drive(**given)

        def run(*drives: dict[str, Any]) -> None:
            check_drives(tuple(made(number, drive) for number, drive in enumerate(drives)))

        return run

    @pytest.mark.parametrize(
        "drives",
        [
            [{}],
            [{}, {}],
            [{"mode": "existing", "target": "@/there.qcow2"}],
            [{"target": "@/a:b,c.qcow2", "job_id": "Job-1.x_y", "receipt": "@/r.json", "speed": 1}],
            [{"sync": "top", "compress": True}],
            [{"sync": "incremental", "bitmap": "b0"}],
            [{"sync": "incremental", "bitmap": "b0", "bitmap_mode": "on-success"}],
            [{"sync": "bitmap", "bitmap": "b0", "bitmap_mode": "never"}],
            [{"sync": "full", "bitmap": "b0", "bitmap_mode": "on-success"}],
            [{"job_id": "a"}, {"job_id": "b"}],
        ],
    )
    def test_good(self, drives: list[dict[str, Any]], check: Any) -> None:
        check(*drives)

    @pytest.mark.parametrize(
        ("drives", "option", "reason"),
        [
            ([{"target": "x.qcow2"}], "target", "not an absolute path"),
            ([{"target": ""}], "target", "not an absolute path"),
            ([{"target": 'json:{"driver":"raw"}'}], "target", "not an absolute path"),
            ([{"target": "nbd://h/e"}], "target", "not an absolute path"),
            ([{"receipt": "r.json"}], "receipt", "not an absolute path"),
            ([{"job_id": "1st"}], "job_id", "QEMU wants a letter"),
            ([{"job_id": "my job"}], "job_id", "QEMU wants a letter"),
            ([{"job_id": "job\n"}], "job_id", "QEMU wants a letter"),
            ([{"sync": "incremental"}], "bitmap", "needs the bitmap"),
            ([{"sync": "bitmap", "bitmap_mode": "never"}], "bitmap", "needs the bitmap"),
            ([{"sync": "bitmap", "bitmap": "b0"}], "bitmap_mode", "needs on-success, never or always"),
            (
                [{"sync": "incremental", "bitmap": "b0", "bitmap_mode": "never"}],
                "bitmap_mode",
                "has only on-success",
            ),
            ([{"bitmap_mode": "never"}], "bitmap_mode", "there is no bitmap"),
            ([{"bitmap": "b0"}], "bitmap", "sync full does not read it"),
            ([{"sync": "top", "bitmap": "b0"}], "bitmap", "sync top does not read it"),
            ([{"bitmap": "b0", "bitmap_mode": "never"}], "bitmap_mode", "never has no effect with sync full"),
            ([{"target": "@/missing/x"}], "target", "the directory @/missing does not exist"),
            ([{"receipt": "@/missing/x"}], "receipt", "the directory @/missing does not exist"),
            pytest.param([{"target": "@/there.qcow2/x"}], "target", "does not exist; create it first"),
            ([{"target": "@"}], "target", "is a directory"),
            ([{"target": "@/x", "mode": "existing"}], "target", "does not exist, and mode is existing"),
            ([{"speed": -1}], "speed", "-1 is negative"),
            ([{"compress": True, "format": "raw"}], "compress", "cannot be compressed"),
            ([{"target": "@/x"}, {"target": "@/x"}], "target", "more than one drive"),
            ([{"target": "@/x"}, {"target": "@/link/x"}], "target", "more than one drive"),
            ([{"receipt": "@/r"}, {"receipt": "@/link/r"}], "receipt", "more than one drive"),
            ([{"receipt": "@/1.qcow2.receipt.json"}, {}], "receipt", "more than one drive"),
            ([{"job_id": "a"}, {}, {"job_id": "a"}], "job_id", "more than one drive"),
        ],
    )
    def test_refusal_names_its_option(
        self, drives: list[dict[str, Any]], option: str, reason: str, check: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(Refused) as refused:
            check(*drives)
        assert refused.value.option == option
        assert reason.replace("@", str(tmp_path)) in str(refused.value)

    @pytest.mark.parametrize(
        ("values", "closed", "option"),
        [
            ({}, "", "target"),
            ({"receipt": "@/r/x.json"}, "r", "receipt"),
        ],
    )
    def test_directory_must_be_writable(
        self,
        values: dict[str, str],
        closed: str,
        option: str,
        check: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "r").mkdir()
        place = str(tmp_path / closed) if closed else str(tmp_path)
        # Root may write everywhere.
        monkeypatch.setattr(os, "access", lambda path, mode: path != place or mode != os.W_OK | os.X_OK)
        with pytest.raises(Refused, match="cannot write to the directory") as refused:
            check(values)
        assert refused.value.option == option

    def test_block_device_is_never_made(self, check: Any, devices: set[str], tmp_path: Path) -> None:
        devices.add(str(tmp_path / "there.qcow2"))
        with pytest.raises(Refused, match="use mode existing") as refused:
            check({"target": "@/there.qcow2"})
        assert refused.value.option == "mode"

    def test_nothing_is_made_beside_a_block_device(
        self, check: Any, devices: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        devices.add(str(tmp_path / "there.qcow2"))
        monkeypatch.setattr(os, "access", lambda _path, _mode: False)
        check({"target": "@/there.qcow2", "mode": "existing"})

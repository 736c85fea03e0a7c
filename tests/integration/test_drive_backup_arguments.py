# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: every argument of QEMU's command reaches QEMU, seen in the audit trail and from outside."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    SLOW,
    arguments,
    assert_good,
    backup,
    release,
    sent,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, info
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def _start(vm: Qemu, target: Path, **options: t.Any) -> dict[str, t.Any]:
    """Start a backup with these options; returns what QEMU was told."""
    result = backup(vm, target, state="started", **{"speed": SLOW, **options})
    [told] = sent(result, "drive-backup")
    return told


def _end(vm: Qemu, target: Path, **options: t.Any) -> None:
    release(vm)
    backup(vm, target, **options)


def test_defaults(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    result = backup(vm, target)
    [told] = sent(result, "drive-backup")
    assert told["device"] == "n0"
    assert told["format"] == "qcow2"
    assert told["sync"] == "full"
    # QEMU never makes a target: it would truncate what stands there, even where the start fails.
    assert told["mode"] == "existing"
    # The outcome has to be there when somebody looks, however late.
    assert told["auto-dismiss"] is False
    # What QEMU has defaults for is either left to it or said as it is.
    assert told.get("speed", 0) == 0
    assert told.get("on-source-error", "report") == "report"
    assert told.get("on-target-error", "report") == "report"
    assert told.get("compress", False) is False
    assert "bitmap" not in told
    assert "bitmap-mode" not in told
    assert_good(target, copy)


def test_target_is_handed_over_as_open_files(vm: Qemu, target: Path) -> None:
    result = backup(vm, target, state="started")
    [told] = sent(result, "drive-backup")
    node = json.loads(told["target"].removeprefix("json:"))
    assert node["driver"] == "qcow2"
    # A backing file that the header may name is not QEMU's to open.
    assert node["backing"] is None
    assert node["file"]["filename"].startswith("/dev/fdset/")
    assert len(sent(result, "add-fd")) == 2
    assert all(fd["opaque"].startswith("vmfleet:db:") for fd in sent(result, "add-fd"))
    # At once: QEMU would keep the image open and locked for as long as the fdset is there.
    assert len(sent(result, "remove-fd")) == 1
    backup(vm, target)


@pytest.mark.parametrize(
    ("given", "told", "seen"),
    [
        (SLOW, SLOW, SLOW),
        ("1048576", SLOW, SLOW),
        ("1M", SLOW, SLOW),
        ("2m", 2 * MIB, 2 * MIB),
        ("2048K", 2 * MIB, 2 * MIB),
    ],
)
def test_speed(vm: Qemu, target: Path, given: object, told: int, seen: int) -> None:
    assert _start(vm, target, speed=given)["speed"] == told
    assert vm.job["speed"] == seen
    _end(vm, target)


def test_speed_zero_is_unlimited(vm: Qemu, target: Path) -> None:
    result = backup(vm, target, speed=0)
    assert result["jobs"][0]["state"] == "completed"


@pytest.mark.parametrize("option", ["on_source_error", "on_target_error"])
@pytest.mark.parametrize("policy", ["report", "ignore", "enospc", "stop"])
def test_error_policies(vm: Qemu, target: Path, option: str, policy: str) -> None:
    told = _start(vm, target, **{option: policy})
    name = option.replace("_", "-")
    assert told.get(name, "report") == policy
    assert policy == "report" or name in told
    _end(vm, target, **{option: policy})


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_format(vm: Qemu, directory: Path, target: Path, fmt: str) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert _start(vm, target, format=fmt)["format"] == fmt
    _end(vm, target, format=fmt)
    assert_good(target, copy, fmt)
    if fmt == "raw":
        assert target.stat().st_size == 64 * MIB


def test_format_vmdk(vm: Qemu, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], target.parent.parent / "frozen.qcow2")
    backup(vm, target, format="vmdk")
    assert info(target)["format"] == "vmdk"
    assert_good(target, copy, "vmdk")


def test_compress_makes_zstd(vm: Qemu, directory: Path, target: Path) -> None:
    copy = vm.freeze(vm.disks[0], directory / "frozen.qcow2")
    assert _start(vm, target, compress=True)["compress"] is True
    _end(vm, target, compress=True)
    assert info(target)["format-specific"]["data"]["compression-type"] == "zstd"
    assert target.stat().st_size < 2 * MIB
    assert target.stat().st_blocks * 512 < 2 * MIB
    assert_good(target, copy)


def test_job_id(vm: Qemu, target: Path) -> None:
    assert _start(vm, target, job_id="nightly.web01")["job-id"] == "nightly.web01"
    assert vm.job["device"] == "nightly.web01"
    release(vm)
    assert backup(vm, target, job_id="nightly.web01")["jobs"][0]["id"] == "nightly.web01"


def test_own_job_ids_are_the_same_every_time(vm: Qemu, target: Path) -> None:
    told = _start(vm, target)["job-id"]
    assert told.startswith("vmfleet.db.")
    assert vm.job["device"] == told
    backup(vm, target, state="cancelled")
    assert _start(vm, target)["job-id"] == told
    backup(vm, target, state="cancelled")
    other = target.with_name("other.qcow2")
    assert _start(vm, other)["job-id"] != told
    backup(vm, other, state="cancelled")


@pytest.mark.parametrize(
    ("options", "bitmap_mode"),
    [
        ({"sync": "incremental"}, None),
        ({"sync": "incremental", "bitmap_mode": "on-success"}, "on-success"),
        ({"sync": "bitmap", "bitmap_mode": "never"}, "never"),
        ({"sync": "bitmap", "bitmap_mode": "on-success"}, "on-success"),
        ({"sync": "bitmap", "bitmap_mode": "always"}, "always"),
        ({"sync": "full", "bitmap_mode": "on-success"}, "on-success"),
    ],
)
def test_sync_and_bitmap(vm: Qemu, target: Path, options: dict[str, str], bitmap_mode: str | None) -> None:
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    vm.write("drive0", 0x31, 0, MIB)
    [told] = sent(backup(vm, target, bitmap="b0", **options), "drive-backup")
    assert told["sync"] == options["sync"]
    assert told["bitmap"] == "b0"
    assert told.get("bitmap-mode") in (bitmap_mode, *([] if bitmap_mode else ["on-success"]))


def test_options_of_a_drive_come_first_and_the_module_s_after(vm: Qemu, target: Path) -> None:
    second = target.with_name("second.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    drives = [{"device": "drive0", "target": str(target), "on_target_error": "stop", "speed": 2 * SLOW}]
    result = backup(vm, drives=drives, speed=SLOW, on_source_error="stop", state="started")
    [told] = sent(result, "drive-backup")
    assert told["speed"] == 2 * SLOW == vm.job["speed"]
    assert told["on-target-error"] == "stop"
    assert told["on-source-error"] == "stop"
    release(vm)
    backup(vm, drives=drives, speed=SLOW, on_source_error="stop")
    assert target.exists()
    assert not second.exists()


def test_queries_are_not_in_the_audit_trail(vm: Qemu, target: Path) -> None:
    result = backup(vm, target)
    assert result["qmp"]
    assert not [entry for entry in result["qmp"] if entry["execute"].startswith("query-")]
    again = succeed("drive_backup", arguments(vm, target))
    assert not sent(again, "drive-backup")

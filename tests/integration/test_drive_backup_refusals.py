# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: bad input is refused by the option's name, before any job or file exists."""

from __future__ import annotations

import re
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import (
    arguments,
    backup,
    sent,
    snapshot,
    start_foreign,
    start_slowly,
    wait_concluded,
)
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, patterned
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")


def refuse(vm: Qemu, directory: Path, option: str, given: dict[str, t.Any], check: bool = False) -> str:
    """The call is refused by the option's name and changes nothing; returns what it said."""
    before = snapshot(directory)
    jobs = [job["device"] for job in vm.block_jobs]
    result = fail("drive_backup", given, check=check)
    assert re.search(rf"\b{option}\b", result["msg"]), result["msg"]
    assert not sent(result, "drive-backup")
    assert snapshot(directory) == before
    assert [job["device"] for job in vm.block_jobs] == jobs
    return str(result["msg"])


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("device", {"device": "nosuch"}),
        ("device", {"device": ""}),
        ("speed", {"speed": -1}),
        ("speed", {"speed": "-5M"}),
        ("speed", {"speed": "fast"}),
        ("target", {"target": "relative.qcow2"}),
        ("target", {"target": ""}),
        ("target", {"target": 'json:{"driver":"qcow2","file":{"driver":"file","filename":"/tmp/x"}}'}),
        ("target", {"target": "nbd://127.0.0.1:10809/export"}),
        ("target", {"target": "nbd:unix:/tmp/socket"}),
        ("target", {"target": "file:/tmp/vmfleet.qcow2"}),
        ("target", {"target": "/dev/fdset/1"}),
        ("target", {"target": "/nonexistent/disk.qcow2"}),
        ("target", {"target": "/proc/disk.qcow2"}),
        ("target", {"target": "/dev/null"}),
        ("target", {"target": "/tmp"}),
        # With .receipt.json.partial.tmp after it there would be 256 bytes.
        ("target", {"target": f"/tmp/{'x' * 231}"}),
        ("target", {"target": f"/tmp/{'x' * 248}", "receipt": "/tmp/short"}),
        ("receipt", {"receipt": f"/tmp/{'x' * 244}"}),
        ("timeout", {"timeout": "soon"}),
        ("timeout", {"timeout": "-5m"}),
        ("stall_timeout", {"stall_timeout": "10 parsecs"}),
        ("format", {"format": "nosuchfmt"}),
        ("bitmap", {"bitmap": "b0"}),
        ("bitmap", {"sync": "incremental"}),
        ("bitmap", {"sync": "bitmap", "bitmap_mode": "never"}),
        ("bitmap", {"sync": "incremental", "bitmap": "nosuch"}),
        ("bitmap_mode", {"bitmap_mode": "never"}),
        ("bitmap_mode", {"sync": "bitmap", "bitmap": "b0"}),
        ("bitmap_mode", {"sync": "incremental", "bitmap": "b0", "bitmap_mode": "always"}),
        ("bitmap_mode", {"sync": "full", "bitmap": "b0", "bitmap_mode": "never"}),
        ("compress", {"compress": True, "format": "raw"}),
        ("job_id", {"job_id": "1 bad id"}),
        ("sync", {"sync": "none"}),
        ("mode", {"mode": "existing"}),
        ("on_target_error", {"on_target_error": "panic"}),
        ("timeout", {"timeout": -1}),
        ("stall_timeout", {"stall_timeout": -1}),
        ("receipt", {"receipt": "relative.json"}),
        ("monitor", {"monitor": "relative.sock"}),
        ("monitor", {"monitor": "tcp:nowhere"}),
        ("monitor", {"monitor": "libvirt:a/b"}),
        ("libvirt_uri", {"libvirt_uri": "qemu+ssh://hv2/system"}),
    ],
)
def test_single_options(vm: Qemu, directory: Path, target: Path, option: str, options: dict[str, t.Any]) -> None:
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    refuse(vm, directory, option, {**arguments(vm, target), **options})


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("device", {"device": "nosuch"}),
        ("target", {"target": "/nonexistent/disk.qcow2"}),
        ("format", {"format": "nosuchfmt"}),
        ("bitmap", {"sync": "incremental", "bitmap": "nosuch"}),
    ],
)
def test_check_mode_refuses_too(
    vm: Qemu, directory: Path, target: Path, option: str, options: dict[str, t.Any]
) -> None:
    refuse(vm, directory, option, {**arguments(vm, target), **options}, check=True)


def test_unknown_device_is_told_the_known_ones(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0, device="virtio-blk-pci,id=vd0"), Disk(None, id="cd", node=None), machine="q35,accel=tcg")
    said = refuse(vm, directory, "device", arguments(vm, target, device="nosuch"))
    for name in ("nosuch", "drive0", "n0", "vd0", "cd"):
        assert re.search(rf"\b{name}\b", said)


@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
@pytest.mark.parametrize(
    "way", ["source0.qcow2", "source1.qcow2", "base.qcow2", "backups/../source0.qcow2", "soft", "hard"]
)
def test_images_of_the_vm_itself(vms: Vms, directory: Path, target: Path, way: str, mode: str) -> None:
    base = patterned(directory / "base.qcow2")
    vm = vms.start(vms.disk(0), vms.disk(1), Disk(create(directory / "top.qcow2", backing=base), id="d2", node="n2"))
    assert target.parent.exists()
    (directory / "soft").symlink_to(directory / "source0.qcow2")
    (directory / "hard").hardlink_to(directory / "source0.qcow2")
    # Not as a Path, which would take the dots away.
    refuse(
        vm,
        directory,
        "target",
        {**arguments(vm, target), "target": f"{directory}/{way}", "overwrite": True, "mode": mode},
    )


def test_case_16_missing_directory(vm: Qemu, directory: Path) -> None:
    refuse(vm, directory, "target", arguments(vm, directory / "missing" / "disk.qcow2"))


def test_read_only_directory(vm: Qemu, storage: Storage, directory: Path) -> None:
    mount = storage.mount("tmpfs", 96 * MIB)
    mount.make_read_only()
    refuse(vm, directory, "target", arguments(vm, mount.path / "disk.qcow2"))


def test_directory_as_target(vm: Qemu, directory: Path, target: Path) -> None:
    target.mkdir()
    refuse(vm, directory, "target", arguments(vm, target, overwrite=True))


@pytest.mark.parametrize("content", [b"", b"somebody else's"])
def test_case_17_existing_file_without_receipt(vm: Qemu, directory: Path, target: Path, content: bytes) -> None:
    target.write_bytes(content)
    refuse(vm, directory, "overwrite", arguments(vm, target))


def test_case_17_existing_image_without_receipt(vm: Qemu, directory: Path, target: Path) -> None:
    patterned(target)
    refuse(vm, directory, "overwrite", arguments(vm, target))


def test_case_17_dangling_symlink(vm: Qemu, directory: Path, target: Path) -> None:
    target.symlink_to(directory / "elsewhere.qcow2")
    refuse(vm, directory, "target", arguments(vm, target))


def test_case_17_receipt_of_another_disk(vms: Vms, directory: Path, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    backup(vm, target, device="drive1")
    said = refuse(vm, directory, "overwrite", arguments(vm, target))
    assert "drive1" in said


def test_case_17_receipt_of_another_kind(vm: Qemu, directory: Path, target: Path) -> None:
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0")
    backup(vm, target)
    refuse(vm, directory, "overwrite", arguments(vm, target, sync="bitmap", bitmap="b0", bitmap_mode="never"))
    refuse(vm, directory, "overwrite", arguments(vm, target, format="raw"))


def test_case_17_image_changed_since_its_receipt(vm: Qemu, directory: Path, target: Path) -> None:
    backup(vm, target)
    target.chmod(0o600)
    with target.open("r+b") as image:
        image.seek(1 << 20)
        image.write(b"touched")
    refuse(vm, directory, "overwrite", arguments(vm, target))


def test_case_17_image_replaced_since_its_receipt(vm: Qemu, directory: Path, target: Path) -> None:
    backup(vm, target)
    patterned(target.with_name("new.qcow2")).replace(target)
    refuse(vm, directory, "overwrite", arguments(vm, target))


def test_strange_partial_file_is_not_ours_to_remove(vm: Qemu, directory: Path, target: Path) -> None:
    strange = target.with_name(target.name + ".partial")
    strange.write_text("somebody else's")
    refuse(vm, directory, "target", arguments(vm, target))
    strange.unlink()


def test_strange_receipt(vm: Qemu, directory: Path, target: Path) -> None:
    target.with_name(target.name + ".receipt.json").write_text("no JSON")
    refuse(vm, directory, "receipt", arguments(vm, target))


def test_existing_target_of_another_size(vm: Qemu, directory: Path, target: Path) -> None:
    create(target, 32 * MIB)
    refuse(vm, directory, "target", arguments(vm, target, mode="existing", overwrite=True))


def test_existing_raw_target_needs_its_format(vm: Qemu, directory: Path, target: Path) -> None:
    create(target, fmt="raw")
    refuse(vm, directory, "format", arguments(vm, target, mode="existing", overwrite=True))


def test_existing_target_of_another_format(vm: Qemu, directory: Path, target: Path) -> None:
    create(target)
    refuse(vm, directory, "target", arguments(vm, target, mode="existing", overwrite=True, format="raw"))


def test_foreign_job_makes_the_vm_busy(vm: Qemu, directory: Path, target: Path) -> None:
    foreign = create(directory / "foreign.qcow2")
    start_foreign(vm, foreign, "alien", speed=1 << 20)
    result = fail("drive_backup", arguments(vm, target))
    assert "alien" in result["msg"]
    assert not list(target.parent.iterdir())
    assert vm.job["device"] == "alien"
    vm.qmp.execute("block-job-cancel", device="alien", force=True)


def test_second_target_while_the_first_is_made(vms: Vms, target: Path) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    start_slowly(vm, target)
    for device in ("drive0", "drive1"):
        result = fail("drive_backup", arguments(vm, target.with_name("second.qcow2"), device=device))
        assert vm.job["device"] in result["msg"]
    assert len(vm.block_jobs) == 1
    backup(vm, target, state="cancelled")


def test_job_id_that_is_taken(vm: Qemu, directory: Path, target: Path) -> None:
    foreign = create(directory / "foreign.qcow2")
    start_foreign(vm, foreign, "alien", auto_dismiss=False)
    wait_concluded(vm)
    refuse(vm, target.parent, "job_id", arguments(vm, target, job_id="alien"))
    vm.qmp.execute("job-dismiss", id="alien")


DRIVES: list[tuple[str, list[dict[str, str]]]] = [
    ("device", [{"device": "drive0", "target": "one"}, {"device": "drive0", "target": "two"}]),
    ("device", [{"device": "drive0", "target": "one"}, {"device": "n0", "target": "two"}]),
    ("target", [{"device": "drive0", "target": "one"}, {"device": "drive1", "target": "one"}]),
    ("target", [{"device": "drive0", "target": "one"}, {"device": "drive1", "target": "../backups/one"}]),
    ("device", [{"device": "drive0", "target": "one"}, {"device": "nosuch", "target": "two"}]),
    ("target", [{"device": "drive0", "target": "one"}, {"device": "drive1", "target": "missing/two"}]),
    (
        "job_id",
        [{"device": "drive0", "target": "one", "job_id": "a"}, {"device": "drive1", "target": "two", "job_id": "a"}],
    ),
    ("speed", [{"device": "drive0", "target": "one"}, {"device": "drive1", "target": "two", "speed": "-1"}]),
    ("drives", []),
]


@pytest.mark.parametrize(("option", "drives"), DRIVES)
def test_one_bad_drive_stops_all(
    vms: Vms, directory: Path, target: Path, option: str, drives: list[dict[str, str]]
) -> None:
    vm = vms.start(vms.disk(0), vms.disk(1))
    given = [{**drive, "target": str(target.parent / drive["target"])} for drive in drives]
    refuse(vm, directory, option, arguments(vm, drives=given))


def test_drives_and_device_exclude_each_other(vm: Qemu, directory: Path, target: Path) -> None:
    refuse(vm, directory, "drives", arguments(vm, target, drives=[{"device": "drive0", "target": str(target)}]))


def test_one_of_drives_and_device_is_needed(vm: Qemu, directory: Path) -> None:
    refuse(vm, directory, "drives", arguments(vm))


def test_device_needs_a_target(vm: Qemu, directory: Path) -> None:
    refuse(vm, directory, "target", arguments(vm, device="drive0"))

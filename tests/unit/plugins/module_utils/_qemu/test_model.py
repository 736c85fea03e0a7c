# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the read model of a VM says of its disks, bitmaps and jobs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import bitmap, disk, job, vm

VD0 = "/machine/peripheral/vd0/virtio-backend"
SYSTEM = disk("drive0", "n0", qdev=VD0, filters=("thr", "#cbw"))
DATA = disk("vd1", "n1", device="", qdev="/machine/peripheral/vd1/virtio-backend")
HIDDEN = disk("base", "base", device="")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("drive0", SYSTEM),
        ("vd0", SYSTEM),
        (VD0, SYSTEM),
        ("thr", SYSTEM),
        ("#cbw", SYSTEM),
        ("n0", SYSTEM),
        ("vd1", DATA),
        ("n1", DATA),
        ("base", HIDDEN),
    ],
)
def test_disk_answers_to_all_its_names(name: str, expected: object) -> None:
    assert vm(SYSTEM, DATA, other_nodes=(HIDDEN,)).disk(name) is expected


def test_backend_wins_over_a_node_of_the_same_name() -> None:
    node, backend = disk("first", "disk0"), disk("disk0", "n1")
    assert vm(node, backend).disk("disk0") is backend


@pytest.mark.parametrize("name", ["drive1", ""])
def test_unknown_disk_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(Refused) as refused:
        vm(SYSTEM, DATA, empty=("cd0",)).disk(name, "vms.include_disks")
    assert str(refused.value) == (
        f"vms.include_disks: VM web01 has no device {name!r}; it has: drive0 = vd0 = {VD0} = thr = #cbw = n0;"
        " vd1 = /machine/peripheral/vd1/virtio-backend = n1 (without medium: cd0)"
    )


def test_vm_without_disks_says_so() -> None:
    bare = Vm("web01", "", "", "running", "7.2.22", (), (), (), (), {}, None)
    with pytest.raises(Refused, match=r"^device: .* it has: none$"):
        bare.disk("drive0")


def test_bitmap_is_looked_up_by_its_name() -> None:
    found = disk(bitmaps=(bitmap("b0"), bitmap("b1", count=5)))
    assert found.bitmap("b1") == bitmap("b1", count=5)
    assert found.bitmap("b2") is None


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        ("running", False),
        ("waiting", False),
        ("pending", False),
        ("aborting", False),
        ("concluded", True),
        ("null", True),
    ],
)
def test_job_has_ended(status: str, ended: bool) -> None:
    assert job("j0", status).ended is ended


@pytest.mark.parametrize(
    ("status", "error", "failure", "said"),
    [
        ("running", "", "", ""),
        ("aborting", "Input/output error", "", ""),
        ("concluded", "", "", ""),
        ("concluded", "Input/output error", "Input/output error", "Input/output error"),
        ("concluded", "Operation canceled", "Operation canceled", "cancelled from outside"),
        ("null", "", "its job ended as null", "its job ended as null"),
    ],
)
def test_why_a_job_has_failed(status: str, error: str, failure: str, said: str) -> None:
    found = job("j0", status, error=error)
    assert (found.failure, found.failure_in_words) == (failure, said)


@pytest.mark.parametrize(
    ("values", "in_error"),
    [({}, False), ({"error": "Input/output error"}, True), ({"io_status": "nospace"}, True)],
)
def test_job_in_error(values: dict[str, Any], in_error: bool) -> None:
    assert job("j0", **values).in_error is in_error


@pytest.mark.parametrize(
    ("values", "percent"),
    [
        ({"offset": 1, "len": 3}, 33.3),
        ({"offset": 3, "len": 3}, 100.0),
        ({"len": 0}, 0.0),
        ({"len": 0, "status": "concluded"}, 100.0),
        ({"len": 0, "status": "concluded", "error": "Operation canceled"}, 0.0),
    ],
)
def test_progress_of_a_job(values: dict[str, Any], percent: float) -> None:
    assert job("j0", **values).as_dict()["percent"] == percent


def test_active_jobs_are_those_that_have_not_ended() -> None:
    found = vm(jobs=(job("a"), job("b"), job("c", "concluded")))
    assert [entry.id for entry in found.active_jobs()] == ["a", "b"]
    assert [entry.id for entry in found.active_jobs(besides=["a"])] == ["b"]
    assert found.job("c") == job("c", "concluded")
    assert found.job("d") is None


def test_a_block_device_has_many_names() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        by_id = Path(directory, "by-id")
        by_id.symlink_to("/dev/null")
        one = disk("drive0", "n0", file="/dev/null")
        assert one.shares_file(disk("drive1", "n1", file=str(by_id)))
        assert not one.shares_file(disk("drive1", "n1", file="/dev/zero"))
        assert not one.shares_file(disk("drive0", "n0", file=str(by_id)))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/b/x.raw", "/b//./x.raw", True),
        ("/b/x.raw", "/b/y.raw", False),
        ("x.raw", "x.raw", True),
        ("nbd://host/x", "nbd:/host/x", False),
        ("", "", False),
    ],
)
def test_disks_on_one_file(one: str, other: str, same: bool) -> None:
    assert disk("drive0", "n0", file=one).shares_file(disk("drive1", "n1", file=other)) is same

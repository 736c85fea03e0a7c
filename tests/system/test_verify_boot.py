# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_verify at its deepest: a real Linux starts from its backup, or it is told why not."""

from __future__ import annotations

import os
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.booting import user
from ansible_collections.vmfleet.backup.tests.harness.guest import Guest, built
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.slow

NAME = "guest"


@pytest.fixture
def sets(directory: Path) -> Sets:
    """A full set `s1`, an increment `s2`, and an increment `s3` from when the system disk had lost its file system."""
    sets = Sets(directory / "repository")
    (directory / "vm").mkdir()
    with Guest(directory / "vm", name=NAME) as guest:
        sets.back_up(guest, id="s1")
        rounds = guest.rounds
        wait_until(lambda: guest.rounds > rounds + 2, "the guest's next writes")
        sets.back_up(guest, id="s2")
        guest.qmp.execute("stop")
        guest.io("system", f"write -z 0 {MIB}")
        sets.back_up(guest, id="s3")
    assert [sets.levels(NAME, set_id)["system"] for set_id in ("s1", "s2", "s3")] == ["full", *["incremental"] * 2]
    return sets


def verify(sets: Sets, place: Path, **options: t.Any) -> dict[str, t.Any]:
    """Start a VM from a set; nothing of it is left, and nothing of the sets is touched."""
    before = {path: state for path, state in snapshot(sets.path).items() if "/s" in path}
    # Its kernel is no firmware.
    files = {"boot_files": [str(built())]}
    given = {"repository": str(sets.path), "names": [NAME], "depth": "boot", "tmpdir": str(place), **user()}
    given |= files | options
    result = run_module("backup_verify", given, timeout=240)
    assert {path: state for path, state in snapshot(sets.path).items() if "/s" in path} == before
    assert list(place.iterdir()) == []
    lines = [entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline") if os.access(entry, os.R_OK)]
    assert not any(f"guest=verify-{NAME}".encode() in line for line in lines)
    assert not list((sets.path / NAME).glob(".*.pin-*"))
    return result


def test_boot_of_a_real_guest(sets: Sets) -> None:
    with tempfile.TemporaryDirectory(prefix="vt-") as path:
        place = Path(path)

        # From the increment, by the agent; the disks as they are in vm.json are what its init mounts.
        result = verify(sets, place, id="s2")
        assert result["rc"] == 0, result
        assert [(one["disk"], one["ok"]) for one in result["results"]] == [("", True), ("system", True), ("data", True)]

        # From the full one, by what it says, with less memory.
        says = {"boot_agent": False, "boot_pattern": "^GUEST READY$"}
        result = verify(sets, place, id="s1", boot_options=["-m", "160M"], **says)
        assert result["rc"] == 0, result

        # Its kernel is none of the files that a set may name.
        result = verify(sets, place, id="s2", boot_files=[])
        [start] = [one for one in result["results"] if not one["ok"]]
        assert f"'{built()}/vmlinuz', which vm.json names as its kernel, is no firmware" in start["error"]

        # A system disk without a file system: init ends, and with it everything.
        result = verify(sets, place)
        assert result["failed"]
        [start] = [one for one in result["results"] if not one["ok"]]
        assert (start["id"], start["disk"], start["depth"]) == ("s3", "", "boot")
        assert "switched off or restarted" in start["error"]
        assert "Attempted to kill init" in "\n".join(start["console"])
        assert 1 < len(start["console"]) <= 40

        # One that waits for ever.
        wait = ["--append", "console=ttyS0 panic=0 rdinit=/nonexistent root=/dev/nothing rootwait"]
        for seconds in (25, 100):
            result = verify(sets, place, id="s2", boot_options=wait, boot_timeout=seconds)
            assert result["failed"]
            [start] = [one for one in result["results"] if not one["ok"]]
            assert f"no sign of life (its agent's answer) within {seconds} s" in start["error"]
            # On a busy machine its kernel needs longer to say as much.
            if len(start["console"]) == 40:
                break
        assert len(start["console"]) == 40

    told = {one["id"]: one["verified"] for one in succeed("backup_info", {"repository": str(sets.path)})["sets"]}
    assert {set_id: (one["depth"], one["ok"]) for set_id, one in told.items()} == {
        "s1": ("boot", True),
        "s2": ("boot", False),
        "s3": ("boot", False),
    }

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Calls of backup_plan and backup_set, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
import stat
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import identical, sound, unlocked
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, run_module, succeed

if t.TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

# Slow enough to look at the job of a 64 MiB disk, and to do something to it, before it ends.
SLOW = "1M"
ID = "s1"


class Sets:
    """One repository, and the VMs that are backed up into it."""

    def __init__(self, path: Path, inside: NameSpaces | None = None) -> None:
        """The modules run in the name spaces `inside`, or where the tests run."""
        self.path = path
        self.inside = inside

    def plan(self, *vms: Qemu | str, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        """Plan the backup of these VMs, or of those in `options`."""
        return succeed("backup_plan", self.arguments(*vms, **options), check=check, inside=self.inside)

    def arguments(self, *vms: Qemu | str, **options: t.Any) -> dict[str, t.Any]:
        """Arguments of backup_plan."""
        monitors = [{"monitor": vm if isinstance(vm, str) else str(vm.monitor)} for vm in vms]
        given = {"repository": str(self.path), "create_repository": True, "id": ID, "reserve": "0", "vms": monitors}
        return {**given, **options}

    def back_up(self, *vms: Qemu | str, state: str = "completed", **options: t.Any) -> dict[str, t.Any]:
        """Plan, and bring the plan to its end; both have to succeed."""
        return succeed("backup_set", {"plan": self.plan(*vms, **options)["plan"], "state": state}, inside=self.inside)

    def fail(self, *vms: Qemu | str, state: str = "completed", **options: t.Any) -> dict[str, t.Any]:
        """Plan, and try in vain to bring the plan to its end."""
        return fail("backup_set", {"plan": self.plan(*vms, **options)["plan"], "state": state}, inside=self.inside)

    def attempt(self, *vms: Qemu | str, **options: t.Any) -> dict[str, t.Any]:
        """Plan, and bring the plan to whatever end."""
        return run_module("backup_set", {"plan": self.plan(*vms, **options)["plan"]}, inside=self.inside)

    def start(self, *vms: Qemu | str, **options: t.Any) -> dict[str, t.Any]:
        """Start copies that run until the test takes the brake off; returns the plan."""
        plan: dict[str, t.Any] = self.plan(*vms, **{"speed": SLOW, **options})["plan"]
        result = succeed("backup_set", {"plan": plan, "state": "started"}, inside=self.inside)
        assert [vm["state"] for vm in result["vms"]] == ["running"] * len(vms), result["vms"]
        return plan

    def directory(self, name: str) -> Path:
        return self.path / name

    def manifest(self, name: str, set_id: str = ID) -> dict[str, t.Any]:
        found: dict[str, t.Any] = json.loads((self.path / name / set_id / "manifest.json").read_text())
        return found

    def images(self, name: str, set_id: str = ID) -> dict[str, Path]:
        """The images of a set, by the disk's name."""
        directory = self.path / name / set_id
        return {disk["name"]: directory / disk["image"] for disk in self.manifest(name, set_id)["disks"]}

    def levels(self, name: str, set_id: str = ID) -> dict[str, str]:
        """The levels of the images of a set, by the disk's name."""
        return {disk["name"]: disk["level"] for disk in self.manifest(name, set_id)["disks"]}

    def reasons(self, name: str, set_id: str = ID) -> dict[str, str]:
        """Why they have these levels."""
        return {disk["name"]: disk["reason"] for disk in self.manifest(name, set_id)["disks"]}

    def assert_good(
        self, name: str, copies: Mapping[str, Path], set_id: str = ID, levels: Mapping[str, str] | None = None
    ) -> None:
        """The set is there, whole, described, closed, with the content of the frozen copies, and nothing else is.

        Its disks have these `levels`, or are all full.
        """
        manifest = self.manifest(name, set_id)
        images = self.images(name, set_id)
        assert manifest["schema"] == 1
        assert (manifest["id"], manifest["vm"]["name"]) == (set_id, name)
        assert set(images) == set(copies)
        for disk in manifest["disks"]:
            image = images[disk["name"]]
            assert identical(copies[disk["name"]], image)
            assert sound(image)
            assert unlocked(image)
            assert stat.S_IMODE(image.stat().st_mode) == 0o440
            assert image.stat().st_size == disk["bytes"]
            assert hashlib.sha256(image.read_bytes()).hexdigest() == disk["sha256"]
            assert disk["level"] == (levels or {}).get(disk["name"], "full")
            assert (disk["parent"] is None) == (disk["level"] == "full")
        expected = {"manifest.json", "vm.json", *(image.name for image in images.values())}
        assert {path.name for path in (self.path / name / set_id).iterdir()} == expected
        self.assert_tidy(name)

    def assert_tidy(self, name: str) -> None:
        """Neither staging directories nor memories of failures."""
        assert [path.name for path in (self.path / name).glob(".*") if path.name != ".lock"] == []

    def assert_absent(self, name: str, set_id: str = ID) -> None:
        """No set, no part of one."""
        if (self.path / name).exists():
            left = [path.name for path in (self.path / name).iterdir()]
            assert not [entry for entry in left if entry not in (".lock", f".{set_id}.failed.json")]


def result_of(result: dict[str, t.Any], name: str) -> dict[str, t.Any]:
    """What a result says of one VM."""
    [found] = [vm for vm in result["vms"] if vm["name"] == name]
    return dict(found)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM that is backed up while it is on and while it is off, and the storage daemon that copies its disks then."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import daemon_place
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History, named
from ansible_collections.vmfleet.backup.tests.harness.images import qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.qmp import Qmp
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

NAME = "web01"


class OffHistory(History):
    """The sets of one VM, which is on or off. Its disks are listed with their files."""

    def __init__(self, vm: Qemu, sets: Sets, directory: Path) -> None:
        super().__init__(vm, sets, directory, NAME)
        self.entry: dict[str, t.Any] = {
            "name": NAME,
            "monitor": str(vm.monitor),
            "disks": [
                {"name": name, "file": str(disk.path), "format": disk.format} for name, disk in named(vm).items()
            ],
        }

    def freeze(self, set_id: str, *names: str) -> None:
        if self.vm.alive:
            super().freeze(set_id, *names)
            return
        self._copies[set_id] = {
            name: self.copy(disk, f"{set_id}-{name}")
            for name, disk in named(self.vm).items()
            if not names or name in names
        }

    def copy(self, disk: Disk, name: str) -> Path:
        """A flat copy of a disk of a VM that is off."""
        assert disk.path
        path = self._directory / f"frozen-{name}.qcow2"
        qemu_img("convert", "-U", "-f", disk.format, "-O", "qcow2", disk.path, path)
        return path

    def arguments(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Arguments of backup_plan."""
        return self.sets.arguments(**{"id": set_id, "vms": [self.entry], "offline": "backup", **options})

    def plan(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """What the plan says of the VM."""
        plan: dict[str, t.Any] = succeed("backup_plan", self.arguments(set_id, **options))["plan"]
        return plan

    def make(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Make a set, be the VM on or off; returns what has become of it."""
        self.freeze(set_id)
        result = succeed("backup_set", {"plan": self.plan(set_id, **options)})
        found = result_of(result, NAME)
        assert found["state"] == "published", found
        self.note(set_id)
        return {**found, "qmp": result["qmp"]}

    def start(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Start copies that run until the test lets them go; returns the plan."""
        self.freeze(set_id)
        plan = self.plan(set_id, **{"speed": "64K", **options})
        result = succeed("backup_set", {"plan": plan, "state": "started"})
        assert result_of(result, NAME)["state"] == "running", result
        return plan

    def write(self, pattern: int, offset: int, length: int, disk: str = "drive0") -> None:
        """Change a disk, as the guest or as an admin does while the VM is off."""
        if self.vm.alive:
            self.vm.write(disk, pattern, offset, length)
        else:
            found = named(self.vm)[disk]
            assert found.path
            write(found.path, f"write -P {pattern} {offset} {length}", fmt=found.format)

    def stored(self, disk: str = "drive0") -> dict[str, list[str]]:
        """The bitmaps in the image of a disk, each with its flags."""
        path = named(self.vm)[disk].path
        assert path
        found = json.loads(qemu_img("info", "-U", "--output=json", path))["format-specific"]["data"].get("bitmaps", [])
        return {bitmap["name"]: bitmap["flags"] for bitmap in found}

    @property
    def copying(self) -> bool:
        """Whether the jobs are there; false before the repository is."""
        return (self.sets.path / "vmfleet.json").exists() and self.daemon.started

    @property
    def daemon(self) -> Daemon:
        uuid = json.loads((self.sets.path / "vmfleet.json").read_text())["uuid"]
        return Daemon(Path(daemon_place.place_of(uuid[:8], NAME)))

    def assert_released(self, newest: str = "") -> None:
        """No storage daemon, nothing that belongs to one, and no bitmap but those of the newest set."""
        self.daemon.assert_gone()
        found = self.sets.manifest(self.name, newest)["disks"] if newest else []
        recorded = {disk["name"]: [disk["bitmap"]] for disk in found if disk["bitmap"]}
        for name, disk in named(self.vm).items():
            if disk.format == "qcow2":
                assert self.stored(name) == {key: ["auto"] for key in recorded.get(name, ())}

    def assert_held(self) -> None:
        """The VM cannot be started; that it was tried leaves no trace."""
        before = {name: self.stored(name) for name in named(self.vm)}
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            self.vm.start()
        self.vm.kill()
        assert {name: self.stored(name) for name in named(self.vm)} == before


class Daemon:
    """The storage daemon of a VM, and what belongs to it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @property
    def pids(self) -> list[int]:
        """The processes that were started with this place."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    if any(os.fsencode(self.place) + b"/" in word for word in words):
                        found.append(int(process.name))
        return found

    @property
    def pid(self) -> int:
        return int((self.place / "pid").read_text())

    @property
    def alive(self) -> bool:
        return bool(self.pids)

    def execute(self, command: str, **arguments: t.Any) -> t.Any:
        """Ask it, or tell it something."""
        with contextlib.closing(Qmp(self.place / "qmp")) as qmp:
            return qmp.execute(command, **arguments)

    @property
    def jobs(self) -> list[dict[str, t.Any]]:
        found: list[dict[str, t.Any]] = self.execute("query-block-jobs")
        return found

    @property
    def started(self) -> bool:
        """Whether its jobs are there; false before its monitor is."""
        with contextlib.suppress(OSError):
            return bool(self.jobs)
        return False

    def release(self) -> None:
        """Take the brake off."""
        for job in self.jobs:
            if job["status"] == "running":
                self.execute("block-job-set-speed", device=job["device"], speed=0)

    def wait_copied(self) -> None:
        wait_until(lambda: all(job["status"] == "concluded" for job in self.jobs), "the end of the jobs")

    def kill(self) -> None:
        """SIGKILL, as the OOM killer would."""
        pid = os.pidfd_open(self.pid)
        signal.pidfd_send_signal(pid, signal.SIGKILL)
        os.close(pid)
        wait_until(lambda: not self.alive, "the end of the storage daemon")

    def assert_gone(self) -> None:
        assert not self.pids
        assert not self.place.exists()

    def end(self) -> None:
        """End it, however the test has ended."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.alive, "the end of the storage daemon")
        for path in self.place.glob("*"):
            path.unlink()
        if self.place.exists():
            self.place.rmdir()


__all__ = ["NAME", "SIZE", "Daemon", "OffHistory"]

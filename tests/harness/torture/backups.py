# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The sets of the VM: they are planned and made, and what has to be true of them then."""

from __future__ import annotations

import json
import time
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.torture.truth import NAME

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets
    from ansible_collections.vmfleet.backup.tests.harness.torture.machine import Machine
    from ansible_collections.vmfleet.backup.tests.harness.torture.truth import Truth

IDS = (
    *("2026-11-22", "2025-01-01", "10", "9", "0", "Z", "a", "b", "x"),
    *("x.new", "a.failed.json", "a.failed.json.new", "b.staging", "b.staging.staging", "b.failed.json"),
    *("intent.json", "manifest.json", "vm.json", "vmfleet.json", "lock", "x_1", "x-1", "x.qcow2", "0.lock"),
)


BY_WORKER = 0.4
"""How many sets are left to a worker."""
LEFT_TO_A_WORKER = {"state": "started", "detach": "required", "slice": 600}


class Backups:
    """One VM's sets in one repository."""

    def __init__(self, sets: Sets, machine: Machine, truth: Truth) -> None:
        self.sets = sets
        self.machine = machine
        self.truth = truth
        self.vm = machine.vm
        self.ids = machine.chance.sample(IDS, len(IDS))
        self._wish: dict[str, t.Any] = {}

    def next_id(self) -> str:
        """Return an id that no set has yet."""
        return self.ids.pop() if self.ids else f"n{time.monotonic_ns()}"

    def module(self, name: str, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        """Run a module to its end, whatever that is."""
        return run_module(name, arguments, inside=self.sets.inside)

    def draw_wish(self) -> None:
        """Draw what the next set is to be like."""
        self._wish = {
            "level": self.machine.chance.choice(["auto", "auto", "auto", "incremental", "differential", "full"]),
            "tracking": self.machine.chance.random() > 0.08,
            "max_chain": self.machine.chance.choice([2, 4, 30]),
            "compression": self.machine.chance.choice(["none", "none", "none", "zstd", "zlib"]),
            "checksum": self.machine.chance.random() < 0.5,
        }

    def plan(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Freeze the moment, and plan."""
        self.machine.freeze()
        arguments = self.sets.arguments(self.vm, id=set_id, **{**self._wish, **options})
        return self.module("backup_plan", arguments)

    def execute(self, set_id: str, state: str = "completed", **options: t.Any) -> str:
        """Plan and make a set, with whatever end; returns the VM's state."""
        planned = self.plan(set_id, **options)
        if planned["rc"]:
            print(f"    no plan: {planned['msg']}")
            return "failed"
        by_worker = state == "completed" and self.machine.chance.random() < BY_WORKER
        how = LEFT_TO_A_WORKER if by_worker else {"state": state}
        result = self.module("backup_set", {"plan": planned["plan"], **how})
        return self.told(result)

    def told(self, result: dict[str, t.Any]) -> str:
        """Print what a run of the module has come to, and return the VM's state."""
        self.truth.note()
        assert "exception" not in result, result["exception"]
        if "vms" not in result:
            print(f"    {result['msg']}")
            return "failed"
        [vm] = result["vms"]
        print(f"    {vm['id']}: {vm['state']} {vm['error']}")
        for disk in vm["disks"]:
            print(f"      {disk['name']}: {disk['level']}: {disk['reason']}")
        return str(vm["state"])

    def succeed(self, set_id: str) -> None:
        """A run that needs no hand: nothing but what went before stands in its way."""
        self.machine.release()
        foreign, alive = self._foreign(), self.vm.alive
        state = self.execute(set_id)
        assert state == "published", f"set {set_id} is {state}"
        assert self.vm.alive == alive
        assert self._foreign() == foreign
        self._assert_tidy(set_id)

    def _foreign(self) -> set[tuple[str, str]]:
        """The bitmaps that are none of the repository's."""
        return {place for place in self.machine.bitmaps() if not place[1].startswith(self._prefix())}

    def _prefix(self) -> str:
        marker = self.sets.path / "vmfleet.json"
        return f"vmfleet-{json.loads(marker.read_text())['uuid'][:8]}-" if marker.exists() else "?"

    def _assert_tidy(self, set_id: str) -> None:
        """Nothing is left but sets, what the next ones may build on, and what is known of other ids."""
        assert not self.machine.leftovers()
        hidden = {path.name for path in (self.sets.path / NAME).glob(".*")}
        assert {name for name in hidden if not name.endswith(".failed.json")} == {".lock"}
        assert f".{set_id}.failed.json" not in hidden
        listed = self.truth.listed()
        assert set_id in [manifest["id"] for manifest in listed]
        images = [disk for manifest in listed for disk in manifest["disks"]]
        # For differentials, those of the last full images are kept as well.
        wanted = listed[-1]["disks"] if self._wish["level"] != "differential" else images
        # What is stored in a layer below a snapshot is out of reach.
        own = {disk.node for disk in self.vm.disks}
        ours = {name for node, name in self.machine.bitmaps() if name.startswith(self._prefix()) and node in own}
        assert ours <= {disk["bitmap"] for disk in wanted}

    def recover(self, set_id: str) -> None:
        """The next run, of the same id or another, or for now none at all."""
        self.machine.settle()
        self.truth.check()
        if not self.vm.answers:
            self.truth.stale()
            if self.machine.chance.random() < 0.3 and not self._lacks_a_disk(set_id):
                print("  a run while the VM is off")
                (self.succeed if self.machine.known_off else self.execute)(set_id)
                self.truth.check()
            self.machine.begin()
        elif self.machine.chance.random() < 0.5:
            self.machine.write_much()
        what = self.machine.chance.choice(["same", "other", "nothing"])
        if what == "same" and self._lacks_a_disk(set_id):
            what = "other"
        if what != "nothing":
            print(f"  and now the {what} id")
            self.succeed(set_id if what == "same" else self.next_id())

    def _lacks_a_disk(self, set_id: str) -> bool:
        """Whether this set is there without a disk that the VM has now, or that comes back with a start.

        It was attached since, or had been detached while the VM ran.
        """
        found = [manifest["disks"] for manifest in self.truth.listed() if manifest["id"] == set_id]
        wanted = self.machine.defined() | {disk.name for disk in self.vm.disks}
        return any(wanted - {disk["name"] for disk in disks} for disks in found)

    def bring_to(self, state: str) -> None:
        """Have the set that is being made be cancelled, or the bitmaps be removed."""
        self.module("backup_set", {"repository": str(self.sets.path), "names": [NAME], "state": state})

    def back_up(self) -> None:
        """A set is made, and nothing happens meanwhile."""
        self.draw_wish()
        self.succeed(self.next_id())

    def untrack(self) -> None:
        """The bitmaps are not wanted any more."""
        self.draw_wish()
        self.succeed(self.next_id())
        self.bring_to("untracked")
        own = {disk.node for disk in self.vm.disks}
        assert not {name for node, name in self.machine.bitmaps() if name.startswith(self._prefix()) and node in own}

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Chain torture: a VM and its sets go through whatever a seed decides, and every set that is listed has to be right.

Before each execution of the module the disks are copied while the guest is idle. An attempt that is first seen after it
was begun by it, so that its set has to equal these copies, whatever the guest writes from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import time
import typing as t

from ansible_collections.vmfleet.backup.tests.harness import snapshots
from ansible_collections.vmfleet.backup.tests.harness.crash import MODULE
from ansible_collections.vmfleet.backup.tests.harness.fixtures import leftovers
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, qemu_img, sound
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu, QmpError, wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

ROUNDS = 7
SECTOR = 512
NAME = "web01"
ROOM = 1 << 30

# Far more than anything here writes: the filter is there, and slows nothing down.
THROTTLE = 1 << 34

# Slow enough for something to happen to a job, and no slower: what has much to copy is let go in the end.
SLOW = "2M"

# About what one execution takes: killed at a later step, it has come to its end before.
STEPS = 100

IDS = (
    *("2026-11-22", "2025-01-01", "10", "9", "0", "Z", "a", "b", "x"),
    *("x.new", "a.failed.json", "a.failed.json.new", "b.staging", "b.staging.staging", "b.failed.json"),
    *("intent.json", "manifest.json", "vm.json", "vmfleet.json", "lock", "x_1", "x-1", "x.qcow2", "0.lock"),
)


def virtual_size(path: Path) -> int:
    """The size of a qcow2 image's disk, as its header has it."""
    with path.open("rb") as image:
        return int.from_bytes(image.read(32)[24:], "big")


class Truth:
    """The copies of the disks as they were, and what the repository makes of them."""

    def __init__(self, directory: Path, sets: Sets) -> None:
        self._directory = directory
        self._sets = sets
        self._fresh: dict[str, Path] = {}
        self._moment: dict[str, Path] = {}
        self._of: dict[str, dict[str, Path]] = {}
        self._seen: set[object] = set()
        self._number = 0

    def stale(self, *names: str) -> None:
        """These disks, or all, are no longer what they were at the last freeze."""
        for name in names or tuple(self._fresh):
            self._fresh.pop(name, None)

    def freeze(self, vm: Qemu) -> None:
        """Remember the disks as they are now. Nobody may be writing to them."""
        for disk in vm.disks:
            if disk.name not in self._fresh:
                self._number += 1
                copy = self._directory / f"frozen-{self._number}-{disk.name}.qcow2"
                self._fresh[disk.name] = vm.freeze(disk, copy)
        self._moment = dict(self._fresh)

    def note(self) -> None:
        """The attempts that have come up since the last freeze are of that moment."""
        for attempt in [document["attempt"] for document in (*self.listed(), *self.unfinished())]:
            self._of.setdefault(attempt, self._moment)

    def listed(self) -> list[dict[str, t.Any]]:
        """The manifests of all sets that are to be seen, in their order."""
        found = [document for path, document in self._documents("[!.]*/manifest.json") if document["id"] == path]
        return sorted(found, key=lambda manifest: manifest["sequence"])

    def unfinished(self) -> list[dict[str, t.Any]]:
        """The intents."""
        return [document for _path, document in self._documents(".*.staging/intent.json")]

    def _documents(self, pattern: str) -> t.Iterator[tuple[str, dict[str, t.Any]]]:
        for path in sorted((self._sets.path / NAME).glob(pattern)):
            with contextlib.suppress(FileNotFoundError, ValueError):
                yield path.parent.name, json.loads(path.read_text())

    def check(self, everything: bool = False) -> None:
        """Every set that is listed is what its disks were at its moment; looked at again only where files changed."""
        if everything:
            self._seen.clear()
        manifests = {manifest["id"]: manifest for manifest in self.listed()}
        sequences = [manifest["sequence"] for manifest in manifests.values()]
        assert len(set(sequences)) == len(sequences), f"two sets of one sequence number: {sequences}"
        for manifest in manifests.values():
            copies = self._of[manifest["attempt"]]
            assert {disk["name"] for disk in manifest["disks"]} == set(copies), f"disks of set {manifest['id']}"
            for disk in manifest["disks"]:
                files = tuple(self._chain(manifests, manifest, disk["name"]))
                if files not in self._seen:
                    self._check_image(manifest["id"], disk, copies[disk["name"]])
                    self._seen.add(files)

    def _chain(self, manifests: dict[str, t.Any], manifest: dict[str, t.Any], name: str) -> t.Iterator[object]:
        """What tells whether the files of an image, or of those below it, have changed."""
        while True:
            [disk] = [disk for disk in manifest["disks"] if disk["name"] == name]
            path = self._sets.path / NAME / manifest["id"] / disk["image"]
            status = path.stat()
            yield manifest["attempt"], path, status.st_ino, status.st_size, status.st_mtime_ns
            if disk["parent"] is None:
                return
            parent = manifests.get(disk["parent"]["id"])
            assert parent, f"set {manifest['id']} builds on {disk['parent']['id']}, which is not there"
            assert parent["sequence"] < manifest["sequence"]
            manifest = parent

    def _check_image(self, set_id: str, disk: dict[str, t.Any], copy: Path) -> None:
        image = self._sets.path / NAME / set_id / disk["image"]
        what = f"{disk['level']} image of {disk['name']} in set {set_id} ({disk['reason']})"
        assert virtual_size(image) == disk["virtual_size"] == virtual_size(copy), f"{what} has another size"
        assert image.stat().st_size == disk["bytes"], f"{what} has another length"
        assert identical(copy, image), f"{what} differs from {copy}"
        assert sound(image), f"{what} is damaged"
        checksum = hashlib.sha256(image.read_bytes()).hexdigest()
        assert disk["sha256"] in (None, checksum), f"{what} has another checksum"


class Machine:
    """A VM of small disks, and what happens to it beside its backups."""

    def __init__(self, directory: Path, vms: Vms, truth: Truth, chance: random.Random) -> None:
        self.chance = chance
        self._directory = directory
        self._truth = truth
        self._sizes: set[int] = set()
        # Of one size, so that swapped or copied disks are not told by that.
        equal = self._new_size()
        self.vm = vms.start(
            self._make("drive0", equal),
            self._make("drive1", self._new_size(), format="raw"),
            self._make("drive2", chance.choice([equal, self._new_size()]), throttle=THROTTLE),
            name=NAME,
            # Then the copies are made with blockdev-backup.
            rejecting=chance.random() < 0.25,
        )
        self._shrunk = False
        self._below: dict[str, list[Disk]] = {}
        """What the disks with external snapshots were, by their names, the newest last."""
        self._snapshots = 0
        for disk in self.vm.disks:
            self._fill(disk)

    def _new_size(self, least: int = 8 * MIB, most: int = 16 * MIB) -> int:
        """A size that no disk has had before: a shrunk disk that grows back to its old size cannot be told."""
        unit = self.chance.choice([SECTOR, 4096, 1 << 16])
        size = next(
            size for size in iter(lambda: self.chance.randrange(least, most, unit), 0) if size not in self._sizes
        )
        self._sizes.add(size)
        return size

    def _fill(self, disk: Disk) -> None:
        """Some data everywhere, to the very end."""
        size = self.size(disk)
        for end in (size * part // 16 // SECTOR * SECTOR for part in range(1, 17)):
            self.vm.write(disk.name, self.chance.randint(1, 255), end - (1 << 16), 1 << 16)

    def _make(self, name: str, size: int, **options: t.Any) -> Disk:
        disk = Disk(self._directory / f"{name}.img", id=name, node=f"node-{name}", discard=True, **options)
        cluster = f"cluster_size={self.chance.choice([4096, 1 << 16, MIB])}"
        more = ["-o", cluster] if disk.format == "qcow2" else []
        qemu_img("create", "-q", "-f", disk.format, *more, disk.path or "", str(size))
        return disk

    # The guest

    def write(self) -> None:
        """The guest writes."""
        self._do(f"write -P {self.chance.randint(1, 255)} {{}} {{}}", "wrote")

    def zero(self) -> None:
        """The guest writes zeroes that need not be allocated."""
        self._do("write -z -u {} {}", "wrote")

    def discard(self) -> None:
        """The guest discards."""
        self._do("discard {} {}", "discard")

    def _do(self, command: str, word: str) -> None:
        # A job's filter sits below the backend: writes to a node alone would go round it, as no guest's do.
        disks = [disk for disk in self.vm.disks if disk.id or not self.vm.block_jobs]
        disk = self.chance.choice(disks)
        sectors = self.size(disk) // SECTOR
        offset = self.chance.randrange(sectors)
        length = self.chance.randint(1, min(sectors - offset, 1 << self.chance.randrange(12)))
        self._truth.stale(disk.name)
        said = self.vm.io(disk.name, command.format(offset * SECTOR, length * SECTOR))
        assert said.startswith(f"{word} {length * SECTOR}/"), f"{disk.name}: {command}: {said}"

    def write_much(self) -> None:
        """The guest does this and that."""
        for _dummy in range(self.chance.randint(1, 5)):
            self.chance.choice([self.write, self.write, self.zero, self.discard])()

    def size(self, disk: Disk) -> int:
        """The size of a disk now."""
        return next(int(node["image"]["virtual-size"]) for node in self._nodes() if node["node-name"] == disk.node)

    def _nodes(self) -> list[dict[str, t.Any]]:
        nodes: list[dict[str, t.Any]] = self.vm.qmp.execute("query-named-block-nodes", flat=True)
        return nodes

    # Its owner

    def release(self) -> None:
        """Jobs go as fast as they can."""
        for job in self.vm.block_jobs:
            # It may have ended.
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block-job-set-speed", device=job["device"], speed=0)

    def resize(self) -> None:
        """A disk gets another size, online; QEMU refuses that while the disk has a job."""
        disk = self.chance.choice(self.vm.disks)
        before = self.size(disk)
        jobs = bool(self.vm.block_jobs)
        if jobs and self._below.get(disk.name):
            # The bitmap in use may be that of a layer.
            return
        after = self._new_size()
        if disk.throttle:
            if jobs and (self._shrunk or self._in_increment(disk)):
                # Grown on again, it would look as if it had never been shrunk.
                return
            self._shrunk = jobs and after < before
            how = {"device": disk.id}
        else:
            how = {"node_name": disk.node}
        # Also refused to an image with a bitmap that is inconsistent.
        with contextlib.suppress(QmpError):
            self.vm.qmp.execute("block_resize", size=after, **how)
        self._truth.stale(disk.name)

    def _in_increment(self, disk: Disk) -> bool:
        """Whether a job uses a bitmap of this disk: a size that QEMU 7.2 does not refuse then is the end of QEMU."""
        return any(bitmap["busy"] for bitmap in self.vm.bitmaps(disk.node or "").values())

    def stretch(self) -> None:
        """A disk is cut short, and grows on beyond its old size: what was at its end is gone."""
        disk = self.chance.choice(self.vm.disks)
        before = self.size(disk)
        if not self.vm.block_jobs:
            how = {"device": disk.id} if disk.throttle else {"node_name": disk.node}
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block_resize", size=self._new_size(before // 2, before - MIB), **how)
                self.vm.qmp.execute("block_resize", size=self._new_size(before, before + MIB), **how)
            self._truth.stale(disk.name)

    def add(self) -> None:
        """A disk is plugged in."""
        name = f"hot{len(self.vm.disks)}"
        if len(self.vm.disks) < 5 and not self.vm.block_jobs:
            disk = dataclasses.replace(self._make(name, self._new_size()), id=None)
            file = {"driver": "file", "filename": str(disk.path)}
            options = {"driver": "qcow2", "node-name": disk.node, "discard": "unmap", "file": file}
            self.vm.qmp.execute("blockdev-add", **options)
            self.vm.disks = (*self.vm.disks, disk)
            self._fill(disk)

    def restart(self) -> None:
        """The VM is switched off and on."""
        self.end()
        self.begin()

    def end(self, kill: bool | None = None) -> None:
        """QEMU ends."""
        kill = self.chance.random() < 0.4 if kill is None else kill
        print(f"    QEMU {'is killed' if kill else 'quits'}")
        if self.vm.alive:
            (self.vm.kill if kill else self.vm.quit)()
        self._truth.stale()
        self._shrunk = False

    def begin(self) -> None:
        """QEMU starts again."""
        self.vm.kill()
        # A snapshot's node has a name of its own until then.
        self.vm.disks = tuple(
            dataclasses.replace(disk, node=f"node-{disk.name}") if disk.id else disk for disk in self.vm.disks
        )
        self.vm.restart()

    def swap(self) -> None:
        """Two disks change places at a restart."""
        two = self._two()
        if not two:
            return
        one, other = two
        self.end()
        places = {one.name: other.path, other.name: one.path}
        self.vm.disks = tuple(
            dataclasses.replace(disk, path=places.get(disk.name, disk.path)) for disk in self.vm.disks
        )
        self.begin()

    def copy(self) -> None:
        """A disk is replaced by a copy of another at a restart, bitmaps and all."""
        two = self._two()
        if not two:
            return
        one, other = two
        self.end()
        assert one.path
        assert other.path
        shutil.copyfile(one.path, other.path)
        self.begin()

    def _two(self) -> list[Disk]:
        whole = [disk for disk in self.vm.disks if disk.format == "qcow2" and not self._below.get(disk.name)]
        return self.chance.sample(whole, 2) if len(whole) > 1 else []

    # External snapshots

    def snapshot(self) -> None:
        """Somebody takes an external snapshot, by libvirt or by QEMU alone."""
        disk = self.chance.choice([disk for disk in self.vm.disks if disk.id])
        like_libvirt = self.chance.random() < 0.7
        below = self._below.setdefault(disk.name, [])
        if len(below) < 3 and not any(job["type"] != "backup" for job in self.vm.block_jobs):
            self._snapshots += 1
            overlay = self._directory / f"{disk.name}-{self._snapshots}.qcow2"
            node = f"snap-{disk.name}-{self._snapshots}"
            print(f"    {disk.name}: {node}{' with bitmaps' if like_libvirt else ''}")
            snapshots.take(self.vm, disk.node or "", overlay, node, like_libvirt)
            below.append(disk)
            self._replace(disk, path=overlay, node=node, format="qcow2")

    def commit(self) -> None:
        """Layers are committed into one below, the active one among them or not, online or off."""
        disk, nodes = self._layered()
        if not disk or self.vm.block_jobs:
            return
        below = self._below[disk.name]
        base = self.chance.randrange(1, len(nodes))
        top = self.chance.choice([0, self.chance.randrange(base)])
        # QEMU does not commit or pull below a filter that is no root node.
        if disk.throttle or (top == 0 and base == 1 and self.chance.random() < 0.3):
            self._commit_offline(disk)
            return
        like_libvirt = self.chance.random() < 0.7
        print(f"    {disk.name}: {nodes[top]} into {nodes[base]}{' with bitmaps' if like_libvirt else ''}")
        snapshots.commit(self.vm, nodes[0], nodes[top], nodes[base], nodes[top + 1 : base], like_libvirt)
        if top == 0:
            self._replace(disk, path=below[-base].path, format=below[-base].format, node=nodes[base])
            del below[-base:]
        else:
            # The layers above `top` stay, and stand on the base.
            del below[len(below) - base + 1 : len(below) - top + 1]

    def _commit_offline(self, disk: Disk) -> None:
        print(f"    {disk.name}: by qemu-img")
        self.end(kill=False)
        qemu_img("commit", "-q", "-d", disk.path or "")
        last = self._below[disk.name].pop()
        self._replace(disk, path=last.path, format=last.format)
        self.begin()

    def pull(self) -> None:
        """What layers below hold is pulled into the active one."""
        disk, nodes = self._layered()
        if not disk or disk.throttle or self.vm.block_jobs:
            return
        below = self._below[disk.name]
        last = self.chance.randrange(1, len(nodes))
        layers = nodes[1 : last + 1]
        shared = [self.vm.bitmaps(node).get(name) for name in self.vm.bitmaps(nodes[0]) for node in layers]
        if not all(snapshots.usable(bitmap) for bitmap in shared if bitmap):
            # libvirt would leave the overlay's bitmap as it is, and nothing could tell that it is not whole.
            return
        print(f"    {disk.name}: {', '.join(layers)}")
        snapshots.pull(self.vm, nodes[0], layers, nodes[last + 1] if last + 1 < len(nodes) else None)
        del below[len(below) - last :]

    def _layered(self) -> tuple[Disk | None, list[str]]:
        """A disk with snapshots, and the nodes of its layers from the top on."""
        layered = [disk for disk in self.vm.disks if self._below.get(disk.name)]
        if not layered:
            return None, []
        disk = self.chance.choice(layered)
        paths = [layer.path for layer in (disk, *reversed(self._below[disk.name]))]
        return disk, [snapshots.node_of(self.vm, path) for path in paths if path]

    def _replace(self, disk: Disk, **changes: t.Any) -> None:
        self.vm.disks = tuple(
            dataclasses.replace(one, **changes) if one.name == disk.name else one for one in self.vm.disks
        )

    def lose_bitmap(self) -> None:
        """Somebody removes or disables one of our bitmaps."""
        found = [place for place in self.bitmaps() if place[1].startswith("vmfleet-")]
        if found:
            node, name = self.chance.choice(found)
            verb = self.chance.choice(["remove", "disable"])
            # Refused for one that is in use, or inconsistent.
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute(f"block-dirty-bitmap-{verb}", node=node, name=name)

    def add_bitmap(self) -> None:
        """Somebody else tracks changes too."""
        disk = self.chance.choice(self.vm.disks)
        name = self.chance.choice(["other", "vmfleet", "vmfleet-00000000-0123456789abcdef"]) + str(len(self.bitmaps()))
        persistent = disk.format == "qcow2" and self.chance.random() < 0.5
        with contextlib.suppress(QmpError):
            self.vm.qmp.execute("block-dirty-bitmap-add", node=disk.node, name=name, persistent=persistent)

    def bitmaps(self) -> set[tuple[str, str]]:
        """All named bitmaps, as node and name."""
        return {
            (node["node-name"], bitmap["name"])
            for node in self._nodes()
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        }


class Torture:
    """One sequence."""

    def __init__(
        self,
        seed: str,
        directory: Path,
        storage: Storage,
        vms: Vms,
        start: Callable[..., ModuleProcess],
    ) -> None:
        self._seed = seed
        self.chance = random.Random(seed)
        self._directory = directory
        self._mount: FileSystem | None = storage.mount("tmpfs", ROOM) if self.chance.random() < 0.6 else None
        self.sets = Sets((self._mount.path if self._mount else directory) / "repository")
        self._truth = Truth(directory, self.sets)
        self.machine = Machine(directory, vms, self._truth, self.chance)
        self._start = start
        self._ids = self.chance.sample(IDS, len(IDS))
        self._wish: dict[str, t.Any] = {}

    @property
    def vm(self) -> Qemu:
        """The VM."""
        return self.machine.vm

    def run(self) -> None:
        """Live through it."""
        machine = self.machine
        world = {
            machine.write_much: 12,
            machine.resize: 2,
            machine.stretch: 2,
            machine.add: 1,
            machine.restart: 3,
            machine.swap: 1,
            machine.copy: 1,
            machine.lose_bitmap: 2,
            machine.add_bitmap: 1,
            machine.snapshot: 4,
            machine.commit: 3,
            machine.pull: 2,
            self.prune: 2,
        }
        backups = {self.back_up: 4, self.disturb: 5, self.crash: 5, self.untrack: 1}
        if self._mount:
            backups |= {self.back_up_into_little: 1, self.starve: 1}
        for number in range(ROUNDS):
            # Decisions of a round do not depend on how the one before has gone.
            self.chance = machine.chance = random.Random(f"{self._seed}/{number}")
            for action in self._draw(world, self.chance.randint(1, 4)):
                self._act(action)
            for action in self._draw(backups, 1):
                self._act(action)
        self._act(self.back_up)
        self._truth.check(everything=True)

    def _draw(self, actions: dict[Callable[[], None], int], number: int) -> list[Callable[[], None]]:
        return self.chance.choices(list(actions), list(actions.values()), k=number)

    def _act(self, action: Callable[[], None]) -> None:
        print(f"{action.__name__}")
        action()
        self._truth.check()

    # Backups

    def _next_id(self) -> str:
        return self._ids.pop() if self._ids else f"n{time.monotonic_ns()}"

    def _draw_wish(self) -> None:
        """What the next set is to be like."""
        self._wish = {
            "level": self.chance.choice(["auto", "auto", "auto", "incremental", "differential", "full"]),
            "tracking": self.chance.random() > 0.08,
            "max_chain": self.chance.choice([2, 4, 30]),
            "compression": self.chance.choice(["none", "none", "none", "zstd", "zlib"]),
            "checksum": self.chance.random() < 0.5,
        }

    def _plan(self, set_id: str, **options: t.Any) -> dict[str, t.Any]:
        """Freeze the moment, and plan."""
        if self.vm.alive:
            self._truth.freeze(self.vm)
        arguments = self.sets.arguments(self.vm, id=set_id, **{**self._wish, **options})
        return run_module("backup_plan", arguments)

    def _execute(self, set_id: str, state: str = "completed", **options: t.Any) -> str:
        """Plan and make a set, with whatever end; returns the VM's state."""
        planned = self._plan(set_id, **options)
        if planned["rc"]:
            print(f"    no plan: {planned['msg']}")
            return "failed"
        result = run_module("backup_set", {"plan": planned["plan"], "state": state})
        return self._told(result)

    def _told(self, result: dict[str, t.Any]) -> str:
        self._truth.note()
        assert "exception" not in result, result["exception"]
        if "vms" not in result:
            print(f"    {result['msg']}")
            return "failed"
        [vm] = result["vms"]
        print(f"    {vm['id']}: {vm['state']} {vm['error']}")
        for disk in vm["disks"]:
            print(f"      {disk['name']}: {disk['level']}: {disk['reason']}")
        return str(vm["state"])

    def _succeed(self, set_id: str) -> None:
        """A run that needs no hand: nothing but what went before stands in its way."""
        self.machine.release()
        foreign = self._foreign()
        state = self._execute(set_id)
        assert state == "published", f"set {set_id} is {state}"
        assert self.vm.alive
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
        assert not leftovers(self.vm, self._directory)
        hidden = {path.name for path in (self.sets.path / NAME).glob(".*")}
        assert {name for name in hidden if not name.endswith(".failed.json")} == {".lock"}
        assert f".{set_id}.failed.json" not in hidden
        listed = self._truth.listed()
        assert set_id in [manifest["id"] for manifest in listed]
        images = [disk for manifest in listed for disk in manifest["disks"]]
        # For differentials, those of the last full images are kept as well.
        wanted = listed[-1]["disks"] if self._wish["level"] != "differential" else images
        # What is stored in a layer below a snapshot is out of reach.
        own = {disk.node for disk in self.vm.disks}
        ours = {name for node, name in self.machine.bitmaps() if name.startswith(self._prefix()) and node in own}
        assert ours <= {disk["bitmap"] for disk in wanted}

    def back_up(self) -> None:
        """A set is made, and nothing happens meanwhile."""
        self._draw_wish()
        self._succeed(self._next_id())

    def disturb(self) -> None:
        """Things happen to the VM, to its jobs and to the module while a set is made slowly."""
        self._draw_wish()
        set_id = self._next_id()
        process = self._begin_slowly(set_id)
        actions = [self.machine.write_much, self.machine.resize, self.machine.snapshot]
        for action in self.chance.choices(actions, [6, 2, 1], k=2):
            print(f"  meanwhile {action.__name__}")
            action()
        self.chance.choice(
            [self._let_go, self._let_go, self._cancel_jobs, self._dismiss_jobs, self._cancel, self._kill, self._kill]
        )(process)
        if process:
            process.wait()
            if not process.killed:
                self._told(process.result())
        self._truth.note()
        self._recover(set_id)

    def _begin_slowly(self, set_id: str) -> ModuleProcess | None:
        """Start the jobs of a set, or those of an older one; returns the module that follows them, where one does."""
        quiet = not self._truth.unfinished()
        if not quiet or self.chance.random() < 0.5:
            # Where another set comes to its end first, ours would be of a moment that nobody knows.
            self._execute(set_id, "started", speed=SLOW)
            return None
        planned = self._plan(set_id, speed=SLOW)
        # A killed module may have left jobs of a set that it had published.
        left = self._jobs()
        process = self._start("backup_set", {"plan": planned["plan"]})
        wait_until(lambda: self._jobs() - left or not process.running, "the jobs")
        return process

    def _jobs(self) -> set[str]:
        return {job["device"] for job in self.vm.block_jobs}

    def _let_go(self, _process: ModuleProcess | None) -> None:
        print("  the jobs run on")
        self.machine.release()

    def _cancel_jobs(self, _process: ModuleProcess | None) -> None:
        print("  somebody cancels a job")
        for job in self.vm.block_jobs[: self.chance.randint(1, 3)]:
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("block-job-cancel", device=job["device"], force=True)
        self.machine.release()

    def _dismiss_jobs(self, _process: ModuleProcess | None) -> None:
        print("  somebody dismisses a job")
        self.machine.release()
        for job in self.vm.block_jobs[:1]:
            with contextlib.suppress(QmpError):
                self.vm.qmp.execute("job-dismiss", id=job["device"])

    def _cancel(self, _process: ModuleProcess | None) -> None:
        print("  somebody cancels the set")
        run_module("backup_set", {"repository": str(self.sets.path), "names": [NAME], "state": "cancelled"})
        self.machine.release()

    def _kill(self, process: ModuleProcess | None) -> None:
        """QEMU ends, the module, or both."""
        if process and self.chance.random() < 0.6:
            print("  the module is killed")
            process.kill()
        if not process or process.killed is False or self.chance.random() < 0.5:
            self.machine.end()

    def crash(self) -> None:
        """The module is killed at one of its steps, QEMU, or both."""
        self._draw_wish()
        set_id = self._next_id()
        self.machine.release()
        step = self.chance.randint(1, STEPS)
        victim = self.vm.pid if self.chance.random() < 0.3 else MODULE
        print(f"  {'the module' if victim == MODULE else 'QEMU'} is killed at step {step}")
        planned = self._plan(set_id)
        process = self._start("backup_set", {"plan": planned["plan"]}, crash_at=step, victims=[victim])
        process.wait()
        if not process.killed:
            self._told(process.result())
        self._truth.note()
        if victim == MODULE and self.chance.random() < 0.3:
            self.machine.end(kill=True)
        self._recover(set_id)

    def _recover(self, set_id: str) -> None:
        """The next run, of the same id or another, or for now none at all."""
        self._truth.check()
        if not self.vm.answers:
            self._truth.stale()
            if self.chance.random() < 0.3:
                print("  a run while the VM is off")
                self._execute(set_id)
                self._truth.check()
            self.machine.begin()
        elif self.chance.random() < 0.5:
            self.machine.write_much()
        what = self.chance.choice(["same", "other", "nothing"])
        if what != "nothing":
            print(f"  and now the {what} id")
            self._succeed(set_id if what == "same" else self._next_id())

    def untrack(self) -> None:
        """The bitmaps are not wanted any more."""
        self._draw_wish()
        self._succeed(self._next_id())
        run_module("backup_set", {"repository": str(self.sets.path), "names": [NAME], "state": "untracked"})
        own = {disk.node for disk in self.vm.disks}
        assert not {name for node, name in self.machine.bitmaps() if name.startswith(self._prefix()) and node in own}

    def back_up_into_little(self) -> None:
        """There is hardly any room, or none, and then there is."""
        self._draw_wish()
        set_id = self._next_id()
        self.machine.release()
        self._squeeze(self.chance.choice([0, 1 << 14, 1 << 20, 3 << 20]))
        self._execute(set_id)
        self._truth.check()
        self._widen()
        self._recover(set_id)

    def starve(self) -> None:
        """Jobs run, and the repository fills up; in some cases it could not reserve the space for them."""
        self._draw_wish()
        set_id = self._next_id()
        self.machine.release()
        self._execute(set_id, "started", speed=SLOW)
        if self.chance.random() < 0.6:
            print("  what was reserved is taken")
            for image in (self.sets.path / NAME).glob(".*.staging/*.qcow2"):
                with image.open("r+b") as file:
                    file.truncate(image.stat().st_size)
        self._squeeze(0)
        self.machine.release()
        self._execute(set_id)
        self._truth.check()
        self._widen()
        self._recover(set_id)

    def _squeeze(self, leave: int) -> None:
        assert self._mount
        print(f"  {leave} bytes are left")
        # A file system that is cut short is as full as one that is filled, and that in no time. To a tmpfs, a size of 0
        # is none at all, and cannot be taken back.
        self._mount.grow(max(4096, ROOM - self._mount.free + leave))

    def _widen(self) -> None:
        assert self._mount
        self._mount.grow(ROOM)

    # The repository's owner

    def prune(self) -> None:
        """Sets are removed that no other builds on: old chains, or the newest sets."""
        listed = self._truth.listed()
        if not listed:
            return
        at = self.chance.randrange(len(listed))
        newest = self.chance.random() < 0.3
        kept, going = (listed[:at], listed[at:]) if newest else (listed[at:], listed[:at])
        # For an unfinished set, as for one that is there.
        needed = self._below([*kept, *self._truth.unfinished()], listed)
        for manifest in going:
            if manifest["id"] not in needed:
                print(f"  prune {manifest['id']}")
                shutil.rmtree(self.sets.path / NAME / manifest["id"])
                self._ids.insert(0, manifest["id"])

    def _below(self, documents: list[dict[str, t.Any]], listed: list[dict[str, t.Any]]) -> set[str]:
        """The sets that others build on, however far below."""
        by_id = {manifest["id"]: manifest for manifest in listed}
        needed: set[str] = set()
        while documents:
            # An intent has its images in something larger.
            images = [disk if "parent" in disk else disk["image"] for disk in documents.pop()["disks"]]
            parents = {image["parent"]["id"] for image in images if image["parent"]} - needed
            needed |= parents
            documents += [by_id[name] for name in parents]
        return needed

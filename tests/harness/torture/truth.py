# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The copies of the disks that every listed set has to equal.

Before each execution of the module the disks are copied while the guest is idle. An attempt that is first seen after it
was begun by it, so that its set has to equal these copies, whatever the guest writes from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.images import identical, sound

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

NAME = "web01"


def virtual_size(path: Path) -> int:
    """Return the size of a qcow2 image's disk, as its header has it."""
    with path.open("rb") as image:
        return int.from_bytes(image.read(32)[24:], "big")


class Moment(t.NamedTuple):
    """What the disks held, by their names, and the names of those that a VM has when its QEMU has ended."""

    copies: dict[str, Path]
    lasting: frozenset[str]


class Truth:
    """The copies of the disks as they were, and what the repository makes of them."""

    def __init__(self, directory: Path, sets: Sets) -> None:
        self._directory = directory
        self._sets = sets
        self._fresh: dict[str, Path] = {}
        self._moment = Moment({}, frozenset())
        self._of: dict[str, Moment] = {}
        self._seen: set[object] = set()
        self._number = 0

    def stale(self, *names: str) -> None:
        """These disks, or all, are no longer what they were at the last freeze."""
        for name in names or tuple(self._fresh):
            self._fresh.pop(name, None)

    def freeze(self, vm: Qemu, lasting: t.Collection[str] = ()) -> None:
        """Remember the disks as they are now, while nobody writes. The VM has `lasting` when its QEMU has ended."""
        for disk in vm.disks:
            if disk.name not in self._fresh:
                self._number += 1
                copy = self._directory / f"frozen-{self._number}-{disk.name}.qcow2"
                self._fresh[disk.name] = vm.freeze(disk, copy)
        # A disk that is gone may have been copied before: what detaches it can do so and be refused the rest.
        copies = {disk.name: self._fresh[disk.name] for disk in vm.disks}
        self._moment = Moment(copies, frozenset(lasting or copies))

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
            copies, lasting = self._of[manifest["attempt"]]
            # Where QEMU was killed after the plan, the set may be of the VM that is off.
            is_off = all(disk["node"].startswith("off") for disk in manifest["disks"])
            names = {disk["name"] for disk in manifest["disks"]}
            assert names in (set(copies), lasting if is_off else None), f"disks of set {manifest['id']}"
            for disk in manifest["disks"]:
                files = tuple(self._chain(manifests, manifest, disk["name"]))
                # What had been detached while it ran is as nobody has looked at it.
                if files not in self._seen and disk["name"] in copies:
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

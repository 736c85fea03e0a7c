# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune with consolidation: increments become full images under those that build on them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import shutil
import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock as host_lock
from ansible_collections.vmfleet.backup.plugins.module_utils._prune import consolidate, prune
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.image_chain import open_chain
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.images import layers
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness.choice import first
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info, sound
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library, gate
from ansible_collections.vmfleet.backup.tests.harness.pruning import assert_whole, fates, judge, two_chains
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import DiskImage
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

    Start = t.Callable[..., ModuleProcess]

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with two_chains() as chain:
        yield chain


class TestConsolidation:
    """Increments that become full images under those that build on them."""

    def test_all_that_is_kept_has_its_content(self, chain: Chain, library: Library) -> None:
        before = library.content(but=("s1", "s2"))
        said = library.prune(keep_last=4, consolidate=True)
        assert set(fates(said, "removed")) == {"s1"}
        assert [one["id"] for one in said["kept"] if one["consolidated"]] == ["s2"]
        assert said["text"][3] == "consolidate  web01/s2  last; set s3 builds on it"
        assert_whole(chain, library, "s5", "s4", "s3", "s2")
        manifest = library.manifest(NAME, "s2")
        assert manifest["level"] == "full"
        assert {disk["reason"] for disk in manifest["disks"]} == {"it was consolidated"}
        after = library.content(but=("s2",))
        after.pop(str(library.path / NAME / ".prune.lock"))
        assert after == before
        assert not library.prune(keep_last=4, consolidate=True)["changed"]

    def test_again_and_again(self, chain: Chain, library: Library) -> None:
        library.prune(keep_last=4, consolidate=True)
        library.prune(keep_last=3, consolidate=True)
        library.prune(keep_last=1, consolidate=True)
        assert_whole(chain, library, "s5")

    def test_one_of_each_chain(self, chain: Chain, library: Library) -> None:
        library.prune(names=[NAME], protect=["s3"])
        said = library.prune(keep_last=1, consolidate=True)
        assert [one["id"] for one in said["kept"] if one["consolidated"]] == ["s3", "s5"]
        library.prune(names=[NAME], unprotect=["s3"])
        assert_whole(chain, library, "s5", "s3")

    @pytest.mark.parametrize("compression", first(1, ["zstd", "zlib"]))
    def test_compressed_chain(self, vms: Vms, directory: Path, compression: str) -> None:
        chain = Chain(vms, directory, compression=compression)
        library = chain.library
        library.prune(keep_last=1, consolidate=True)
        assert_whole(chain, library, "s3")
        for disk, image in library.images(NAME, "s3").items():
            assert info(image)["format-specific"]["data"]["compression-type"] == compression
            assert image.stat().st_size < chain.copies("s3")[disk].stat().st_size // 2
        assert chain.go_on(4) == "incremental"
        assert_whole(chain, library, "s4", "s3")

    def test_room_for_what_was_compressed(self, vms: Vms, storage: Storage, directory: Path) -> None:
        chain = Chain(vms, directory, sets=2, compression="zstd")
        # The guest has written next to nothing since; what it reads is all there uncompressed.
        chain.go_on(3, compression="none")
        mount = storage.mount("tmpfs", 32 * MIB)
        library = chain.library.copy(mount.path / "repository")
        mount.fill(leave=2 * MIB)
        assert sum(library.manifest(NAME, f"s{number}")["disks"][0]["bytes"] for number in (1, 2, 3)) < 2 * MIB
        said = library.fail_prune(keep_last=1, consolidate=True)
        assert "the full image may take 4" in said["msg"]
        assert_whole(chain, library, "s3", "s2", "s1")
        mount.clear()
        library.prune(keep_last=1, consolidate=True)
        assert_whole(chain, library, "s3")

    def test_the_copy_is_compared_as_it_lies_on_the_disk(
        self, library: Library, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = open_repository(str(library.path)).records(NAME).published("s2")
        assert manifest
        new = directory / "new"
        done: list[str] = []
        run, advise = qemu_img.run_long, os.posix_fadvise

        async def told_run(command: list[str], *arguments: t.Any, **options: t.Any) -> str:
            done.append(command[1])
            return await run(command, *arguments, **options)

        def told_advise(fd: int, *arguments: int) -> None:
            if os.path.samestat(os.fstat(fd), new.stat()):
                done.append("forget")
            advise(fd, *arguments)

        monkeypatch.setattr(qemu_img, "run_long", told_run)
        monkeypatch.setattr(os, "posix_fadvise", told_advise)
        self.make_full(library, new, manifest.disks[0])
        assert done[:3] == ["convert", "forget", "compare"]

    def make_full(self, library: Library, new: Path, image: DiskImage) -> DiskImage:
        """Make a full image of a disk of set s2."""
        repository = open_repository(str(library.path))
        catalog = read_catalog(repository, NAME)
        images = catalog.chain(catalog.find("s2"), image.name)
        images[0] = (images[0][0], image)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with open_chain(layers(repository, images)) as chain:
                return asyncio.run(consolidate._copy_full(repository, images, chain, str(new), fd))
        finally:
            os.close(fd)

    def test_old_and_new_image_of_one_size_are_told_apart(self, library: Library, directory: Path) -> None:
        repository = open_repository(str(library.path))
        manifest = repository.records(NAME).published("s2")
        assert manifest
        [path, new] = [library.images(NAME, "s2")["drive0"], directory / "new"]
        size = self.make_full(library, new, manifest.disks[0]).bytes
        new.unlink()
        full = self.make_full(library, new, replace(manifest.disks[0], bytes=size))
        assert full.bytes == new.stat().st_size == size + 65536
        assert full.sha256 == hashlib.sha256(new.read_bytes()).hexdigest()
        assert sound(new)
        assert identical(path, new)

    def test_what_has_changed_is_not_made_good_by_it(self, library: Library) -> None:
        image = library.images(NAME, "s2")["drive1"]
        with image.open("r+b") as file:
            file.seek(image.stat().st_size - 1000)
            file.write(b"!")
        said = library.fail_prune(keep_last=3, consolidate=True)
        assert "set s3 was not consolidated" in said["msg"]
        assert f"{image} is not what was written" in said["msg"]
        # One of its disks is good, and may have become full; what is below stays.
        assert library.listed() == ["s5", "s4", "s3", "s2", "s1"]
        assert said["removed"] == []
        assert fates(said)["s1"] == "set s2 builds on it"
        assert not any(one["consolidated"] for one in said["kept"])

    def test_what_can_go_makes_room_and_without_room_nothing_is_lost(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("tmpfs", 64 * MIB)
        library = chain.library.copy(mount.path / "repository")
        mount.fill(leave=MIB)
        said = library.fail_prune(keep_last=3, consolidate=True)
        assert "set s3 was not consolidated" in said["msg"]
        assert "free, of which sets that are being made take 0" in said["msg"]
        assert_whole(chain, library, "s5", "s4", "s3", "s2", "s1")
        # The first chain can go at once, and leaves enough room for the second.
        library.prune(keep_last=1, consolidate=True)
        assert_whole(chain, library, "s5")

    def test_read_sets_are_not_rewritten(self, library: Library, directory: Path) -> None:
        library.restore(id="s3", method="overlay", disks=[{"name": "drive0", "target": str(directory / "look")}])
        before = library.content()
        said = library.prune(keep_last=4, consolidate=True)
        assert not said["changed"]
        after = library.content()
        after.pop(str(library.path / NAME / ".prune.lock"))
        assert after == before


class TestMeanwhile:
    """What happens while an image is copied."""

    def test_two_at_once(
        self, chain: Chain, library: Library, directory: Path, start_module: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go = gate(directory, monkeypatch)
        arguments = {"repository": str(library.path), "keep_last": 4, "consolidate": True}
        first = start_module("backup_prune", arguments)
        wait_until(begun.exists, "the copy")
        second = start_module("backup_prune", {**arguments, "keep_last": 3})
        lock = library.path / NAME / ".prune.lock"
        wait_until(lambda: lock in second.open_files, "the second one")
        go.touch()
        assert set(fates(first.result(), "removed")) == {"s1"}
        assert set(fates(second.result(), "removed")) == {"s2"}
        assert_whole(chain, library, "s5", "s4", "s3")

    def test_marks_do_not_wait_for_it(
        self, chain: Chain, library: Library, directory: Path, start_module: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go = gate(directory, monkeypatch)
        process = start_module("backup_prune", {"repository": str(library.path), "keep_last": 4, "consolidate": True})
        wait_until(begun.exists, "the copy")
        monkeypatch.setattr(prune, "locked", functools.partial(host_lock.locked, timeout=0.1))
        assert library.prune(names=[NAME], protect=["s1"])["changed"]
        said = library.fail_prune(names=[NAME], protect=["s4"], keep_last=1)
        assert said["msg"].endswith("web01: VM web01 is being pruned by another process; run again later")
        go.touch()
        said = process.result()
        assert (said["removed"], fates(said)["s1"]) == ([], "it is protected")
        assert [one["id"] for one in library.info()["sets"] if one["protected"]] == ["s4", "s1"]
        library.prune(names=[NAME], unprotect=["s1", "s4"])
        assert_whole(chain, library, "s5", "s4", "s3", "s2", "s1")

    def test_a_set_that_turns_out_to_be_bad_meanwhile(
        self, chain: Chain, library: Library, directory: Path, start_module: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for set_id in ("s4", "s5"):
            shutil.rmtree(library.path / NAME / set_id)
        begun, go = gate(directory, monkeypatch)
        arguments = {"repository": str(library.path), "keep_last": 1, "consolidate": True}
        process = start_module("backup_prune", arguments)
        wait_until(begun.exists, "the copy")
        judge(library, "s3", "drive0: no good")
        go.touch()
        said = process.result()
        # The one before is the newest good set now, and it is an increment.
        assert said["removed"] == []
        assert fates(said)["s2"] == "last"
        (library.path / NAME / ".s3.verified.json").unlink()
        assert_whole(chain, library, "s3", "s2", "s1")

    def test_an_overlay_that_is_made_meanwhile(
        self, chain: Chain, library: Library, directory: Path, start_module: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go = gate(directory, monkeypatch)
        for set_id in ("s4", "s5"):
            shutil.rmtree(library.path / NAME / set_id)
        arguments = {"repository": str(library.path), "keep_last": 1, "consolidate": True}
        process = start_module("backup_prune", arguments)
        wait_until(begun.exists, "the copy")
        look = [{"name": "drive0", "target": str(directory / "look")}]
        library.restore(id="s2", method="overlay", disks=look)
        go.touch()
        said = process.result()
        assert said["removed"] == []
        assert "reads it" in fates(said)["s2"]
        assert fates(said)["s1"] == "set s2 builds on it"
        chain.assert_restored("s2", {"drive0": directory / "look"})

    @pytest.mark.parametrize("read", ["s2", "s3"])
    def test_a_set_that_is_read_meanwhile_is_not_rewritten(
        self,
        chain: Chain,
        library: Library,
        directory: Path,
        start_module: Start,
        monkeypatch: pytest.MonkeyPatch,
        read: str,
    ) -> None:
        begun, go = gate(directory, monkeypatch)
        images = library.images(NAME, "s2")
        before = {disk: image.stat().st_ino for disk, image in images.items()}
        process = start_module("backup_prune", {"repository": str(library.path), "keep_last": 4, "consolidate": True})
        wait_until(begun.exists, "the copy")
        look = directory / "look"
        library.restore(id=read, method="overlay", disks=[{"name": "drive1", "target": str(look)}])
        go.touch()
        said = process.result()
        assert f"set s2 was not consolidated: {look} on " in said["msg"]
        assert "reads it" in said["msg"]
        assert said["removed"] == []
        assert {disk: image.stat().st_ino for disk, image in images.items()} == before
        assert library.listed() == ["s5", "s4", "s3", "s2", "s1"]
        chain.assert_restored(read, {"drive1": look})

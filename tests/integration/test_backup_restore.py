# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore: what comes back is what there was, and nothing else is touched."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import typing as t
import uuid
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils import _lock, _qemu_img, _repository
from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, info, qemu_img, write
from ansible_collections.vmfleet.backup.tests.harness.library import (
    NAME,
    SIZE,
    Chain,
    Library,
    before_converting,
    prepared,
    restored_to,
)
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with prepared() as chain:
        yield chain


@pytest.fixture
def chain(template: Chain, directory: Path) -> Chain:
    """Three sets of a VM that is off."""
    return template.copied(directory)


@pytest.fixture
def living(vms: Vms, directory: Path) -> Chain:
    """Three sets of a VM that goes on."""
    return Chain(vms, directory)


@pytest.fixture
def where(directory: Path) -> Path:
    """An empty directory for what is restored."""
    path = directory / "restored"
    path.mkdir()
    return path


def one_disk(target: Path, disk: str = "drive0", **more: t.Any) -> list[dict[str, t.Any]]:
    return [{"name": disk, "target": str(target), **more}]


def pins(library: Library) -> list[dict[str, t.Any]]:
    return [json.loads(path.read_text()) for path in sorted((library.path / NAME).glob(".*.pin-*.json"))]


@contextlib.contextmanager
def lock_held(library: Library) -> t.Iterator[None]:
    """Be another process that has the VM's lock."""
    with (library.path / NAME / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unchanged(library: Library, **options: t.Any) -> None:
    """The same restore once more has nothing to do."""
    before = snapshot(library.path.parent)
    again = library.restore(**options)
    assert not again["changed"]
    assert not any(disk["changed"] for disk in again["restored"])
    assert snapshot(library.path.parent) == before


class TestContent:
    """All that a set holds, and from whatever chain."""

    @pytest.mark.parametrize("set_id", ["s1", "s2", "s3"])
    def test_cases_36_37_49_each_moment_comes_back(self, chain: Chain, where: Path, set_id: str) -> None:
        library = chain.library
        before = library.content()
        given: dict[str, t.Any] = {"directory": str(where), **({} if set_id == "s3" else {"id": set_id})}
        result = library.restore(**given)
        chain.assert_restored(set_id, restored_to(where))
        assert (result["changed"], result["id"], result["warnings"]) == (True, set_id, [])
        ids = [f"s{number}" for number in range(int(set_id[1]), 0, -1)]
        for disk in result["restored"]:
            path = where / f"{disk['disk']}.qcow2"
            assert disk == {
                "disk": disk["disk"],
                "target": str(path),
                "format": "qcow2",
                "method": "copy",
                "virtual_size": SIZE,
                "bytes": path.stat().st_blocks * 512,
                "chain": ids,
                "changed": True,
            }
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert "backing-filename" not in info(path)
        expected = {f"{disk}.qcow2{end}" for disk in ("drive0", "drive1") for end in ("", ".restored.json")}
        assert {path.name for path in where.iterdir()} == expected
        unchanged(library, **given)
        assert library.content() == before

    @pytest.mark.parametrize("fmt", ["qcow2", "raw"])
    def test_case_37_zeroes_come_back_as_zeroes(self, chain: Chain, where: Path, fmt: str) -> None:
        target = where / "disk"
        chain.library.restore(disks=one_disk(target, format=fmt))
        chain.assert_restored("s3", {"drive0": target}, fmt)
        for number in (2, 3):
            write(target, f"read -P 0 {number << 19} 128k", fmt=fmt)

    @pytest.mark.parametrize("compression", ["zstd", "zlib"])
    def test_case_53_compressed_chain(self, vms: Vms, directory: Path, where: Path, compression: str) -> None:
        chain = Chain(vms, directory, compression=compression)
        assert chain.library.manifest(NAME, "s2")["disks"][0]["compression"] == compression
        chain.assert_all_restore(chain.library, where)

    def test_case_47_copied_without_times(self, chain: Chain, directory: Path, where: Path) -> None:
        moved = directory / "elsewhere" / "copy"
        shutil.copytree(chain.library.path, moved, copy_function=shutil.copyfile)
        shutil.rmtree(chain.library.path)
        chain.assert_all_restore(Library(moved), where)

    def test_sparse_stays_sparse(self, chain: Chain, directory: Path) -> None:
        library = chain.library
        raw, image = directory / "disk.raw", directory / "disk.qcow2"
        library.restore(disks=[*one_disk(raw, format="raw"), *one_disk(image, "drive1")])
        chain.assert_restored("s3", {"drive0": raw}, "raw")
        assert raw.stat().st_size == SIZE
        # Half of the disk was never written to.
        for path in (raw, image):
            assert path.stat().st_blocks * 512 <= SIZE // 2 + MIB

    @pytest.mark.parametrize("fmt", ["qcow2", "raw"])
    def test_a_disk_of_an_odd_size(self, vms: Vms, directory: Path, where: Path, fmt: str) -> None:
        vm = vms.start(vms.disk(0, size=SIZE + 512), name=NAME)
        library = Library(directory / "repository")
        history = History(vm, library, directory)
        vm.write("drive0", 0xEE, SIZE, 512)
        history.back_up("s1")
        library.restore(disks=one_disk(where / "d", format=fmt))
        assert identical(history.copies("s1")["drive0"], where / "d", other_format=fmt)
        assert info(where / "d")["virtual-size"] == SIZE + 512

    def test_case_50_a_chain_of_more_than_ten(self, vms: Vms, directory: Path, where: Path) -> None:
        chain = Chain(vms, directory, sets=1)
        for number in range(2, 13):
            chain.vm.write("drive0", number, 0, 65536 - 512 * number)
            chain.back_up(f"s{number}")
        for set_id in ("s12", "s11", "s9", "s2"):
            chain.library.restore(id=set_id, disks=one_disk(where / set_id))
            chain.assert_restored(set_id, {"drive0": where / set_id})

    def test_newest_before_a_time(self, chain: Chain, where: Path) -> None:
        library = chain.library
        for set_id, started in (("s1", "2026-11-20"), ("s2", "2026-11-21"), ("s3", "2026-11-22")):
            library.rewrite(set_id, started=f"{started}T01:30:00Z")
        for before, expected in (
            ("2026-11-21T01:29:59Z", "s1"),
            ("2026-11-21T01:30:00Z", "s2"),
            ("2026-11-22T02:30:00+01:00", "s3"),
            ("2026-11-22", "s2"),
        ):
            target = where / expected / before
            target.parent.mkdir(exist_ok=True)
            assert library.restore(before=before, disks=one_disk(target))["id"] == expected
            chain.assert_restored(expected, {"drive0": target})
        assert library.fail_restore(before="2026-11-20", disks=one_disk(where / "x")).startswith(
            "before: VM web01 has no set from before 2026-11-20T00:00:00+00:00; it has: s1, s2, s3"
        )


class TestBrokenChains:
    """What is wrong with a chain is found and named before anything is written."""

    def refused(self, library: Library, where: Path, *words: str, **options: t.Any) -> None:
        said = library.fail_restore(directory=str(where), **options)
        for word in words:
            assert word in said
        assert list(where.iterdir()) == []
        assert pins(library) == []

    def test_case_46_missing_link(self, chain: Chain, where: Path) -> None:
        library = chain.library
        image = library.images(NAME, "s2")["drive0"]
        image.rename(image.with_name("away"))
        self.refused(library, where, "set s3, disk drive0", f"image {image} is missing")
        # The other disk has all that it needs.
        library.restore(disks=one_disk(where / "d", "drive1"))

    def test_case_46_renamed_set(self, chain: Chain, where: Path) -> None:
        library = chain.library
        (library.path / NAME / "s2").rename(library.path / NAME / "before-lunch")
        self.refused(library, where, "set s3, disk drive", "set s2, which s3 builds on, is gone")
        self.refused(library, where, "id: VM web01 has no set s2; it has: s1, s3", id="s2")

    @pytest.mark.parametrize("set_id", ["s1", "s2", "s3"])
    def test_case_48_a_flipped_byte(self, chain: Chain, where: Path, set_id: str) -> None:
        image = chain.library.images(NAME, set_id)["drive1"]
        with image.open("r+b") as file:
            file.seek(image.stat().st_size - 1000)
            [byte] = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        self.refused(chain.library, where, f"set {set_id}, disk drive1", f"{image} is not what was written", "SHA-256")

    def test_a_truncated_image_is_found_by_its_size(self, chain: Chain, where: Path) -> None:
        image = chain.library.images(NAME, "s1")["drive0"]
        os.truncate(image, image.stat().st_size - 1)
        self.refused(chain.library, where, f"image {image} is not the file that its manifest describes", checksum=False)

    def test_a_swapped_image(self, chain: Chain, where: Path) -> None:
        one, other = chain.library.images(NAME, "s1").values()
        shutil.move(one, where / "x")
        shutil.move(other, one)
        shutil.move(where / "x", other)
        self.refused(chain.library, where, "is not what was written")

    def test_no_repository_and_no_vm(self, chain: Chain, where: Path, directory: Path) -> None:
        assert "is not a repository" in Library(directory / "nosuch").fail_restore(directory=str(where))
        assert chain.library.fail_restore(vm="nosuch", directory=str(where)) == (
            "vm: VM nosuch has no set; the repository knows of: web01"
        )


class TestOptions:
    """What is asked for wrongly is refused under the option's name."""

    @pytest.mark.parametrize(
        ("option", "options"),
        [
            ("id", {"id": "s9", "disks": one_disk("T")}),  # type: ignore[arg-type]
            ("before", {"before": "yesterday", "disks": one_disk("T")}),  # type: ignore[arg-type]
            ("disks", {"disks": [{"name": "vda", "target": "T"}]}),
            ("target", {"disks": [{"name": "drive0", "target": "relative"}]}),
            ("target", {"disks": [{"name": "drive0", "target": "T"}, {"name": "drive1", "target": "T/../T"}]}),
            ("target", {"disks": [{"name": "drive0", "target": "T"}, {"name": "drive1", "target": "T.partial"}]}),
            ("target", {"disks": [{"name": "drive0", "target": "nosuch/T"}]}),
            ("target", {"disks": [{"name": "drive0", "target": "."}]}),
            ("target", {"disks": [{"name": "drive0", "target": "../repository/web01/s1/drive0.qcow2"}]}),
            ("target", {"directory": "../repository/web01"}),
            ("target", {"directory": "nosuch"}),
            ("directory", {"directory": "relative"}),
            ("repository", {"repository": "relative", "disks": one_disk("T")}),  # type: ignore[arg-type]
            ("format", {"method": "overlay", "disks": [{"name": "drive0", "target": "T", "format": "raw"}]}),
        ],
    )
    def test_refused_by_name(self, chain: Chain, where: Path, option: str, options: dict[str, t.Any]) -> None:
        def placed(path: str) -> str:
            return (
                path if path == "relative" else os.path.normpath(where / path) if path != "T/../T" else f"{where}/./T"
            )

        if "directory" in options:
            options = {**options, "directory": placed(options["directory"])}
        if "disks" in options:
            options = {
                **options,
                "disks": [{**disk, "target": placed(disk["target"])} for disk in options["disks"]],
            }
        before = chain.library.content()
        said = chain.library.fail_restore(overwrite=True, **options)
        assert said.startswith(f"{option}: "), said
        assert list(where.iterdir()) == []
        assert chain.library.content() == before

    def test_check_mode_writes_nothing(self, chain: Chain, where: Path) -> None:
        library = chain.library
        before = snapshot(library.path.parent)
        said = library.restore(check=True, directory=str(where))
        assert said["changed"]
        assert [disk["changed"] for disk in said["restored"]] == [True, True]
        assert said["diff"] == {
            "before": "",
            "after": "".join(f"{path}: {disk} of set s3\n" for disk, path in restored_to(where).items()),
        }
        (where / "taken").touch()
        assert "exists" in library.fail_restore(check=True, disks=one_disk(where / "taken"))
        (where / "taken").unlink()
        assert {path: state[-1] for path, state in snapshot(library.path.parent).items()} == {
            path: state[-1] for path, state in before.items()
        }


class TestTargets:
    """Files that exist, are in use, or have no room."""

    def test_a_target_that_was_touched_is_refused_and_overwritten(self, chain: Chain, where: Path) -> None:
        library = chain.library
        target = where / "d.qcow2"
        library.restore(disks=one_disk(target))
        write(target, "write -P 1 0 512")
        before = snapshot(where)
        assert library.fail_restore(disks=one_disk(target)) == (
            f"target: {target} exists, and is not this restore; with overwrite: true it is replaced"
        )
        # Another set, another format.
        assert "exists" in library.fail_restore(id="s1", disks=one_disk(target))
        assert "exists" in library.fail_restore(disks=one_disk(target, format="raw"))
        assert snapshot(where) == before
        assert library.restore(disks=one_disk(target), overwrite=True)["changed"]
        chain.assert_restored("s3", {"drive0": target})
        unchanged(library, disks=one_disk(target), overwrite=True)

    def test_a_set_that_was_made_again_is_another(self, chain: Chain, where: Path) -> None:
        library = chain.library
        library.restore(disks=one_disk(where / "d"))
        library.rewrite("s3", attempt="another")
        assert "exists" in library.fail_restore(disks=one_disk(where / "d"))

    @pytest.mark.parametrize("content", [b"QFI\xfb" + bytes(100), b"", b"junk"])
    def test_what_is_overwritten_may_be_anything(self, chain: Chain, directory: Path, content: bytes) -> None:
        target = directory / "blocks" / "clock.qcow2"
        target.parent.mkdir()
        target.write_bytes(content)
        chain.library.restore(disks=one_disk(target), overwrite=True)
        chain.assert_restored("s3", {"drive0": target})

    def test_a_link_is_replaced_and_what_it_leads_to_stays(self, chain: Chain, where: Path) -> None:
        (where / "precious").write_text("precious")
        (where / "link").symlink_to("precious")
        chain.library.restore(disks=one_disk(where / "link"), overwrite=True)
        assert (where / "precious").read_text() == "precious"
        assert not (where / "link").is_symlink()
        chain.assert_restored("s3", {"drive0": where / "link"})

    @pytest.mark.parametrize("fmt", ["qcow2", "raw"])
    @pytest.mark.parametrize("read_only", [False, True])
    def test_a_disk_of_a_running_vm_is_refused(
        self, chain: Chain, vms: Vms, where: Path, fmt: str, read_only: bool
    ) -> None:
        path = create(where / "d", SIZE, fmt)
        vms.start(Disk(path, "other", "another", format=fmt, read_only=read_only))
        said = chain.library.fail_restore(disks=one_disk(path), overwrite=True)
        assert said == f"target: {path} is in use by a running VM; see `fuser {path}`"

    def test_a_vm_that_has_started_from_the_target_meanwhile(
        self, chain: Chain, vms: Vms, where: Path, start_module: t.Callable[..., ModuleProcess], monkeypatch: t.Any
    ) -> None:
        target = create(where / "d", SIZE)
        before_converting(
            where.parent, monkeypatch, f"touch {where}/begun; while [ ! -e {where}/go ]; do sleep 0.01; done"
        )
        module = start_module("backup_restore", chain.library.restoration(disks=one_disk(target), overwrite=True))
        wait_until((where / "begun").exists, "the copy")
        vms.start(Disk(target, "other", "another"))
        (where / "go").touch()
        assert "is in use by a running VM" in module.result()["msg"]
        assert not (where / "d.partial").exists()
        assert pins(chain.library) == []

    def test_something_that_appears_meanwhile_stays(
        self, chain: Chain, where: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before_converting(where.parent, monkeypatch, f"echo precious > {where}/d")
        assert "something has appeared there in between" in chain.library.fail_restore(disks=one_disk(where / "d"))
        assert (where / "d").read_text() == "precious\n"
        assert [path.name for path in where.iterdir()] == ["d"]

    def test_two_at_once_to_one_target(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before_converting(
            where.parent, monkeypatch, f"touch {where}/begun; while [ ! -e {where}/go ]; do sleep 0.01; done"
        )
        first = start_module("backup_restore", chain.library.restoration(disks=one_disk(where / "d")))
        wait_until((where / "begun").exists, "the copy")
        said = chain.library.fail_restore(id="s1", disks=one_disk(where / "d"))
        assert f"target {where}/d: another backup process has held" in said
        (where / "go").touch()
        assert first.result()["changed"]
        chain.assert_restored("s3", {"drive0": where / "d"})

    def test_somebody_elses_file_under_the_unfinished_name_stays(self, chain: Chain, vms: Vms, where: Path) -> None:
        # A backup that runs to that very name, or a restore on another machine.
        partial = create(where / "d.partial", SIZE)
        vm = vms.start(Disk(partial, "other", "another"))
        inode = partial.stat().st_ino
        given: dict[str, t.Any] = {"disks": one_disk(where / "d")}
        for options in (given, {**given, "state": "absent", "method": "overlay"}):
            assert f"target: {partial} is in use by" in chain.library.fail_restore(**options)
        assert partial.stat().st_ino == inode
        assert [path.name for path in where.iterdir()] == ["d.partial"]
        # One that nobody has open was left by a process that was killed.
        vm.quit()
        chain.library.restore(**given)
        chain.assert_restored("s3", {"drive0": where / "d"})
        # What is done already is no reason to refuse.
        vm = vms.start(Disk(create(partial, SIZE), "other", "third"))
        assert not chain.library.restore(**given)["changed"]
        assert partial.exists()
        vm.quit()

    @pytest.mark.parametrize("method", ["copy", "overlay"])
    def test_an_unfinished_file_that_is_another_by_now_gets_no_name(
        self, chain: Chain, where: Path, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        before_converting(where.parent, monkeypatch, "")
        shim = where.parent / "bin" / "qemu-img"
        steal = f"mv {where}/d.partial {where}/mine; touch {where}/d.partial;"
        shim.write_text(shim.read_text().replace("= convert ] && {", f'= convert -o "$1" = create ] && {{ {steal}'))
        said = chain.library.fail_restore(method=method, disks=one_disk(where / "d"))
        assert f"{where}/d.partial is another file by now" in said
        # It is another one's to remove.
        assert sorted(path.name for path in where.iterdir()) == ["d.partial", "mine"]
        assert pins(chain.library) == []

    def test_no_room_is_found_before(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("tmpfs", 4 * MIB)
        mount.fill(leave=2 * MIB)
        said = chain.library.fail_restore(disks=one_disk(mount.path / "d"))
        assert said.startswith(f"target: {mount.path} has 2")
        assert "the disks that go there take" in said
        # Each alone would fit.
        mount.clear()
        mount.grow(7 * MIB)
        assert "the disks that go there" in chain.library.fail_restore(directory=str(mount.path))
        assert list(mount.path.iterdir()) == []

    def test_a_chain_that_cannot_be_measured_in_time_is_restored(
        self, chain: Chain, storage: Storage, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before_converting(directory, monkeypatch, "")
        shim = directory / "bin" / "qemu-img"
        shim.write_text(shim.read_text().replace("= convert ] && {", "= measure ] && { exec sleep 60;"))
        monkeypatch.setattr(_qemu_img, "MEASURE_TIMEOUT", 0.1)
        chain.library.restore(disks=one_disk(directory / "d"))
        chain.assert_restored("s3", {"drive0": directory / "d"})
        # What its images take is what has to be there.
        mount = storage.mount("tmpfs", 4 * MIB)
        said = chain.library.fail_restore(disks=one_disk(mount.path / "d"))
        assert "the disks that go there take" in said

    def test_holes_need_no_room(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("tmpfs", 6 * MIB)
        chain.library.restore(disks=one_disk(mount.path / "d", format="raw"))
        chain.assert_restored("s3", {"drive0": mount.path / "d"}, "raw")

    @pytest.mark.parametrize("there", [False, True])
    def test_a_file_system_that_fills_up_meanwhile(
        self, chain: Chain, storage: Storage, directory: Path, monkeypatch: pytest.MonkeyPatch, there: bool
    ) -> None:
        mount = storage.mount("tmpfs", 12 * MIB)
        target = mount.path / "d"
        if there:
            chain.library.restore(id="s1", disks=one_disk(target))
        # Both disks want to go there, and for one of them there is room elsewhere.
        before_converting(
            directory,
            monkeypatch,
            f'case "$*" in *{mount.path}*) cat /dev/zero > {mount.path}/filler 2>/dev/null;; esac',
        )
        args = chain.library.restoration(
            disks=[*one_disk(target), *one_disk(directory / "e", "drive1")], overwrite=there
        )
        result = run_module("backup_restore", args)
        assert result["failed"]
        assert f"disk drive0 to {target}" in result["msg"]
        assert "No space left on device" in result["msg"]
        assert [disk["disk"] for disk in result["restored"]] == ["drive1"]
        chain.assert_restored("s3", {"drive1": directory / "e"})
        assert not (mount.path / "d.partial").exists()
        assert pins(chain.library) == []
        if there:
            # The old one stays until the new one is good.
            chain.assert_restored("s1", {"drive0": target})
            unchanged(chain.library, id="s1", disks=one_disk(target))
        else:
            assert not target.exists()


class TestBlockDevices:
    """Volumes, which have their size and are always there."""

    def content(self, chain: Chain, device: Path, directory: Path, set_id: str = "s3") -> bool:
        """Whether a device begins with what a disk held."""
        head = directory / "head.raw"
        with device.open("rb") as source:
            head.write_bytes(source.read(SIZE))
        return identical(chain.copies(set_id)["drive0"], head, other_format="raw")

    @pytest.mark.parametrize("more", [0, MIB])
    def test_all_of_the_disk_and_no_more_is_written(
        self, chain: Chain, storage: Storage, directory: Path, more: int
    ) -> None:
        device = storage.loop(SIZE + more)
        device.write_bytes(b"\xff" * (SIZE + more))
        said = chain.library.restore(disks=one_disk(device), overwrite=True)
        assert (said["restored"][0]["format"], said["restored"][0]["bytes"]) == ("raw", SIZE)
        assert self.content(chain, device, directory)
        with device.open("rb") as source:
            source.seek(SIZE)
            assert source.read() == b"\xff" * more
        assert pins(chain.library) == []
        # Nobody can tell what is there by now.
        assert chain.library.restore(id="s1", disks=one_disk(device), overwrite=True)["changed"]
        assert self.content(chain, device, directory, "s1")

    def test_refused(self, chain: Chain, storage: Storage, vms: Vms) -> None:
        small, right = storage.loop(SIZE - MIB, "small.img"), storage.loop(SIZE, "right.img")
        library = chain.library
        assert "overwrite: true says that its content may go" in library.fail_restore(disks=one_disk(right))
        assert library.fail_restore(disks=one_disk(small), overwrite=True) == (
            f"target: {small} has {SIZE - MIB} bytes, and disk drive0 needs {SIZE}"
        )
        for options in ({"disks": one_disk(right, format="qcow2")}, {"method": "overlay", "disks": one_disk(right)}):
            said = library.fail_restore(overwrite=True, **options)
            assert said.startswith(("target: ", "format: "))
        file = {"driver": "host_device", "filename": str(right)}
        vms.start(Disk(right, "other", "another", format="raw", file=file))
        assert "is in use by a running VM" in library.fail_restore(disks=one_disk(right), overwrite=True)
        assert right.read_bytes() == bytes(SIZE)

    def test_a_mounted_device_is_refused(self, chain: Chain, storage: Storage) -> None:
        mount = storage.mount("ext4", 16 * MIB)
        said = chain.library.fail_restore(disks=one_disk(mount.source), overwrite=True)  # type: ignore[arg-type]
        assert said == f"target: {mount.source} is in use: Device or resource busy"

    def test_a_read_only_device_is_refused(self, chain: Chain, storage: Storage) -> None:
        device = storage.loop(SIZE)
        subprocess.run(["blockdev", "--setro", device], check=True)
        try:
            assert "is not writable" in chain.library.fail_restore(disks=one_disk(device), overwrite=True)
        finally:
            subprocess.run(["blockdev", "--setrw", device], check=True)
        assert pins(chain.library) == []

    def test_its_set_is_kept_while_it_is_read(
        self,
        chain: Chain,
        storage: Storage,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        start_module: t.Callable[..., ModuleProcess],
    ) -> None:
        library, device = chain.library, storage.loop(SIZE)
        begun, go = directory / "begun", directory / "go"
        before_converting(directory, monkeypatch, f"touch {begun}; while [ ! -e {go} ]; do sleep 0.01; done")
        given: dict[str, t.Any] = {"id": "s2", "disks": one_disk(device), "overwrite": True}
        module = start_module("backup_restore", library.restoration(**given))
        wait_until(begun.exists, "the copy")
        library.rewrite("s3", disks=[])
        said = library.prune(keep_last=1)
        assert [one["reason"] for one in said["kept"] if one["id"] == "s2"] == [
            f"{device} on {os.uname().nodename} reads it"
        ]
        # One that is killed leaves its pin, as the device is there still.
        module.kill()
        go.touch()
        library.prune(keep_last=1)
        assert [pin["path"] for pin in pins(library)] == [str(device)]
        absent: dict[str, t.Any] = {"state": "absent", "disks": one_disk(device)}
        before = device.read_bytes()
        said = library.restore(**absent)
        assert (said["removed"], said["independent"], pins(library)) == ([], [str(device)], [])
        assert not library.restore(**absent)["changed"]
        assert (device.is_block_device(), device.read_bytes()) == (True, before)
        # A restore to it takes it away as well.
        library.restore(**given)
        assert pins(library) == []
        assert self.content(chain, device, directory, "s2")

    def test_one_that_is_in_use_by_now_is_not_written_to(
        self, chain: Chain, storage: Storage, vms: Vms, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        device = storage.loop(SIZE)
        lock = chain.library.path / NAME / ".lock"
        with lock_held(chain.library):
            module = start_module(
                "backup_restore",
                chain.library.restoration(checksum=False, disks=one_disk(device), overwrite=True),
            )
            # What it has inherited is closed before its event loop begins.
            wait_until(lambda: {lock, Path("anon_inode:[eventpoll]")} <= module.open_files, "the restore")
            file = {"driver": "host_device", "filename": str(device)}
            vms.start(Disk(device, "other", "another", format="raw", file=file))
        assert f"{device} is in use by a running VM" in module.result()["msg"]
        assert device.read_bytes() == bytes(SIZE)
        assert pins(chain.library) == []

    def test_by_a_link(self, chain: Chain, storage: Storage, directory: Path) -> None:
        link = directory / "volume"
        link.symlink_to(storage.loop(SIZE))
        chain.library.restore(disks=one_disk(link), overwrite=True)
        assert link.is_symlink()
        assert self.content(chain, link, directory)


class TestReadOnly:
    """A repository that can only be read."""

    def test_restored_with_a_warning(self, chain: Chain, storage: Storage, where: Path) -> None:
        mount = storage.mount("tmpfs", 64 * MIB)
        library = chain.library.copy(mount.path / "repository")
        mount.make_read_only()
        said = library.restore(directory=str(where))
        chain.assert_restored("s3", restored_to(where))
        assert len(said["warnings"]) == 2
        assert f"cannot be written to ({mount.path}/" in said["warnings"][0]
        assert "Read-only file system)" in said["warnings"][0]
        assert "do not prune it while" in said["warnings"][0]
        unchanged(library, directory=str(where))
        overlay: dict[str, t.Any] = {"method": "overlay", "disks": one_disk(where / "look")}
        for changed in (True, False):
            # Every time, as long as nobody else knows.
            said = library.restore(**overlay)
            assert said["changed"] == changed
            assert len(said["warnings"]) == 1
        chain.assert_restored("s3", {"drive0": where / "look"})
        assert library.restore(**overlay, state="absent")["removed"] == [str(where / "look")]


class TestLocked:
    """A VM's lock that stays held: a restore only reads."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_repository, "locked", functools.partial(_lock.locked, timeout=0.1))

    @pytest.mark.parametrize("method", ["copy", "overlay"])
    def test_restored_with_a_warning(self, chain: Chain, where: Path, method: str) -> None:
        library = chain.library
        given: dict[str, t.Any] = {"method": method, "directory": str(where)}
        with lock_held(library):
            said = library.restore(**given)
        assert said["changed"]
        assert len(said["warnings"]) == 2
        assert f"another backup process has held {library.path}/{NAME}/.lock for more than" in said["warnings"][0]
        assert "do not prune it while" in said["warnings"][0]
        chain.assert_restored("s3", restored_to(where))
        assert pins(library) == []
        # The overlays' pins come as soon as that can be.
        said = library.restore(**given)
        assert (said["changed"], said["warnings"]) == (False, [])
        assert len(pins(library)) == (2 if method == "overlay" else 0)

    @pytest.mark.parametrize("good", [False, True])
    def test_a_pin_that_cannot_be_taken_back(
        self,
        chain: Chain,
        where: Path,
        monkeypatch: pytest.MonkeyPatch,
        start_module: t.Callable[..., ModuleProcess],
        good: bool,
    ) -> None:
        library = chain.library
        end = "" if good else "echo This one >&2; exit 1"
        wait = f"touch {where}/begun; while [ ! -e {where}/go ]; do sleep 0.01; done;"
        before_converting(where.parent, monkeypatch, wait + end)
        module = start_module("backup_restore", library.restoration(disks=one_disk(where / "d")))
        wait_until((where / "begun").exists, "the copy")
        with lock_held(library):
            (where / "go").touch()
            said = module.result()
        assert len(pins(library)) == 1
        if good:
            chain.assert_restored("s3", {"drive0": where / "d"})
            assert "set s3 still counts as in use" in said["warnings"][0]
            library.restore(disks=one_disk(where / "d"))
            assert pins(library) == []
        else:
            assert said["msg"].endswith("This one")
            assert not (where / "d.partial").exists()


class TestOverlays:
    """Images that can be used at once, and sets that stay as long as they are."""

    def test_one_is_there_at_once_and_pins_its_set(self, chain: Chain, vms: Vms, where: Path) -> None:
        library = chain.library
        before = library.content()
        given: dict[str, t.Any] = {"id": "s2", "method": "overlay", "directory": str(where)}
        said = library.restore(**given)
        assert [disk["method"] for disk in said["restored"]] == ["overlay", "overlay"]
        chain.assert_restored("s2", restored_to(where))
        path = where / "drive0.qcow2"
        assert info(path)["backing-filename"] == str(library.images(NAME, "s2")["drive0"])
        assert sorted((pin["id"], pin["disk"], pin["path"], pin["host"]) for pin in pins(library)) == [
            ("s2", disk, str(path), os.uname().nodename) for disk, path in restored_to(where).items()
        ]
        unchanged(library, **given)
        # Somebody boots from it, and it is written to.
        look = vms.start(Disk(path, "look", "looked-at"))
        look.write("look", 0xEE, 0, MIB)
        assert "in use by a running VM" in library.fail_restore(**given, state="absent")
        look.quit()
        assert not library.restore(**given)["changed"]
        assert {name: state for name, state in library.content().items() if ".pin-" not in name} == before
        assert not identical(chain.copies("s2")["drive0"], path)
        # It is made independent as the documentation says.
        qemu_img("rebase", "-b", "", path)
        assert "backing-filename" not in info(path)

    def test_prune_keeps_what_is_read_until_it_is_gone(self, living: Chain, where: Path) -> None:
        library = living.library
        living.go_on(4, level="full")
        library.restore(id="s2", method="overlay", directory=str(where))
        said = library.prune(keep_last=1, consolidate=True)
        assert {one["id"]: one["reason"] for one in said["kept"]} == {
            "s4": "last",
            "s2": f"{where}/drive1.qcow2 on {os.uname().nodename} reads it",
            "s1": "set s2 builds on it",
        } or "reads it" in next(one["reason"] for one in said["kept"] if one["id"] == "s2")
        assert library.listed() == ["s4", "s2", "s1"]
        living.assert_restored("s2", restored_to(where))
        # One of them goes in order, the other one vanishes.
        said = library.restore(state="absent", disks=one_disk(where / "drive0.qcow2"))
        assert said["removed"] == [str(where / "drive0.qcow2")]
        assert [pin["disk"] for pin in pins(library)] == ["drive1"]
        (where / "drive1.qcow2").unlink()
        library.prune(keep_last=1)
        assert library.listed() == ["s4"]
        assert pins(library) == []

    def test_pins_of_other_machines_stay(self, living: Chain, where: Path) -> None:
        library = living.library
        library.restore(id="s1", method="overlay", disks=one_disk(where / "look"))
        [path] = (library.path / NAME).glob(".*.pin-*.json")
        pin = json.loads(path.read_text())
        path.write_text(json.dumps({**pin, "machine_id": "another", "host": "hv9"}))
        (where / "look").unlink()
        living.go_on(4, level="full")
        said = library.prune(keep_last=1)
        assert library.listed() == ["s4", "s1"]
        assert said["kept"][0]["reason"] == f"{where}/look on hv9 reads it"
        # Not ours to take.
        assert not library.restore(state="absent", disks=one_disk(where / "nosuch"))["changed"]
        assert len(pins(library)) == 1

    def test_absent_keeps_what_has_become_independent(self, living: Chain, where: Path) -> None:
        library = living.library
        look = where / "look"
        library.restore(id="s1", method="overlay", disks=one_disk(look))
        qemu_img("rebase", "-f", "qcow2", "-b", "", look)
        given: dict[str, t.Any] = {"state": "absent", "disks": one_disk(look)}
        for check in (True, False):
            said = library.restore(check=check, **given)
            assert (said["removed"], said["independent"]) == ([], [str(look)])
        assert pins(library) == []
        assert [path.name for path in where.iterdir()] == ["look"]
        assert identical(look, library.images(NAME, "s1")["drive0"])

    def test_absent_finds_them_whatever_sets_there_are_now(self, living: Chain, where: Path) -> None:
        library = living.library
        library.restore(id="s1", method="overlay", directory=str(where))
        copy = where / "copy.qcow2"
        library.restore(disks=one_disk(copy))
        # The newest set has one disk only, by now.
        living.back_up("s4", "drive1", vms=[{"monitor": str(living.vm.monitor), "include_disks": ["drive1"]}])
        given: dict[str, t.Any] = {"method": "overlay", "state": "absent", "directory": str(where)}
        expected = sorted(str(path) for path in restored_to(where).values())
        assert library.restore(check=True, **given)["removed"] == expected
        assert library.restore(**given)["removed"] == expected
        assert {path.name for path in where.iterdir()} == {"copy.qcow2", "copy.qcow2.restored.json"}
        assert pins(library) == []
        assert not library.restore(**given)["changed"]
        assert library.fail_restore(state="absent", disks=one_disk(copy)).startswith(f"target: {copy} is no overlay")

    def test_absent_leaves_what_is_another_vms(self, chain: Chain, where: Path, directory: Path) -> None:
        library = chain.library
        look = where / "look"
        library.restore(method="overlay", disks=one_disk(look))
        (library.path / "web02").mkdir()
        given: dict[str, t.Any] = {"state": "absent", "disks": one_disk(look)}
        assert library.fail_restore(vm="web02", **given) == (
            f"target: {look} is disk drive0 of VM web01, and not of VM web02"
        )
        # The same VM in another repository.
        other = library.copy(directory / "other")
        marker = other.path / "vmfleet.json"
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "uuid": str(uuid.uuid4())}))
        assert "is disk drive0 of VM web01 from another repository" in other.fail_restore(**given)
        chain.assert_restored("s3", {"drive0": look})
        assert len(pins(library)) == 1

    def test_one_that_is_replaced_pins_no_more(self, chain: Chain, where: Path) -> None:
        library = chain.library
        look: dict[str, t.Any] = {"method": "overlay", "disks": one_disk(where / "look"), "overwrite": True}
        library.restore(id="s1", **look)
        library.restore(id="s3", **look)
        assert [pin["id"] for pin in pins(library)] == ["s3"]
        chain.assert_restored("s3", {"drive0": where / "look"})
        library.restore(id="s3", disks=one_disk(where / "look"), overwrite=True)
        assert pins(library) == []
        chain.assert_restored("s3", {"drive0": where / "look"})

    def test_one_that_came_without_a_pin_gets_it(self, chain: Chain, where: Path) -> None:
        library = chain.library
        look: dict[str, t.Any] = {"method": "overlay", "disks": one_disk(where / "look")}
        library.restore(**look)
        for path in (library.path / NAME).glob(".*.pin-*.json"):
            path.unlink()
        assert not library.restore(**look)["changed"]
        assert len(pins(library)) == 1

    @pytest.mark.parametrize("method", ["overlay", "copy"])
    @pytest.mark.parametrize("gone", ["s2", "s1"])
    def test_a_set_that_goes_before_the_pin(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], method: str, gone: str
    ) -> None:
        library = chain.library
        given: dict[str, t.Any] = {"id": "s2", "method": method, "checksum": False, "disks": one_disk(where / "d")}
        with lock_held(library):
            module = start_module("backup_restore", library.restoration(**given))
            wait_until((where / "d.partial").exists, "the restore")
            # As a prune does that has looked at the pins before.
            (library.path / NAME / gone).rename(library.path / NAME / f".{gone}.removed")
        expected = "set s2 was removed meanwhile" if gone == "s2" else "set s1, which s2 builds on, is gone"
        assert expected in module.result()["msg"]
        assert list(where.iterdir()) == []
        assert pins(library) == []

    def test_a_set_that_is_made_anew_before_the_pin(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        library = chain.library
        given: dict[str, t.Any] = {"method": "overlay", "checksum": False, "disks": one_disk(where / "d")}
        with lock_held(library):
            module = start_module("backup_restore", library.restoration(**given))
            wait_until((where / "d.partial").exists, "the restore")
            library.rewrite("s3", attempt="another")
        assert "set s3 was removed meanwhile" in module.result()["msg"]
        assert list(where.iterdir()) == []

    def test_a_prune_between_the_pin_and_the_overlay(
        self, chain: Chain, where: Path, monkeypatch: pytest.MonkeyPatch, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        library = chain.library
        before_converting(where.parent, monkeypatch, "")
        shim = where.parent / "bin" / "qemu-img"
        shim.write_text(
            shim.read_text().replace(
                "= convert ] && { ",
                f"= create ] && {{ touch {where}/begun; while [ ! -e {where}/go ]; do sleep 0.01; done",
            )
        )
        module = start_module(
            "backup_restore", library.restoration(id="s2", method="overlay", disks=one_disk(where / "d"))
        )
        wait_until((where / "begun").exists, "the overlay")
        library.rewrite("s3", disks=[])
        library.prune(keep_last=1)
        assert library.listed() == ["s3", "s2", "s1"]
        (where / "go").touch()
        assert module.result()["changed"]
        assert len(pins(library)) == 1


# The steps are dealt out to so many tests, that these can run side by side.
HANDS = 2


def steps(hand: int, every: int = 1) -> t.Iterator[int]:
    """The steps of one hand: all of them, or in each run of the tests others, so that in time all are visited."""
    first = 1 + hand * every + random.randrange(every)
    print(f"killed at steps {first}, {first + HANDS * every}, ...")
    return itertools.count(first, HANDS * every)


class TestKilled:
    """At every step: no wrong file under the target's name, ever, and the next run needs no help."""

    def sweep(
        self,
        chain: Chain,
        where: Path,
        start: t.Callable[..., ModuleProcess],
        numbers: t.Iterator[int],
        old: str = "",
        **options: t.Any,
    ) -> None:
        library, target = chain.library, where / "d"
        options = {"disks": one_disk(target), **options}
        is_overlay = options.get("method") == "overlay"
        for step in numbers:
            shutil.rmtree(where)
            where.mkdir()
            if old:
                shutil.copyfile(chain.copies(old)["drive0"], target)
            process = start("backup_restore", library.restoration(**options), crash_at=step)
            process.wait()
            if target.exists():
                found = [name for name in ("s3", old) if name and identical(chain.copies(name)["drive0"], target)]
                assert found
            else:
                assert not old
            library.restore(**options)
            chain.assert_restored("s3", {"drive0": target})
            assert {path.name for path in where.iterdir()} == {"d", "d.restored.json"}
            assert [pin["path"] for pin in pins(library)] == ([str(target)] if is_overlay else [])
            assert not library.restore(**options)["changed"]
            if is_overlay:
                library.restore(**options, state="absent")
                assert (list(where.iterdir()), pins(library)) == ([], [])
            if not process.killed:
                assert step > 20
                return

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_a_copy(self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], hand: int) -> None:
        self.sweep(chain, where, start_module, steps(hand))

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_a_copy_over_another(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], hand: int
    ) -> None:
        self.sweep(chain, where, start_module, steps(hand, 3), old="s1", overwrite=True, checksum=False)

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_an_overlay(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], hand: int
    ) -> None:
        self.sweep(chain, where, start_module, steps(hand, 2), method="overlay", checksum=False)

    @pytest.mark.parametrize("hand", range(HANDS))
    def test_an_overlay_removed(
        self, chain: Chain, where: Path, start_module: t.Callable[..., ModuleProcess], hand: int
    ) -> None:
        library = chain.library
        look: dict[str, t.Any] = {"method": "overlay", "directory": str(where)}
        for step in steps(hand):
            library.restore(**look, checksum=False)
            process = start_module("backup_restore", library.restoration(**look, state="absent"), crash_at=step)
            process.wait()
            library.restore(**look, state="absent")
            assert (list(where.iterdir()), pins(library)) == ([], [])
            if not process.killed:
                return

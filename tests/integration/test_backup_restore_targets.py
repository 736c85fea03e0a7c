# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore: what else is where the image goes, or comes there meanwhile."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_chain
from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, write
from ansible_collections.vmfleet.backup.tests.harness.library import SIZE, Chain, before_converting, gate
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins, unchanged

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


class TestTargets:
    """Files that exist, are in use, or have no room."""

    def test_a_target_that_was_touched_is_refused_and_overwritten(self, chain: Chain, where: Path) -> None:
        library = chain.library
        target = where / "d.qcow2"
        library.restore(disks=one_disk(target))
        write(target, "write -P 1 0 512")
        before = snapshot(where)
        assert library.fail_restore(disks=one_disk(target)) == (
            f"target: {target} exists, and this restore has not written it; overwrite: true replaces it"
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
        begun, go = gate(where.parent, monkeypatch)
        module = start_module("backup_restore", chain.library.restoration(disks=one_disk(target), overwrite=True))
        wait_until(begun.exists, "the copy")
        vms.start(Disk(target, "other", "another"))
        go.touch()
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
        begun, go = gate(where.parent, monkeypatch)
        first = start_module("backup_restore", chain.library.restoration(disks=one_disk(where / "d")))
        wait_until(begun.exists, "the copy")
        said = chain.library.fail_restore(id="s1", disks=one_disk(where / "d"))
        assert f"target {where}/d: another backup process has held" in said
        go.touch()
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
        assert f"somebody has replaced {where}/d.partial" in said
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
        monkeypatch.setattr(image_chain, "MEASURE_TIMEOUT", 0.1)
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
            # The target, which is named by descriptor, is the last word.
            f'for target; do :; done; case $(readlink "$target") in {mount.path}/*)'
            f" cat /dev/zero > {mount.path}/filler 2>/dev/null;; esac",
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

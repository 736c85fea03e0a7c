# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore with overlays: images that can be used at once, and sets that stay as long as they are."""

from __future__ import annotations

import json
import os
import typing as t
import uuid
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Pin
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, before_converting, restored_to
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, wait_until
from ansible_collections.vmfleet.backup.tests.harness.restoring import lock_held, one_disk, pins, unchanged

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


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
        # As one looks that another machine has made: it has another name, too.
        [path] = (library.path / NAME).glob(".*.pin-*.json")
        pin = replace(Pin.parse(json.loads(path.read_text())), machine_id="another", host="hv9")
        write_annotation(open_repository(str(library.path)), NAME, pin)
        path.unlink()
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
        library.detach("s3")
        library.prune(keep_last=1)
        assert library.listed() == ["s3", "s2", "s1"]
        (where / "go").touch()
        assert module.result()["changed"]
        assert len(pins(library)) == 1

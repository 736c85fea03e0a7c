# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore: what is wrong with a chain or with the options is told before anything is written."""

from __future__ import annotations

import os
import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library, restored_to
from ansible_collections.vmfleet.backup.tests.harness.modules import fail
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("clean")


def flip(library: Library, set_id: str) -> Path:
    """Change one bit of an image of the second disk; return its path."""
    image = library.images(NAME, set_id)["drive1"]
    with image.open("r+b") as file:
        file.seek(image.stat().st_size - 1000)
        [byte] = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return image


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
        # It may be the newest one, for all that its name tells.
        self.refused(library, where, "id: VM web01: it is unknown which set is the newest", "/before-lunch/manifest")
        self.refused(library, where, "set s3, disk drive", "set s2, which s3 builds on, is gone", id="s3")
        self.refused(library, where, "id: VM web01 has no set s2; it has: s1, s3", id="s2")

    @pytest.mark.parametrize("set_id", ["s1", "s2", "s3"])
    def test_case_48_a_flipped_byte(self, chain: Chain, where: Path, set_id: str) -> None:
        image = flip(chain.library, set_id)
        # The other disk is good, and gets no name all the same.
        self.refused(chain.library, where, f"set {set_id}, disk drive1", f"{image} is not what was written", "SHA-256")
        self.refused(chain.library, where, f"{image} is not what was written", check=True)
        self.refused(chain.library, where, f"{image} is not what was written", method="overlay")

    def test_what_was_there_stays(self, chain: Chain, where: Path) -> None:
        library = chain.library
        library.restore(directory=str(where), id="s1")
        before = snapshot(where)
        flip(library, "s3")
        said = library.fail_restore(directory=str(where), overwrite=True)
        assert said.endswith(". Nothing was restored")
        assert said.count("is not what was written") == 1
        assert snapshot(where) == before
        assert pins(library) == []

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
            f"vm: nosuch has no set in {chain.library.path}; VMs there: web01"
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
            ("directory", {"directory": "../repository/web01"}),
            ("directory", {"directory": "nosuch"}),
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


def test_a_set_that_was_not_good_when_it_was_verified_last(chain: Chain, where: Path) -> None:
    flip(chain.library, "s2")
    wanted = {"repository": str(chain.library.path), "depth": "checksum"}
    assert "not what was written" in fail("backup_verify", wanted)["msg"]
    flip(chain.library, "s2")
    # It may be the machine that is not good.
    for set_id, is_told in (("s1", False), ("s3", True)):
        result = chain.library.restore(id=set_id, directory=str(where), overwrite=True)
        told = f"set {set_id} was not good when it was verified last, and may restore as damaged: "
        assert any(warning.startswith(told) for warning in result.get("warnings", ())) == is_told

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore: what comes back is what there was."""

from __future__ import annotations

import shutil
import stat
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.history import History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, info, write
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, SIZE, Chain, Library, restored_to
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, unchanged

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")


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

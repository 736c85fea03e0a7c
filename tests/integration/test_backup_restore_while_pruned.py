# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore of a set that a prune would rewrite or remove while its checksums are taken."""

from __future__ import annotations

import contextlib
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._restore import checks
from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, SIZE, Chain, Library, restored_to
from ansible_collections.vmfleet.backup.tests.harness.moments import Moment
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


@contextlib.contextmanager
def pruned(library: Library) -> t.Iterator[None]:
    """Have s2 made full, and s1 removed, where nobody reads them."""
    library.prune(keep_last=2, consolidate=True)
    yield


class TestConsolidation:
    """s2, which builds on s1, would become a full image."""

    @pytest.fixture
    def moment(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> Moment:
        return Moment(monkeypatch, directory, checks, "check_all")

    @pytest.mark.parametrize("method", ["overlay", "copy"])
    def test_both_are_kept(
        self, chain: Chain, where: Path, moment: Moment, start_module: t.Callable[..., ModuleProcess], method: str
    ) -> None:
        library = chain.library
        given = {"id": "s2", "method": method, "directory": str(where)}
        module = start_module("backup_restore", library.restoration(**given))
        with moment.reached(pruned(library)):
            assert module.result()["changed"]
        assert library.listed() == ["s3", "s2", "s1"]
        chain.assert_restored("s2", restored_to(where))
        assert [pin["id"] for pin in pins(library)] == (["s2", "s2"] if method == "overlay" else [])

    def test_both_are_kept_for_a_block_device(
        self, chain: Chain, storage: Storage, moment: Moment, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        library, device = chain.library, storage.loop(SIZE)
        given: dict[str, t.Any] = {"id": "s2", "disks": one_disk(device), "overwrite": True}
        module = start_module("backup_restore", library.restoration(**given))
        with moment.reached(pruned(library)):
            assert module.result()["changed"]
        assert library.listed() == ["s3", "s2", "s1"]
        assert identical(chain.copies("s2")["drive0"], device, other_format="raw")
        assert pins(library) == []

    def test_a_restore_that_would_be_made(
        self, chain: Chain, where: Path, moment: Moment, start_module: t.Callable[..., ModuleProcess]
    ) -> None:
        """Check mode writes no pin, so both change; that is no damage."""
        library = chain.library
        given = {"id": "s2", "method": "overlay", "directory": str(where)}
        module = start_module("backup_restore", library.restoration(**given), check=True)
        with moment.reached(pruned(library)):
            assert module.result()["changed"]
        assert library.listed() == ["s3", "s2"]
        assert library.levels(NAME, "s2") == {"drive0": "full", "drive1": "full"}


class TestDamage:
    """An image that is not what was written."""

    @pytest.mark.parametrize("kind", ["overlay", "block device"])
    def test_nobody_reads_its_set_any_more(self, chain: Chain, where: Path, storage: Storage, kind: str) -> None:
        library = chain.library
        damaged = library.images(NAME, "s1")["drive0"]
        with damaged.open("r+b") as file:
            file.seek(damaged.stat().st_size - 1000)
            file.write(b"!")
        target = storage.loop(SIZE) if kind == "block device" else where / "look"
        method = "overlay" if kind == "overlay" else "copy"
        said = library.fail_restore(id="s2", method=method, disks=one_disk(target), overwrite=True)
        assert f"{damaged} is not what was written" in said
        assert (pins(library), list(where.iterdir())) == ([], [])

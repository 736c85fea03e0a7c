# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore, killed at every step."""

from __future__ import annotations

import shutil
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.killing import HANDS, steps
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.library import Chain
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


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

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore from a repository in which it cannot note what it reads."""

from __future__ import annotations

import functools
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import lock
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import repository
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, before_converting, restored_to
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.restoring import lock_held, one_disk, pins, unchanged

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

pytestmark = pytest.mark.usefixtures("clean")


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
        assert "Do not prune it while" in said["warnings"][0]
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
        monkeypatch.setattr(repository, "locked", functools.partial(lock.locked, timeout=0.1))

    @pytest.mark.parametrize("method", ["copy", "overlay"])
    def test_restored_with_a_warning(self, chain: Chain, where: Path, method: str) -> None:
        library = chain.library
        given: dict[str, t.Any] = {"method": method, "directory": str(where)}
        with lock_held(library):
            said = library.restore(**given)
        assert said["changed"]
        assert len(said["warnings"]) == 2
        assert f"another backup process has held {library.path}/{NAME}/.lock for more than" in said["warnings"][0]
        assert "Do not prune it while" in said["warnings"][0]
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

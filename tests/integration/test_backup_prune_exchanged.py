# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Something is exchanged for a link while an increment becomes a full image: nothing outside is written or removed."""

from __future__ import annotations

import asyncio
import inspect
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host import preallocate
from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory
from ansible_collections.vmfleet.backup.plugins.module_utils._prune import consolidate, prune
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import Rules
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import image_commands, qemu_img
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository, open_repository
from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain, Library, prepared
from ansible_collections.vmfleet.backup.tests.harness.pruning import assert_whole

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.hostile import Canary

pytestmark = pytest.mark.usefixtures("clean")

MOMENTS: dict[str, tuple[t.Any, str]] = {
    "before the new image is made": (consolidate, "_check_free"),
    "before it is filled": (qemu_img, "run_long"),
    "before it is flushed": (preallocate, "flush_open"),
    "before it is compared": (image_commands, "compare_command"),
    "before the lock is held": (Repository, "lock"),
    "before the set is looked at again": (consolidate, "read_catalog"),
    "before it is written down": (consolidate, "write_note"),
    "before it gets its name": (Directory, "rename"),
    "before the manifest is written": (consolidate, "rewrite_manifest"),
    "before the note is removed": (consolidate, "remove_note"),
}
NEW = ".s2.drive0.qcow2.consolidating"


class Exchange:
    """An entry of a VM's directory, or that directory, is put aside, and a link out of the repository in its place."""

    def __init__(self, library: Library, canary: Canary, what: str) -> None:
        vm = library.path / NAME
        self._image = vm / "s2" / "drive0.qcow2"
        self._place, target = {
            "the VM": (vm, canary.path),
            "the set": (vm / "s2", canary.path / "s1"),
            "the new image": (vm / NEW, canary.file),
        }[what]
        self._target = target
        self._aside = library.path.parent / "aside"

    def begin(self) -> None:
        if self._place.exists():
            self._place.rename(self._aside)
        self._place.symlink_to(self._target)

    def end(self) -> None:
        """Bring back what was put aside; the new image is only of use where the link has got its name."""
        place = self._image if self._image.is_symlink() else self._place
        if place.is_symlink():
            place.unlink()
        if self._place.name != NEW or place == self._image:
            self._aside.rename(place)
        else:
            self._aside.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with prepared() as chain:
        yield chain


def pruned(library: Library) -> str:
    """Keep two of three sets in this process; return what has gone wrong."""
    options = prune.PruneOptions(Rules(last=2), consolidate=True)
    with pytest.MonkeyPatch.context() as patch:
        # The warnings of a module end with its process, and this one goes on.
        patch.setattr(errors, "_warnings", {})
        try:
            return asyncio.run(prune.prune(open_repository(str(library.path)), NAME, options)).error
        except (BackupError, OSError) as error:
            return str(error)


@pytest.mark.parametrize("comes_back", [True, False], ids=["for a moment", "for good"])
@pytest.mark.parametrize("what", ["the VM", "the set", "the new image"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_it_is_exchanged_for_a_link(
    moment: str,
    what: str,
    comes_back: bool,
    chain: Chain,
    library: Library,
    canary: Canary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room, name = MOMENTS[moment]
    real = getattr(room, name)
    exchange = Exchange(library, canary, what)
    new = library.path / NAME / NEW
    exchanged = []

    async def finish(result: t.Awaitable[t.Any]) -> t.Any:
        try:
            return await result
        finally:
            if comes_back:
                exchange.end()

    def call(*arguments: t.Any, **options: t.Any) -> t.Any:
        # The lock is held for a moment before, too.
        if exchanged or (name == "run_long" and arguments[0][1] != "convert") or (name == "lock" and not new.exists()):
            return real(*arguments, **options)
        exchanged.append(moment)
        exchange.begin()
        if inspect.iscoroutinefunction(real):
            return finish(real(*arguments, **options))
        try:
            return real(*arguments, **options)
        finally:
            if comes_back:
                exchange.end()

    monkeypatch.setattr(room, name, call)
    pruned(library)
    canary.assert_untouched()
    assert exchanged == [moment]
    monkeypatch.undo()
    if not comes_back:
        exchange.end()
    # What is listed is what it was, and the next run needs no other help.
    for set_id in library.listed():
        for disk, image in library.images(NAME, set_id).items():
            assert identical(chain.copies(set_id)[disk], image), f"{disk} of {set_id}"
    library.prune(keep_last=2, consolidate=True)
    assert_whole(chain, library, "s3", "s2")

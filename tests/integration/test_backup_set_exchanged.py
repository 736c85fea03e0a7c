# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The directory of a set that grows is exchanged while its images are made: nothing outside is written."""

from __future__ import annotations

import asyncio
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.engine import reconcile
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import VmState
from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun, Settings
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.worker import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import parse_plan
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import block_jobs, qemu_img, target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import AsyncRepository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness.images import identical

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.hostile import Canary
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

MOMENTS = {
    "before an image is made": (target_image, "_make_file"),
    "before it is filled": (qemu_img, "create_command"),
    "before its space is reserved": (target_image, "reserve"),
    "before it is opened for QEMU": (block_jobs, "open_pair"),
}


@pytest.mark.parametrize("comes_back", [True, False], ids=["for a moment", "for good"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_directory_is_exchanged_for_a_link(
    moment: str,
    comes_back: bool,
    vms: Vms,
    sets: Sets,
    directory: Path,
    canary: Canary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vm = vms.start(name="web01")
    sets.back_up(vm, id="s0")
    frozen = {disk.id: vm.freeze(disk, directory / f"frozen-{disk.id}.qcow2") for disk in vm.disks}
    room, name = MOMENTS[moment]
    # qemu-img fills those only whose clusters QEMU has to choose.
    plan = sets.plan(vm, id="s1", level="full", compression="zstd" if room is qemu_img else "none")["plan"]
    staging, aside = sets.path / "web01" / ".s1.staging", sets.path / "web01" / "aside"
    real = getattr(room, name)
    exchanged = []

    def exchange(*arguments: t.Any, **options: t.Any) -> t.Any:
        # The first call for qemu-img's command line is for a key, before there is a file.
        if exchanged or (name == "create_command" and not arguments[0]):
            return real(*arguments, **options)
        exchanged.append(moment)
        staging.rename(aside)
        staging.symlink_to(canary.path / "s1")
        try:
            return real(*arguments, **options)
        finally:
            if comes_back and name != "create_command":
                staging.unlink()
                aside.rename(staging)

    monkeypatch.setattr(room, name, exchange)
    states = back_up(sets, plan)
    canary.assert_untouched()
    assert exchanged == [moment]
    if staging.is_symlink():
        assert states != [VmState.PUBLISHED]
        # What was made can be brought back, and is gone on with or made anew.
        monkeypatch.undo()
        staging.unlink()
        aside.rename(staging)
        frozen = {disk.id: vm.freeze(disk, directory / f"later-{disk.id}.qcow2") for disk in vm.disks}
        states = back_up(sets, plan)
    assert states == [VmState.PUBLISHED]
    for disk_id, copy in frozen.items():
        assert identical(copy, sets.path / "web01" / "s1" / f"{disk_id}.qcow2")


def back_up(sets: Sets, plan: dict[str, t.Any]) -> list[str]:
    """Bring a plan to its end in this process."""

    async def work() -> list[str]:
        async with ThreadedCalls(Watch(str(sets.path), writing=True)) as calls:
            repository = AsyncRepository(open_repository(str(sets.path)), calls)
            run = BackupRun.of(repository, parse_plan(plan), Settings())
            return [outcome.state for outcome in await reconcile(run)]

    return asyncio.run(work())

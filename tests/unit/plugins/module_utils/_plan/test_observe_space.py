# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Each VM takes its part of the space, besides the reserve and what others have begun."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Policy, Space
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.observe import SpaceTracker, measure, reserve_bytes
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.planner import count_layers, fit_into
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent, Level, VmName
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
from ansible_collections.vmfleet.backup.tests.harness.images import create, patterned, qemu_img, write
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import ELSEWHERE, MIB, UUID, begin, image
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import start

if TYPE_CHECKING:
    from pathlib import Path


POLICY = Policy(reserve="0")


def test_each_vm_takes_its_part_of_the_space() -> None:
    space = Space(free=100, reserve=10, promised=20, reservable=True)
    space, plans = fit_into(space, [start("a", 40), start("b", 40), start("c", 30)])
    assert [plan.action for plan in plans] == ["start", "fail", "start"]
    assert space.needed == 70
    assert "not enough space" in plans[1].reason


def test_a_set_that_is_unfinished_is_brought_to_its_end_though_there_is_no_room_for_the_next() -> None:
    space = Space(free=100, reserve=0, promised=0, reservable=True)
    unfinished = replace(start("a", 101), action="finish", reason="set s0 is unfinished")
    space, plans = fit_into(space, [unfinished, start("b", 100)])
    assert [plan.action for plan in plans] == ["finish", "start"]
    assert space.needed == 100
    assert plans[0].reason.startswith("set s0 is unfinished. For the new set there is not enough space: the set may")


def test_the_reserve_counts_twice_where_nothing_can_be_reserved() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=False)
    assert [plan.action for plan in fit_into(space, [start("a", 81)])[1]] == ["fail"]
    assert [plan.action for plan in fit_into(space, [start("a", 80)])[1]] == ["start"]


def test_a_set_that_is_there_needs_no_space() -> None:
    space = Space(free=0, reserve=10, promised=0, reservable=True)
    assert [plan.action for plan in fit_into(space, [replace(start("a", 5), action="skip")])[1]] == ["skip"]


@pytest.mark.parametrize(
    ("text", "size"), [("5%", 50), ("0", 0), ("0%", 0), ("12.5%", 125), ("300", 300), ("2K", 2048), ("1G", 1 << 30)]
)
def test_reserve(text: str, size: int) -> None:
    assert reserve_bytes(text, 1000) == size


@pytest.mark.parametrize("text", ["much", "100%", "-1%", "%", "5 percent", ""])
def test_bad_reserve(text: str) -> None:
    with pytest.raises(Refused, match="reserve"):
        reserve_bytes(text, 1000)


def intent(name: str = "web01", **more: Any) -> Intent:
    """Return the intent of a VM's set s1, of two disks."""
    given: dict[str, Any] = {"vm": VmName(name, UUID, UUID), "attempt": f"a-{name}"}
    return builders.intent("s1", image("vda"), image("vdb"), **{**given, **more})


class TestRoom:
    """Space is free, reserved, or promised to the sets that grow, whoever makes them."""

    def test_what_grows_elsewhere_is_promised(self, repository: Repository) -> None:
        begin(repository, intent("web01"))
        begin(repository, intent("db01", hypervisor=ELSEWHERE))
        room = SpaceTracker(repository, POLICY)
        assert room.space().promised == 4 * MIB
        # A VM's own set is counted by the one who makes it.
        assert room.space("web01").promised == room.space("db01").promised == 2 * MIB
        # One look: others write to this file system, too.
        space = room.space("web01")
        assert space.usable == space.free - 2 * MIB

    def test_what_is_allocated_is_promised_no_more(self, repository: Repository) -> None:
        begin(repository, intent())
        with open(repository.image_path(intent(), "vda.qcow2"), "wb") as grown:
            os.posix_fallocate(grown.fileno(), 0, 3 * MIB)
        assert SpaceTracker(repository, POLICY).space().promised == MIB

    def test_a_set_begun_since_counts_at_once(self, repository: Repository) -> None:
        room = SpaceTracker(repository, POLICY)
        assert room.space().promised == 0
        begin(repository, intent())
        room.note(intent())
        assert room.space().promised == 2 * MIB
        # And one that has come to its end does so no more.
        staging.discard(repository, intent())
        assert room.space().promised == 0

    def test_what_others_have_begun_is_looked_up_now_and_then(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        room = SpaceTracker(repository, POLICY)
        assert room.space().promised == 0
        begin(repository, intent())
        now[0] += SpaceTracker.RESCAN - 1
        assert room.space().promised == 0
        now[0] += 1
        assert room.space().promised == 2 * MIB

    def test_what_takes_no_more_is_not_looked_at_for_each_vm(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        begin(repository, intent())
        begin(repository, intent("db01"))
        paths = [repository.image_path(intent(), name) for name in ("vda.qcow2", "vdb.qcow2")]
        for path in paths:
            with open(path, "wb") as grown:
                os.posix_fallocate(grown.fileno(), 0, 2 * MIB)
        room = SpaceTracker(repository, POLICY)
        assert room.space().promised == 2 * MIB
        for path in paths:
            os.truncate(path, 0)
        assert room.space().promised == 2 * MIB
        now[0] += SpaceTracker.RESCAN
        assert room.space().promised == 4 * MIB

    def test_the_reserve_is_a_part_of_the_whole(self, repository: Repository) -> None:
        status = os.statvfs(repository.path)
        space = SpaceTracker(repository, Policy(reserve="10%")).space()
        assert space.reserve == status.f_blocks * status.f_frsize // 10
        assert SpaceTracker(repository, Policy(reserve="3M")).space().reserve == 3 * MIB

    def test_of_a_repository_that_is_planned(self, tmp_path: Path) -> None:
        room = SpaceTracker(Repository(str(tmp_path / "not" / "yet"), ""), POLICY)
        assert room.space().promised == 0
        assert room.space().free > 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [(), ("base",), ("middle",), ("middle", "base")])
def test_a_full_is_measured_whichever_of_its_layers_are_told(tmp_path: Path, told: tuple[str, ...]) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    qemu_img("convert", "-c", "-O", "qcow2", patterned(tmp_path / "whole"), base)
    write(create(middle, backing=base), "write 4M 4M")
    create(top, backing=middle)
    lower = {"base": "", "middle": str(base)}
    nodes = tuple(
        Disk("", name, "qcow2", filename=str(tmp_path / name), virtual_size=64 * MIB, backing_file=lower[name])
        for name in told
    )
    upper = Disk(
        "vda", "n", "qcow2", layers=("middle", "base"), filename=str(top), virtual_size=64 * MIB, actual_size=33 * MIB
    )
    seen = builders.vm(upper, other_nodes=nodes)
    links = [ChainLink(Level.FULL, "")]
    counted = asyncio.run(count_layers(seen, [upper], links))
    assert ("vda" in counted) == (len(told) == 2)
    sizes = asyncio.run(measure([upper], links, counted=counted))
    # Eight pieces of 4 MiB are in the base, one more is in the middle.
    assert 36 * MIB < sizes["vda"] < 38 * MIB
    assert asyncio.run(measure([upper], links)) == sizes

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a look round finds: the room that others leave, damaged chains, attempts whose QEMU has ended."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import RepositoryHangs, ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.io_thread import ThreadedCalls
from ansible_collections.vmfleet.backup.plugins.module_utils._host.probe import Watch
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import planner
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.levels import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Plan, Policy, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.observe import observe, with_damage, with_fates
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.planner import draw_up
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.space import SpaceTracker, measure
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.async_repository import AsyncRepository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.chain import Level
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    DiskImage,
    Intent,
    Verification,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
from ansible_collections.vmfleet.backup.tests.harness.images import create, patterned, qemu_img, write
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import (
    ELSEWHERE,
    HERE,
    MIB,
    UUID,
    dead_process,
    disk,
    image,
    manifest,
    own_process,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm

POLICY = Policy(reserve="0")


def intent(name: str = "web01", **more: Any) -> Intent:
    """Return the intent of a VM's set s1, of two disks."""
    given: dict[str, Any] = {"vm": VmName(name, UUID, UUID), "attempt": f"a-{name}"}
    return builders.intent("s1", image("vda"), image("vdb"), **{**given, **more})


def begin(repository: Repository, of: Intent) -> None:
    os.makedirs(repository.directory(of.vm.name), exist_ok=True)
    repository.begin(of)


class TestRoom:
    """Space is free, reserved, or promised to the sets that grow, whoever makes them."""

    def test_what_grows_elsewhere_is_promised(self, repository: Repository) -> None:
        begin(repository, intent("web01"))
        begin(repository, intent("db01", hypervisor=ELSEWHERE))
        room = SpaceTracker(repository, POLICY)
        assert room.space().promised == 4 * MIB
        # A VM's own set is counted by the one who makes it.
        assert room.space("web01").promised == room.space("db01").promised == 2 * MIB
        assert room.space("web01").usable == room.space("web01").free - 2 * MIB

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
        repository.discard(intent())
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


def vm(*names: str, **more: Any) -> Vm:
    """Return a VM of these disks, whose process nobody knows."""
    return builders.vm(*(disk(name, f"n-{name}") for name in names), **{"process": None, **more})


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
    sizes = asyncio.run(measure([upper], [ChainLink(Level.FULL, "")], vm=seen))
    # Eight pieces of 4 MiB are in the base, one more is in the middle.
    assert 36 * MIB < sizes["vda"] < 38 * MIB
    assert asyncio.run(measure([upper], [ChainLink(Level.FULL, "")])) == sizes


def publish(repository: Repository, set_id: str, *images: DiskImage) -> None:
    this = builders.intent(set_id, *images)
    begin(repository, this)
    for found in images:
        Path(repository.image_path(this, found.image)).write_bytes(b"abc")
    repository.describe(this, manifest(set_id, *images))
    repository.publish(this)


def stored(name: str, below: str | None = None) -> DiskImage:
    return image(name, below, bytes=3)


class TestDamage:
    """What is wrong with the files below the images that the next ones may build on."""

    @pytest.fixture
    def chain(self, repository: Repository) -> Repository:
        """Fulls of vda in s1 and s3 and of vdb in s1, with increments between and after them."""
        publish(repository, "s1", stored("vda"), stored("vdb"))
        publish(repository, "s2", stored("vda", "s1"), stored("vdb", "s1"))
        publish(repository, "s3", stored("vda"), stored("vdb", "s2"))
        publish(repository, "s4", stored("vda", "s3"), stored("vdb", "s3"))
        return repository

    def found(self, repository: Repository, *names: str) -> dict[tuple[str, str], str]:
        return dict(with_damage(Observation(vm(*names)), repository, repository.shelf("web01").sets).damage)

    def remove(self, repository: Repository, set_id: str, name: str) -> str:
        path = os.path.join(repository.set_path("web01", set_id), f"{name}.qcow2")
        os.unlink(path)
        return f"image {path} is missing"

    def test_none(self, chain: Repository) -> None:
        assert self.found(chain, "vda", "vdb", "new") == {}

    def test_without_sets_or_without_a_vm_nothing_is_looked_at(self, repository: Repository) -> None:
        assert with_damage(Observation(vm("vda")), repository, ()) == Observation(vm("vda"))
        assert with_damage(Observation(error="off", off=True), repository, ()) == Observation(error="off", off=True)

    @pytest.mark.parametrize(
        ("victim", "spoiled"),
        [
            (("s4", "vda"), {("s4", "vda")}),
            # A full spoils what builds on it, and is itself what differentials build on.
            (("s3", "vda"), {("s3", "vda"), ("s4", "vda")}),
            (("s1", "vdb"), {("s1", "vdb"), ("s4", "vdb")}),
            (("s2", "vdb"), {("s4", "vdb")}),
            # Nothing to come builds on these.
            (("s1", "vda"), set()),
            (("s2", "vda"), set()),
        ],
    )
    def test_spoils_what_builds_on_it(
        self, chain: Repository, victim: tuple[str, str], spoiled: set[tuple[str, str]]
    ) -> None:
        said = self.remove(chain, *victim)
        assert self.found(chain, "vda", "vdb") == dict.fromkeys(spoiled, said)

    def test_a_failed_verification_counts(self, chain: Repository) -> None:
        attempt = chain.shelf("web01").sets[-1].attempt
        write_annotation(chain, "web01", Verification("s4", attempt, "checksum", "2026-11-22T00:00:00Z", ("flipped",)))
        said = "set s4 has failed its verification: flipped"
        assert self.found(chain, "vda", "vdb") == {("s4", "vda"): said, ("s4", "vdb"): said}
        write_annotation(
            chain, "web01", Verification("s4", attempt, "boot", "2026-11-22T00:00:00Z", ("no sign of life",))
        )
        assert self.found(chain, "vda", "vdb") == {}

    def test_of_disks_that_the_vm_has_no_more_does_not_matter(self, chain: Repository) -> None:
        self.remove(chain, "s4", "vdb")
        assert self.found(chain, "vda") == {}


class TestDead:
    """An attempt is dead when its QEMU, or the boot of its hypervisor, has ended: nothing else tells."""

    ALIVE = (own_process().pid, own_process().start)
    GONE = (dead_process().pid, dead_process().start)

    @pytest.mark.parametrize(
        ("attempt", "facts", "dead"),
        [
            ({"process": ALIVE}, Observation(vm()), False),
            ({"process": GONE}, Observation(vm()), True),
            ({"process": ALIVE}, Observation(error="no such socket", off=True), False),
            ({"process": GONE}, Observation(error="no such socket", off=True), True),
            # Another QEMU answers, and the one that made it is still there.
            ({"process": ALIVE}, Observation(vm(process=Process(1, 1))), False),
            ({"process": GONE}, Observation(vm(process=Process(1, 1))), True),
            # Over TCP, only a refused connection tells.
            ({"process": ()}, Observation(vm()), False),
            ({"process": ()}, Observation(error="refused", off=True), True),
            ({"process": ()}, Observation(error="no greeting"), False),
            ({"process": ALIVE, "hypervisor": replace(HERE, boot_id="before")}, Observation(vm()), True),
            (
                {"process": GONE, "hypervisor": replace(HERE, machine_id="other", boot_id="other")},
                Observation(vm()),
                False,
            ),
            # A container with a machine-id of its own runs on the same kernel.
            ({"process": GONE, "hypervisor": replace(HERE, machine_id="other")}, Observation(vm()), True),
            # Machines, and containers, are cloned with their machine-id.
            ({"process": GONE, "hypervisor": replace(HERE, name="hv2", boot_id="other")}, Observation(vm()), False),
            (
                {"process": GONE, "hypervisor": ELSEWHERE},
                Observation(error="no such socket", off=True),
                False,
            ),
        ],
    )
    def test_dead(self, attempt: dict[str, Any], facts: Observation, dead: bool) -> None:
        made = intent(**attempt)
        assert with_fates(facts, [made], HERE).dead == (frozenset({made.attempt}) if dead else frozenset())


def test_a_vm_that_is_off_is_told_from_one_that_is_silent(tmp_path: Path) -> None:
    facts = asyncio.run(observe(Request("web01", f"unix:{tmp_path}/none.qmp")))
    assert (facts.vm, facts.off) == (None, True)
    assert str(tmp_path) in facts.error


class TestOneVm:
    """What goes wrong with one VM is told of that one, and the others are planned."""

    def plan(self, repository: Repository, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Plan:
        def ask(request: Request, *_others: Any) -> Any:
            async def answer() -> Observation:
                if "web" in request.monitor:
                    raise error
                return Observation(error="it does not answer")

            return answer()

        async def draw() -> Plan:
            async with ThreadedCalls(Watch(repository.path, writing=True)) as calls:
                requests = [Request(name, f"unix:/run/{monitor}.qmp") for name, monitor in (("", "web"), ("db", "b"))]
                return await draw_up(AsyncRepository(repository, calls), requests, "s1", POLICY)

        monkeypatch.setattr(planner, "observe", ask)
        return asyncio.run(draw())

    def test_a_defect_of_ours(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = self.plan(repository, monkeypatch, KeyError("node-name"))
        assert [(vm.name, vm.action, vm.reason) for vm in plan.vms] == [
            ("web", "fail", "internal error: KeyError('node-name'); report it with the warning"),
            ("db", "fail", "it does not answer"),
        ]
        (warning,) = plan.warnings
        assert warning.startswith("unix:/run/web.qmp: Traceback")
        assert "KeyError: 'node-name'" in warning

    @pytest.mark.parametrize("error", [ToolError("qemu-img took too long"), OSError(5, "Input/output error", "/a.img")])
    def test_what_can_be_told_plainly(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        plan = self.plan(repository, monkeypatch, error)
        told = "/a.img: Input/output error" if isinstance(error, OSError) else str(error)
        assert [vm.reason for vm in plan.vms] == [told, "it does not answer"]
        assert plan.warnings == ()

    def test_a_repository_that_hangs_ends_all(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(RepositoryHangs, match="as long as it does"):
            self.plan(repository, monkeypatch, RepositoryHangs("as long as it does"))

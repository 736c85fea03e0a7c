# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a look at a VM and its records finds: damaged chains, attempts whose QEMU has ended."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.observe import observe, with_damage, with_ends
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Verification
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import (
    ELSEWHERE,
    HERE,
    begin,
    dead_process,
    disk,
    image,
    intent,
    manifest,
    own_process,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import TERMS

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import DiskImage
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def vm(*names: str, **more: Any) -> Vm:
    """Return a VM of these disks, whose process nobody knows."""
    return builders.vm(*(disk(name, f"n-{name}") for name in names), **{"process": None, **more})


def publish(repository: Repository, set_id: str, *images: DiskImage) -> None:
    this = builders.intent(set_id, *images)
    begin(repository, this)
    for found in images:
        Path(repository.image_path(this, found.image)).write_bytes(b"abc")
    staging.describe(repository, this, manifest(set_id, *images))
    staging.publish(repository, this)


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
        return dict(with_damage(Observation(vm(*names)), repository, repository.records("web01").sets).damage)

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
        attempt = chain.records("web01").sets[-1].attempt
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
        assert with_ends(facts, [made], HERE).dead == (frozenset({made.attempt}) if dead else frozenset())


def test_a_vm_that_is_off_is_told_from_one_that_is_silent(tmp_path: Path) -> None:
    facts = asyncio.run(observe(Request("web01", f"unix:{tmp_path}/none.qmp"), TERMS))
    assert (facts.vm, facts.off) == (None, True)
    assert str(tmp_path) in facts.error

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which image a disk's next one builds on: an increment where there is no doubt, a full image with a reason else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._plan import disks as plan_levels
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink, LevelPolicy, link
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, UUID, bitmap
from ansible_collections.vmfleet.backup.tests.unit.plugins.chains import S1, S2, S3, disk, image, manifest, parent

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest


def decide(found: Disk, *sets: Manifest, disks: tuple[Disk, ...] = (), **more: Any) -> ChainLink:
    """How a disk goes into the set after these."""
    given: dict[str, Any] = {"identity": UUID, "wish": LevelPolicy(), "damage": {}, **more}
    layers = given.get("layers", ())
    return link(found, disks or (found,), given["identity"], sets, given["wish"], given["damage"], layers)


def test_an_increment_builds_on_the_newest_set() -> None:
    found = decide(disk("b-s1", "b-s2"), S1, S2)
    records = (bitmap("b-s2"),)
    assert found == ChainLink(
        Level.INCREMENTAL, "changes since set s2", parent("s2"), "vda.qcow2", "b-s2", below=(), records=records
    )
    assert found.backing == ("../s2/vda.qcow2", "qcow2")


@pytest.mark.parametrize("level", ["auto", "incremental"])
def test_auto_is_incremental(level: str) -> None:
    assert decide(disk("b-s1"), S1, wish=LevelPolicy(level)).level == Level.INCREMENTAL


def test_a_differential_builds_on_the_newest_full() -> None:
    fresh = manifest("s4", 4, image("s4"), image("s4", name="vdb"))
    later = manifest("s5", 5, image("s5", parent("s4"), level=Level.DIFFERENTIAL), image("s5", name="vdb"))
    wish = LevelPolicy("differential")
    assert decide(disk("b-s1", "b-s3"), S1, S2, S3, wish=wish).parent == parent("s1")
    assert decide(disk("b-s4", "b-s5"), S1, S2, S3, fresh, later, wish=wish).parent == parent("s4")
    other = disk("b-s5-vdb", "b-s4-vdb", name="vdb")
    assert decide(other, S1, S2, S3, fresh, later, wish=wish).parent == parent("s5")
    assert decide(disk("b-s1"), S1, wish=wish).level == Level.DIFFERENTIAL


def test_a_chain_goes_on_under_another_name_of_the_device() -> None:
    found = decide(disk("b-s1", qdev="/machine/peripheral/virtio-disk0/virtio-backend"), OLD)
    assert (found.level, found.bitmap, found.image) == (Level.INCREMENTAL, "b-s1", "virtio-disk0.qcow2")
    assert found.parent == replace(parent("s1"), disk="virtio-disk0")
    # The record that has to be there is that of the image.
    assert "is gone" in decide(disk(qdev="/machine/peripheral/virtio-disk0/virtio-backend"), OLD).reason
    # Whose device it was is not known of a disk without one.
    assert decide(disk("b-s1"), OLD).reason == "it is not in set s1"


OLD = manifest("s1", 1, image("s1", name="virtio-disk0", qdev="virtio-disk0", bitmap="b-s1"))
FULLS: dict[str, tuple[ChainLink, str]] = {
    "asked for": (decide(disk("b-s1"), S1, wish=LevelPolicy("full")), "a full image is asked for"),
    "not tracked": (decide(disk("b-s1"), S1, wish=LevelPolicy(tracking=False)), "changes are not tracked"),
    "no lasting name": (decide(disk("b-s1", stable_name=False), S1), "its name changes when QEMU restarts"),
    "shareable": (decide(disk("b-s1", shared=True), S1), "it is shareable: what other VMs write to it is not recorded"),
    "first set": (decide(disk("b-s1")), "the VM's first set"),
    "new disk": (decide(disk("b-s1", name="vdb"), S1), "it is not in set s1"),
    "new disk, differential": (
        decide(disk("b-s1", name="vdb"), S1, wish=LevelPolicy("differential")),
        "no set holds it in full",
    ),
    "another VM": (decide(disk("b-s1"), S1, identity="uuid-2"), f"set s1 is of another VM ({UUID})"),
    "grown": (decide(disk("b-s1", virtual_size=2 * SIZE), S1), f"changed from {SIZE} to {2 * SIZE} bytes since set s1"),
    "shrunk": (decide(disk("b-s1", virtual_size=512), S1), f"changed from {SIZE} to 512 bytes"),
    "made without tracking": (decide(disk(), manifest("s1", 1, image("s1", bitmap=None))), "without a record"),
    "gone": (decide(disk("b-s1"), S1, S2), "(bitmap b-s2) is gone: QEMU was killed"),
    "gone with QEMU": (decide(disk(keeps_bitmaps=False, driver="raw"), S1), "like this one (raw) keeps none"),
    "gone with an increment": (
        decide(disk("b-s2"), S1, S2, wish=LevelPolicy("differential")),
        "(bitmap b-s1) is gone: set s2 was incremental",
    ),
    "inconsistent": (decide(disk(bitmap("b-s1", inconsistent=True, recording=False)), S1), "is inconsistent"),
    "in use": (decide(disk(bitmap("b-s1", busy=True)), S1), "is in use by another operation"),
    "disabled": (decide(disk(bitmap("b-s1", recording=False)), S1), "is disabled"),
    "on another disk": (
        decide(disk(), S1, disks=(disk(), disk("b-s1", name="vdb"))),
        "is on disk vdb: the disks were swapped",
    ),
    "in a layer below": (
        decide(disk(), S1, layers=(disk("b-s1", name=""),)),
        "is in a layer below (node n-): somebody took an external snapshot",
    ),
    "damaged": (decide(disk("b-s2"), S1, S2, damage={("s2", "vda"): "image x is missing"}), "image x is missing"),
    "chain long enough": (
        decide(disk("b-s3"), S1, S2, S3, wish=LevelPolicy(max_chain=3)),
        "has 3 images (max_chain is 3)",
    ),
    "chain of one": (decide(disk("b-s1"), S1, wish=LevelPolicy(max_chain=1)), "has 1 images (max_chain is 1)"),
    "parent gone": (decide(disk("b-s3"), S2, S3), "set s1, which s2 builds on, is gone"),
    "parent without the disk": (
        decide(disk("b-s2"), manifest("s1", 1, image("s1", name="vdb")), S2),
        "set s1, which s2 builds on, is gone or has no disk vda",
    ),
}


@pytest.mark.parametrize(("found", "said"), FULLS.values(), ids=list(FULLS))
def test_a_full_says_why(found: ChainLink, said: str) -> None:
    assert found.level == Level.FULL
    assert said in found.reason
    assert (found.parent, found.bitmap, found.backing) == (None, "", None)


def test_doubt_about_others_is_none_about_this_one() -> None:
    damage = {("s1", "vda"): "gone", ("s2", "vdb"): "gone"}
    assert decide(disk("b-s2"), S1, S2, damage=damage).level == Level.INCREMENTAL
    assert decide(disk("b-s3"), S1, S2, S3, wish=LevelPolicy(max_chain=4)).level == Level.INCREMENTAL
    # Another of the same name on another disk does not matter while this one has it.
    assert decide(disk("b-s1"), S1, disks=(disk("b-s1"), disk("b-s1", name="vdb"))).level == Level.INCREMENTAL


def chain(length: int, set_id: str, name: str) -> list[Manifest]:
    """A chain of increments; `set_id` gets the number of each set."""
    made: list[Manifest] = []
    for number in range(length):
        below = parent(made[-1].id) if made else None
        this = set_id.format(number)
        made.append(manifest(this, number + 1, image(this, below, image=name)))
    return made


def test_names_too_long_for_qemu_begin_a_new_chain() -> None:
    # Each step is ../<64>/<38>.qcow2: 112 bytes.
    step = len("../") + 64 + len("/") + 38 + len(".qcow2")
    fits = plan_levels.LONGEST_NAME // step
    ids = "s{:063}"
    assert len(ids.format(1)) == 64
    made = chain(fits + 1, ids, "d" * 38 + ".qcow2")
    wish = LevelPolicy(max_chain=100)
    assert decide(disk(f"b-{made[-2].id}"), *made[:-1], wish=wish).level == Level.INCREMENTAL
    refused = decide(disk(f"b-{made[-1].id}"), *made, wish=wish)
    assert refused.level == Level.FULL
    assert f"its chain has {fits + 1} images, and with longer backing file names" in refused.reason

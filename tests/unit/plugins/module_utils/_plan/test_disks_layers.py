# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A disk on external snapshots: an increment of all that its layers have recorded, or a full image with a reason."""

from __future__ import annotations

import itertools
import typing as t
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import redact_name
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import disks
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink, LevelPolicy
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, UUID, bitmap
from ansible_collections.vmfleet.backup.tests.unit.plugins.chains import S1, disk, image, manifest

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk

NAME = "b-s1"


def layer(number: int, *bitmaps: t.Any, **more: t.Any) -> Disk:
    """The node `n<number>` of the file `/<number>`; 0 is the disk's own."""
    given = {"node": f"n{number}", "filename": f"/{number}", "read_only": number > 0, **more}
    return disk(*bitmaps, name="vda" if number == 0 else "", **given)


def decide(top: Disk, *layers: Disk, source: str = "") -> ChainLink:
    """How the disk `top` on these layers goes into the set after s1, which was made of the file `source`."""
    base = manifest("s1", 1, image("s1", source=source)) if source else S1
    found = replace(top, layers=tuple(node.node for node in layers))
    return disks.link(found, (found,), UUID, [base], LevelPolicy(), {}, layers)


def test_one_layer_is_as_ever() -> None:
    found = decide(layer(0, NAME))
    assert (found.level, found.below, found.reason) == (Level.INCREMENTAL, (), "changes since set s1")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_bitmaps_of_all_layers_are_merged(depth: int) -> None:
    records = [bitmap(NAME, count=65536 * number) for number in range(depth + 1)]
    layers = [layer(number, records[number]) for number in range(depth + 1)]
    found = decide(*layers, source=f"/{depth}")
    assert (found.level, found.bitmap) == (Level.INCREMENTAL, NAME)
    assert found.below == tuple(f"n{number}" for number in range(1, depth + 1))
    assert found.records == tuple(records)
    assert f"{depth + 1} layers (external snapshots)" in found.reason


def test_what_lies_below_the_disk_of_the_set_does_not_matter() -> None:
    found = decide(layer(0, NAME), layer(1, NAME), layer(2, "b-s0"), layer(3), source="/1")
    assert (found.level, found.below) == (Level.INCREMENTAL, ("n1",))


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("nbd://me:hunter2@host/{}", id="by a release that did not hide secrets"),
        pytest.param("nbd://me:<removed>@host/{}", id="by one that did"),
    ],
)
def test_names_with_secrets_tell_layers_from_each_other(written: str) -> None:
    """What a set has written down is the file that it was made of, whoever wrote it; and no other one is."""

    def named(number: int, *bitmaps: str) -> Disk:
        return layer(number, *bitmaps, filename=redact_name(f"nbd://me:hunter2@host/{number}"))

    found = decide(named(0, NAME), named(1), source=written.format(0))
    assert (found.level, found.below) == (Level.INCREMENTAL, ())
    found = decide(named(0, NAME), named(1), source=written.format(1))
    assert found.level == Level.FULL
    assert "is gone in a layer below (node n1)" in found.reason


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ({"inconsistent": True}, "is inconsistent"),
        ({"busy": True}, "is in use"),
        ({"recording": False}, "is disabled"),
    ],
)
def test_each_layer_has_to_be_right(broken: int, flaw: dict[str, bool], said: str) -> None:
    layers = [layer(number, bitmap(NAME, **(flaw if number == broken else {}))) for number in range(3)]
    found = decide(*layers, source="/2")
    assert (found.level, said in found.reason) == (Level.FULL, True), found
    assert broken == 0 or f"(node n{broken})" in found.reason


@pytest.mark.parametrize(("first", "missing"), [(2, 1), (3, 1), (3, 2)])
def test_a_layer_without_a_bitmap_between_is_a_gap(first: int, missing: int) -> None:
    layers = [layer(number, *([] if number == missing else [NAME])) for number in range(first + 1)]
    found = decide(*layers)
    assert found.level == Level.FULL
    assert f"is gone in a layer below (node n{missing})" in found.reason


def test_a_bitmap_that_was_removed_from_the_disk_of_the_set_is_a_gap() -> None:
    """Only the empty copy on the overlay is left, and looks healthy."""
    found = decide(layer(0, NAME), layer(1), source="/1")
    assert found.level == Level.FULL
    assert "is gone in a layer below (node n1): somebody removed it, or merged layers without it" in found.reason
    # The set was made of a disk that had this layer below already.
    assert decide(layer(0, NAME), layer(1), source="/0").level == Level.INCREMENTAL


@pytest.mark.parametrize(
    ("top", "below", "level"),
    [
        # Nothing has happened; an external snapshot.
        (layer(1, NAME), [layer(2)], Level.INCREMENTAL),
        (layer(0, NAME), [layer(1, NAME), layer(2)], Level.INCREMENTAL),
        # The disk of the set was committed into the layer below it, with its bitmap and without.
        (layer(0, NAME), [layer(2, NAME)], Level.INCREMENTAL),
        (layer(0, NAME), [layer(2)], Level.FULL),
        # It is the layer below that goes on.
        (layer(2, NAME), [], Level.INCREMENTAL),
        # All was pulled into a new file, or copied to one.
        (layer(0, NAME), [], Level.INCREMENTAL),
    ],
)
def test_the_layers_that_the_set_was_made_of_tell_what_is_missing(top: Disk, below: list[Disk], level: str) -> None:
    base = manifest("s1", 1, image("s1", source="/1", layers=("/2",)))
    found = replace(top, name="vda", read_only=False, layers=tuple(node.node for node in below))
    assert disks.link(found, (found,), UUID, [base], LevelPolicy(), {}, below).level == level


def test_a_layer_of_another_size_is_no_part_of_the_record() -> None:
    found = decide(layer(0, NAME), layer(1, NAME, virtual_size=SIZE // 2), source="/1")
    assert found.level == Level.FULL
    assert f"of {SIZE // 2} bytes" in found.reason


def test_the_top_without_a_bitmap_is_a_gap() -> None:
    found = decide(layer(0), layer(1, NAME), source="/1")
    assert found.level == Level.FULL
    assert "is in a layer below (node n1): somebody took an external snapshot" in found.reason


def test_a_read_only_disk_is_not_merged() -> None:
    assert decide(layer(0, NAME, read_only=True), layer(1, NAME), source="/1").level == Level.FULL


def test_a_layer_of_another_disk_is_none_of_this_one() -> None:
    top = layer(0, NAME)
    other = layer(7, bitmap(NAME, inconsistent=True))
    found = disks.link(top, (top,), UUID, [S1], LevelPolicy(), {}, (other,))
    assert (found.level, found.below) == (Level.INCREMENTAL, ())


def test_no_gap_is_ever_overlooked() -> None:
    """For every way in which three layers can have the bitmap or not, and each that the set can have been made of."""
    for (top, middle, low), made in itertools.product(itertools.product([True, False], repeat=3), range(3)):
        has = (top, middle, low)
        layers = [layer(number, *([NAME] if has[number] else [])) for number in range(3)]
        found = decide(*layers, source=f"/{made}")
        whole = all(has[: max([made, *(number for number in range(3) if has[number])]) + 1])
        assert (found.level == Level.INCREMENTAL) == whole, (has, made, found)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which points of a module (see crash.py) a run of the tests strikes, and that the lists of them are right.

VMFLEET_CRASHES=all is for all of them, VMFLEET_SEED=<number> for the choice of an earlier run.
"""

from __future__ import annotations

import os
import random
import typing as t

if t.TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ansible_collections.vmfleet.backup.tests.harness.crash import Point

WHOLE = os.environ.get("VMFLEET_CRASHES") == "all"


def dice() -> random.Random:
    """Chance, with its seed shown."""
    seed = int(os.environ.get("VMFLEET_SEED", random.randrange(1 << 32)))
    print(f"VMFLEET_SEED={seed}")
    return random.Random(seed)


def document(place: str) -> frozenset[str]:
    """The names of the points at which a document is written, whole or not at all."""
    steps = (
        " > remove: remove",
        ": create",
        ": chmod",
        ": fsync",
        ": rename",
        " > sync directory: fsync",
    )
    return frozenset(place + step for step in steps)


def assert_listed(found: Iterable[Point], listed: Collection[str], where: str) -> None:
    """Every point that was hit is in the list, and every point of the list was hit."""
    names = list(dict.fromkeys(point.name for point in found))
    new = [name for name in names if name not in listed]
    assert not new, (
        f"The module touches the world where {where} does not know of it: {new}. Add these names there, so that the"
        " module is killed there, too; the next run has to undo, or go on with, what is found then."
    )
    missing = sorted(set(listed) - set(names))
    assert not missing, (
        f"The module does not come to points that are in {where}: {missing}. Where a step is gone on purpose, take its"
        " name out there; else find out why it is not taken any more."
    )


def deal(points: Iterable[Point], chance: random.Random, hand: int, hands: int, share: float = 1.0) -> list[Point]:
    """The points that one of `hands` tests strikes: one hit of each name and moment, or all; of these, a share."""
    hits: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        hits.setdefault((point.name, point.moment), []).append(point)
    if WHOLE:
        return [point for group in hits.values() for point in group][hand::hands]
    drawn = [chance.choice(group) for group in hits.values()][hand::hands]
    return drawn if share == 1 else chance.sample(drawn, max(1, round(share * len(drawn))))

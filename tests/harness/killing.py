# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The steps of a module at which tests kill it."""

from __future__ import annotations

import itertools
import random
import typing as t

# The steps are dealt out to so many tests, that these can run side by side.
HANDS = 2


def steps(hand: int, every: int = 1) -> t.Iterator[int]:
    """Return the steps of one hand: all, or other ones in each run of the tests, so that in time all are visited."""
    first = 1 + hand * every + random.randrange(every)
    print(f"killed at steps {first}, {first + HANDS * every}, ...")
    return itertools.count(first, HANDS * every)

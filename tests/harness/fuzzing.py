# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What nobody has thought of: JSON of all kinds, and honest documents in which something is changed.

A few examples are tried in every run of the unit tests, always the same. `make fuzz` tries many, and others each time.
"""

from __future__ import annotations

import copy
import json
import os
import typing as t

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MANY = int(os.environ.get("VMFLEET_FUZZ_EXAMPLES", "0"))
ODD_TEXTS = (
    *(
        "",
        ".",
        "..",
        "../../../../x",
        "/etc/passwd",
        "a/b",
        "s1\n",
        "a\0b",
        "\ud800",
        "\udcff",
        "\u00e4",
        "\u202e",
        "x" * 70000,
    ),
    *("2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "now"),
)
ODD_NUMBERS = (
    -1,
    0,
    1,
    True,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    -0.5,
    1e308,
    float("inf"),
    float("nan"),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=20),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4),
    max_leaves=12,
)
"""Anything that JSON can say."""


def examples(few: int) -> settings:
    """So many examples in a run of the unit tests, and many in `make fuzz`."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=MANY or few,
        derandomize=not MANY,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=slow,
    )


def places(found: t.Any, place: tuple[t.Any, ...] = ()) -> t.Iterator[tuple[t.Any, ...]]:
    """Where there is something in a document, each as the keys that lead there."""
    below = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, one in below:
        yield (*place, key)
        yield from places(one, (*place, key))


@st.composite
def changed(draw: st.DrawFn, honest: dict[str, t.Any]) -> dict[str, t.Any]:
    """An honest document in which up to three things are removed, replaced, doubled or added."""
    found = copy.deepcopy(honest)
    for _number in range(draw(st.integers(1, 3))):
        known = list(places(found))
        if not known:
            break
        *way, key = draw(st.sampled_from(known))
        at: t.Any = found
        for step in way:
            at = at[step]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "double", "add")))
        if kind == "remove":
            del at[key]
        elif kind == "double" and isinstance(at, list):
            at.append(copy.deepcopy(at[key]))
        elif kind == "add" and isinstance(at, dict):
            at[draw(st.text(max_size=8))] = draw(ANYTHING)
        else:
            at[key] = draw(ANYTHING)
    return found


@st.composite
def damaged(draw: st.DrawFn, honest: dict[str, t.Any]) -> bytes:
    """The bytes of a file that was an honest document once, or never."""
    kind = draw(st.sampled_from(("changed", "changed", "changed", "anything", "cut", "bytes", "deep", "noise")))
    if kind == "anything":
        return as_bytes(draw(ANYTHING))
    if kind == "deep":
        return b'{"schema": 1, "disks": ' + draw(st.sampled_from((b"[", b'{"a":'))) * draw(
            st.sampled_from((50, 200000))
        )
    if kind == "noise":
        return draw(st.binary(max_size=200))
    content = as_bytes(draw(changed(honest)) if kind == "changed" else honest)
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "bytes":
        at = draw(st.integers(0, len(content) - 1))
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + draw(st.integers(0, 3)) :]
    return content


def as_bytes(found: t.Any) -> bytes:
    """What stands in a file of it, numbers included that JSON does not have."""
    return json.dumps(found).encode("utf-8", "surrogatepass")

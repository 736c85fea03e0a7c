# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an option cannot mean is refused by its name; what it can mean passes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import LIMITS, check_options, duration

NAME = {"type": "str"}
PATH = {"type": "path"}
SIZE = {"type": "bytes"}
SPEC: dict[str, Any] = {
    "vm": NAME,
    "untyped": {},
    "names": {"type": "list", "elements": "str"},
    "paths": {"type": "list", "elements": "path"},
    "results": {"type": "list", "elements": "dict"},
    "directory": PATH,
    "plan": {"type": "dict"},
    "disks": {
        "type": "list",
        "elements": "dict",
        "options": {"name": NAME, "target": PATH, "speed": {"type": "bytes"}},
    },
    "boot": {"type": "dict", "options": {"tmpdir": PATH}},
    "boot_pattern": NAME,
    "speed": SIZE,
    "slice": {"type": "float"},
}


@pytest.mark.parametrize(
    "given",
    [
        {"vm": "web 01\u00e4", "names": None, "directory": None},
        {"vm": os.fsdecode(b"\xff"), "names": ["a", "b"], "directory": "/"},
        {"directory": "/" + "n" * 255, "paths": ["/a", "/b/../c"]},
        {"paths": [], "results": [], "plan": {}},
        # What other modules have returned is theirs to check.
        {"plan": {"vms": [""], "text": "\n"}, "results": [{"error": "two\nlines"}]},
        {"boot_pattern": "a\nb"},
        {"speed": 0, "slice": 0.5},
        {"speed": (1 << 63) - 1},
        {"disks": [{"name": "d", "target": "/d", "speed": None}], "boot": {}},
    ],
)
def test_what_can_be_meant(given: dict[str, Any]) -> None:
    check_options(SPEC, given)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("vm", {"vm": ""}),
        ("untyped", {"untyped": ""}),
        ("untyped", {"untyped": "a\nb"}),
        ("untyped", {"untyped": "a\x9bb"}),
        ("vm", {"vm": "a\0"}),
        ("vm", {"vm": "\ud800"}),
        ("names", {"names": []}),
        ("names", {"names": ["a", ""]}),
        ("name", {"disks": [{"name": "a\x7f"}]}),
        ("directory", {"directory": "a"}),
        ("directory", {"directory": "~a"}),
        ("directory", {"directory": "/" + "\u00e4" * 128}),
        ("directory", {"directory": "/a" * 2048}),
        ("paths", {"paths": ["/a", "b"]}),
        ("disks", {"disks": []}),
        ("name", {"disks": [{"name": "d"}, {"name": ""}]}),
        ("target", {"disks": [{"target": "d"}]}),
        ("speed", {"disks": [{"speed": -1}]}),
        ("tmpdir", {"boot": {"tmpdir": "t"}}),
        ("speed", {"speed": 1 << 63}),
        ("speed", {"speed": -1}),
        *(("slice", {"slice": float(value)}) for value in ("nan", "inf", "-inf", "-0.1")),
    ],
)
def test_what_cannot_be_meant(option: str, given: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        check_options(SPEC, given)
    assert refused.value.option == option
    assert str(refused.value).startswith(f"{option}: ")
    # It is printed as it is.
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("option", LIMITS)
def test_limits(option: str) -> None:
    least, most, _what = LIMITS[option]
    spec = {option: {"type": "int"}}
    for value in (least, most):
        check_options(spec, {option: value})
    for value in (least - 1, most + 1, float("nan"), float("inf")):
        with pytest.raises(Refused, match=f"^{option}: .* is not from {least} to {most}"):
            check_options(spec, {option: value})


@pytest.mark.parametrize(
    ("text", "found"), [("0", 0), ("90", 90), ("1.5h", 5400), ("10m", 600), ("3650d", 3650 * 86400)]
)
def test_durations(text: str, found: float) -> None:
    assert duration("timeout", text) == found


@pytest.mark.parametrize(
    "text", ["", "-1", "nan", "inf", "1e3", "10 m", "\u0661", "3650.1d", "9" * 400, "9" * 30 + "d"]
)
def test_no_durations(text: str) -> None:
    with pytest.raises(Refused, match=r"^timeout: "):
        duration("timeout", text)

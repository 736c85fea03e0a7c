# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What others have named steers no terminal, and hides nothing."""

from __future__ import annotations

import sys
import unicodedata
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused, in_words
from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import (
    printable,
    printable_lines,
    printable_result,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web01", "web01"),
        ("Größe 日本語 🙂 \u0645\u0631\u062d\u0628\u0627", "Größe 日本語 🙂 \u0645\u0631\u062d\u0628\u0627"),
        # These belong to the writing of some languages.
        ("a\u200cb\u200dc", "a\u200cb\u200dc"),
        ("a\\nb <removed>", "a\\nb <removed>"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\x7f\x80\x9b31m", r"\x7f\x80\x9b31m"),
        ("\u202eexe.txt\u202c", r"\u202eexe.txt\u202c"),
        ("\u2066a\u2069\u200e\u200f\u061c", r"\u2066a\u2069\u200e\u200f\u061c"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\ud800 \udcff", r"\ud800 \udcff"),
        ("\u200b\u2060\ufeff\u00ad", r"\u200b\u2060\ufeff\xad"),
        ("\ufffe\uffff\ufff9", r"\ufffe\uffff\ufff9"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_one_line(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()


def test_every_character() -> None:
    """What Unicode calls a control, a surrogate, or another end of a line is an escape, and no letter is."""
    kept = set()
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        kind = unicodedata.category(character)
        if printable(character) != character:
            assert kind in ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn"), hex(number)
        elif kind in ("Cc", "Cs", "Zl", "Zp"):
            raise AssertionError(hex(number))
        elif kind == "Cf":
            kept.add(character)
    assert {"\u200c", "\u200d"} <= kept
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not any(unicodedata.bidirectional(one) in turns for one in kept)


def test_lines_stay_lines() -> None:
    assert printable_lines("a\x1b\nb\r\n") == "a\\x1b\nb\\r\n"


def test_a_result() -> None:
    odd = "a\n\x1b"
    found: dict[str, Any] = {
        "msg": odd,
        "text": [odd],
        "diff": {"before": odd, "after": [odd, 1]},
        "vms": [{"name": odd, "error": odd, "warnings": (odd,), "bytes": 7, "agent": None, "path": odd}],
        "sets": [{"broken": odd}, {"broken": ""}],
        "leftovers": [{"path": odd, "what": odd}],
        "changed": True,
    }
    told = "a\n\\x1b"
    line = r"a\n\x1b"
    assert printable_result(found) == {
        "msg": told,
        "text": [line],
        "diff": {"before": told, "after": [told, 1]},
        # What is compared stays as it is.
        "vms": [{"name": odd, "error": line, "warnings": [told], "bytes": 7, "agent": None, "path": odd}],
        "sets": [{"broken": line}, {"broken": ""}],
        "leftovers": [{"path": odd, "what": line}],
        "changed": True,
    }


def test_every_error_is_one_line() -> None:
    assert str(BackupError("VM a\nFAILED  all: x\x1b]0;")) == r"VM a\nFAILED  all: x\x1b]0;"
    assert str(Refused("device", "VM \u202ea has none")) == r"device: VM \u202ea has none"
    assert in_words(FileNotFoundError(2, "No such file", "/x\ny")) == r"/x\ny: No such file"

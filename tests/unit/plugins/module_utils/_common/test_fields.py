# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What documents are made of is read by its rules, however many of them are read."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import (
    NAME,
    SIZE,
    TEXT,
    DocumentError,
    Names,
    Part,
    Text,
    holds,
    load,
)


@dataclass(frozen=True)
class Owner:
    name: str = field(metadata=NAME)
    kind: str = field(metadata=holds(Text("a kind", pattern="[a-z]{1,8}")))
    told: str = field(default="", metadata=TEXT)


@dataclass(frozen=True)
class Thing:
    name: str = field(metadata=NAME)
    size: int = field(metadata=SIZE)
    notes: dict[str, str] = field(default_factory=dict, metadata=holds(Names()))

    def fault(self) -> str:
        return "it has no size" if self.size == 0 else ""


OWNER = {"name": "hv1", "kind": "host", "told": ""}
THING: dict[str, Any] = {"name": "a", "size": 1, "notes": {}}


class TestLoad:
    @pytest.mark.parametrize("raw", [b'{"a": 1}', b' \t\r\n{"a":\n1} \t\r\n'])
    def test_blanks_are_no_matter(self, raw: bytes) -> None:
        assert load(raw) == {"a": 1}

    @pytest.mark.parametrize(
        "raw",
        [b"", b" \n", b"{} {}", b"{}x", b"{}\0", b"\x0b{}", b"{}\x0c", b"\xef\xbb\xbf{}", "\u00a0{}".encode(), b"{"],
    )
    def test_anything_else_around_it(self, raw: bytes) -> None:
        with pytest.raises(DocumentError, match="it is not JSON"):
            load(raw)

    @pytest.mark.parametrize("escape", [r"\u0000", r"\ud800", r"\"\u0000", r"\\\ud800"])
    @pytest.mark.parametrize("place", ['{"a": "%s"}', '{"%s": 1}', '{"a": [{"b": "%s"}]}'])
    def test_what_is_no_text(self, place: str, escape: str) -> None:
        with pytest.raises(DocumentError):
            load((place % escape).encode())

    @pytest.mark.parametrize("escape", [r"\n", r"\"", r"\\u0000", r"\u00e4", r"\ud83d\ude42"])
    def test_other_escapes(self, escape: str) -> None:
        assert load(f'["{escape}"]'.encode())


class TestPart:
    def test_a_later_one_is_read_anew(self) -> None:
        part = Part(Owner)
        first = part.read(OWNER)
        assert part.read({**OWNER}) == first == Owner("hv1", "host")
        assert part.read({**OWNER, "name": "hv2"}) == Owner("hv2", "host")
        assert part.read({"name": "hv2", "kind": "host"}) == Owner("hv2", "host")
        assert part.read(OWNER) == first

    def test_what_was_read_stays_as_it_was(self) -> None:
        part = Part(Owner)
        given = dict(OWNER)
        first = part.read(given)
        given["name"] = "hv2"
        assert part.read(given) == Owner("hv2", "host")
        assert first == Owner("hv1", "host")
        with pytest.raises(FrozenInstanceError):
            first.name = "hv3"

    @pytest.mark.parametrize("wrong", [{"name": 1}, {"name": ""}, {"kind": "Host"}, {"told": None}, {"told": ["a"]}])
    def test_a_wrong_one_after_a_good_one(self, wrong: dict[str, Any]) -> None:
        part = Part(Owner)
        for _time in range(2):
            part.read(OWNER)
            with pytest.raises(DocumentError, match=next(iter(wrong))):
                part.read({**OWNER, **wrong})

    def test_true_is_no_number_after_one(self) -> None:
        part = Part(Thing)
        for _time in range(2):
            assert part.read(THING).size == 1
            with pytest.raises(DocumentError, match="size: True is not a whole number"):
                part.read({**THING, "size": True})

    def test_what_is_not_known_is_left_out(self) -> None:
        deep: Any = "a"
        for _level in range(900):
            deep = [deep]
        for part, content in ((Part(Owner), OWNER), (Part(Thing), THING)):
            for _time in range(2):
                assert vars(part.read({**content, "later": deep})) == content

    def test_defaults_and_what_is_missing(self) -> None:
        part = Part(Thing)
        assert part.read({"name": "a", "size": 2}) == Thing("a", 2)
        with pytest.raises(DocumentError, match="name: it is missing"):
            part.read({"size": 2})
        with pytest.raises(DocumentError, match="it has no size"):
            part.read({"name": "a", "size": 0})

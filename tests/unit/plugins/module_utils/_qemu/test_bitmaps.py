# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bitmaps: the actions of a transaction, and how they are removed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import CommandError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.bitmaps import (
    bitmap_add,
    bitmap_merge,
    remove_bitmaps,
)
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    Node,
    bitmap_entry,
    monitor,
    refusal,
)


class TestBitmaps:
    """The bitmaps C(b0) and C(b1) are there, on node C(n0)."""

    @staticmethod
    def remove(fake: FakeMonitor, *bitmaps: tuple[str, str]) -> list[Any]:
        """Remove these bitmaps; returns what was sent."""
        there = Node("n0", bitmaps=[bitmap_entry("b0"), bitmap_entry("b1"), {"count": 0}])
        fake.answers["query-named-block-nodes"] = [there.query(), Node("n1").query()]
        asyncio.run(remove_bitmaps(monitor(fake), bitmaps))
        return fake.sent

    def test_added(self) -> None:
        assert bitmap_add("n0", "b0", False) == {
            "type": "block-dirty-bitmap-add",
            "data": {"node": "n0", "name": "b0", "persistent": False},
        }

    def test_none(self) -> None:
        assert self.remove(FakeMonitor()) == []

    def test_one(self) -> None:
        sent = self.remove(FakeMonitor({"block-dirty-bitmap-remove": {}}), ("n0", "b0"))
        assert sent == [("block-dirty-bitmap-remove", {"node": "n0", "name": "b0"})]

    def test_several_in_one_transaction(self) -> None:
        ((command, arguments),) = self.remove(FakeMonitor({"transaction": {}}), ("n0", "b0"), ("n1", "b1"))
        assert command == "transaction"
        assert arguments["actions"] == [
            {"type": "block-dirty-bitmap-remove", "data": {"node": "n0", "name": "b0"}},
            {"type": "block-dirty-bitmap-remove", "data": {"node": "n1", "name": "b1"}},
        ]

    @pytest.mark.parametrize("gone", [("n0", "b2"), ("n1", "b0"), ("n2", "b0")])
    def test_one_that_is_gone_is_none_to_remove(self, gone: tuple[str, str]) -> None:
        fake = FakeMonitor(
            {"transaction": refusal(), "block-dirty-bitmap-remove": iter([{}, refusal("not found"), {}])}
        )
        sent = self.remove(fake, ("n0", "b0"), gone, ("n0", "b1"))
        tried = [tuple(arguments.values()) for command, arguments in sent if command == "block-dirty-bitmap-remove"]
        assert tried == [("n0", "b0"), gone, ("n0", "b1")]

    def test_one_that_stays_is_told_when_the_others_are_gone(self) -> None:
        answers = iter([refusal("'b0' is currently in use"), {}])
        fake = FakeMonitor({"transaction": refusal(), "block-dirty-bitmap-remove": answers})
        with pytest.raises(CommandError, match="'b0' is currently in use"):
            self.remove(fake, ("n0", "b0"), ("n0", "b1"))
        assert next(answers, None) is None

    def test_merged_with_those_of_the_layers(self) -> None:
        assert bitmap_merge("n0", "all", "b0", ["n1", "n2"]) == {
            "type": "block-dirty-bitmap-merge",
            "data": {
                "node": "n0",
                "target": "all",
                "bitmaps": ["b0", {"node": "n1", "name": "b0"}, {"node": "n2", "name": "b0"}],
            },
        }

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs that are chosen by their names, and by patterns of them."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.selection import EVERYTHING, Selection

KNOWN = ["db01", "web01", "web02", "web[1]"]


@pytest.mark.parametrize(
    ("names", "excluded", "chosen"),
    [
        (None, (), KNOWN),
        (None, ("web*",), ["db01"]),
        (None, ("nosuch",), KNOWN),
        (("web*",), (), ["web01", "web02", "web[1]"]),
        (("web*",), ("web02",), ["web01", "web[1]"]),
        (("web[1]",), (), ["web[1]"]),
        (("web0[12]", "web01"), (), ["web01", "web02"]),
        (("db01",), ("db01",), []),
        (("WEB01",), (), ["WEB01"]),
        (("nosuch*", "web01"), (), ["nosuch*", "web01"]),
        ((), (), []),
    ],
)
def test_chosen(names: tuple[str, ...] | None, excluded: tuple[str, ...], chosen: list[str]) -> None:
    selection = Selection(names, excluded)
    assert selection.spelled_out(lambda: KNOWN) == chosen
    assert [name for name in KNOWN if selection.takes(name)] == [name for name in KNOWN if name in chosen]


def test_what_stands_for_no_vm() -> None:
    assert Selection(("web*", "db1", "x?", "db1"), ("nosuch",)).unknown(KNOWN) == ["db1", "x?"]
    assert EVERYTHING.unknown(KNOWN) == []


def test_names_that_are_whole_need_no_list() -> None:
    def known() -> list[str]:
        raise AssertionError("the repository was searched")

    assert Selection(("web01", "web01"), ()).spelled_out(known) == ["web01"]


def test_options_of_a_module() -> None:
    assert Selection.of({"names": None, "exclude_names": None}) == EVERYTHING
    assert Selection.of({"names": [], "exclude_names": ["a*"]}) == Selection((), ("a*",))

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The words of closed lists are as good as the strings that they stand for."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import Word


class Colour(Word):
    """What a lamp shows."""

    RED = "red"
    GREEN = "green"


def test_a_word_is_printed_as_it_is_written() -> None:
    assert f"{Colour.RED} {Colour.RED!s} {Colour.RED!r}" == "red red 'red'"
    assert f"%s, {Colour.RED}" % Colour.GREEN == "green, red"
    assert ", ".join(Colour) == "red, green"
    assert repr({Colour.RED: [Colour.GREEN]}) == "{'red': ['green']}"


def test_a_word_is_its_string() -> None:
    assert Colour.RED == "red"
    assert {"red": 1}[Colour.RED] == {Colour.RED: 1}["red"] == 1
    assert "red" in set(Colour)
    assert json.dumps({Colour.RED: Colour.GREEN}) == '{"red": "green"}'
    assert pickle.loads(pickle.dumps(Colour.RED)) is copy.deepcopy(Colour.RED) is Colour.RED


@pytest.mark.parametrize("unknown", ["blue", "", None, 1, ["red"], {}])
def test_what_is_none_is_read_as_it_is(unknown: object) -> None:
    assert Colour.read(unknown) is unknown
    assert Colour.read("red") is Colour.RED
    with pytest.raises(ValueError, match="is not a valid"):
        Colour(unknown)

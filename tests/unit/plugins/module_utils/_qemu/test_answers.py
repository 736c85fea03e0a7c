# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An answer is what QEMU would say, or is refused with the place where it is not."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import MonitorError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import connection, graph, qmp_client
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import monitor as qemu_monitor
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.answers import (
    ANSWERS,
    Odd,
    check_answer,
    flag,
    listed,
    positive,
    record,
    size,
    text,
)
from ansible_collections.vmfleet.backup.plugins.modules import vm_info
from ansible_collections.vmfleet.backup.tests.harness.liars import ODD, VERSIONS, Liar, recorded

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.answers import Check


@pytest.mark.parametrize("version", VERSIONS)
def test_what_qemu_has_answered_is_right(version: str) -> None:
    answers = {question: answer for question, answer in recorded(version).items() if question != "greeting"}
    for question, answer in answers.items():
        check_answer(question.partition(" ")[0], answer)
    # Its "add-fd" is the only one that changes something.
    assert {question.partition(" ")[0] for question in answers} == ANSWERS.keys() - {"add-fd"}


@pytest.mark.parametrize(
    ("check", "found", "reason"),
    [
        pytest.param(text, 7, "it is no text", id="number"),
        pytest.param(text, None, "it is no text", id="null"),
        pytest.param(text, "a\ud800", "it is no text in Unicode", id="half a character"),
        pytest.param(text, "a\0", "it has a zero in its text", id="zero"),
        pytest.param(flag, 1, "it is neither true nor false", id="1 for true"),
        pytest.param(size, True, "it is no size or number", id="true for 1"),
        pytest.param(size, -1, "it is no size or number", id="negative"),
        pytest.param(size, 1 << 63, "it is no size or number", id="too large"),
        pytest.param(size, 1.0, "it is no size or number", id="fraction"),
        pytest.param(positive, 0, "it is 0", id="zero of what cannot be zero"),
        pytest.param(listed(size), {}, "it is no list", id="object for a list"),
        pytest.param(listed(size), [1, None], "[1] is no size or number", id="entry"),
        pytest.param(record({"a": size}), [], "it is no object", id="list for an object"),
        pytest.param(record({"a": size}), {}, "a is missing", id="missing"),
        pytest.param(record({}, {"a": size}), {"a": None}, "a is no size or number", id="optional"),
        pytest.param(
            listed(record({"a": listed(record({"b-c": text}))})),
            [{"a": [{"b-c": "x"}, {"b-c": 1}]}],
            "[0].a[1].b-c is no text",
            id="deep",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(check: Check, found: Any, reason: str) -> None:
    with pytest.raises(Odd) as odd:
        check(found)
    assert str(odd.value) == reason


@pytest.mark.parametrize(
    ("check", "found"),
    [
        (text, "näme\n\u202e"),
        (size, 0),
        (size, (1 << 63) - 1),
        (positive, 1),
        (listed(size), []),
        (record({}, {"a": size}), {"others": None}),
    ],
)
def test_what_is_right(check: Check, found: Any) -> None:
    check(found)


def test_a_command_whose_answer_nobody_reads() -> None:
    check_answer("cont", ["anything"])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs of a moment, and other limits that are met soon."""
    monkeypatch.setattr(qmp_client, "COMMAND_TIMEOUT", 1.5)
    monkeypatch.setattr(qemu_monitor, "LOOK_TIMEOUT", 20.0)
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 1.5)
    monkeypatch.setattr(graph, "MOST_LAYERS", 1 << 16)


def describe(*paths: Path) -> list[dict[str, Any]]:
    """What vm_info tells of these monitors."""

    async def run() -> list[dict[str, Any]]:
        places = asyncio.Semaphore(len(paths))
        addresses = [vm_info.parse_address(str(path)) for path in paths]
        return list(await asyncio.gather(*(vm_info.describe(address, places, warnings) for address in addresses)))

    warnings: list[str] = []
    found = asyncio.run(run())
    assert warnings == []
    return found


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", ODD)
def test_one_odd_answer_costs_one_vm(tmp_path: Path, what: str) -> None:
    with Liar(tmp_path / "odd.qmp", ODD[what]) as odd, Liar(tmp_path / "good.qmp") as good:
        told, healthy = describe(odd.path, good.path)
    assert [disk["name"] for disk in healthy["disks"]] == ["drive0", "vd1"]
    assert bool(told["error"]) is not ODD[what].served, told
    assert not told["error"] or told["error"].startswith(f"unix:{odd.path}: ")
    assert len(told["error"]) < 600
    # It can be told as it is.
    json.dumps(told, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.usefixtures("impatient")
def test_many_slow_answers_have_one_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_monitor, "LOOK_TIMEOUT", 0.2)
    with Liar(tmp_path / "odd.qmp", ODD["no answer"]) as odd:
        [told] = describe(odd.path)
    assert told["error"].endswith("QEMU did not answer all questions within 0.2 s: it answers too slowly")


def test_a_message_names_the_place() -> None:
    async def run() -> None:
        raise qemu_monitor.Monitor(vm_info.parse_address("/x")).senseless("query-name", "name is no text")

    with pytest.raises(MonitorError, match="unix:/x: the answer to query-name makes no sense: name is no text"):
        asyncio.run(run())

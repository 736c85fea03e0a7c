# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever stands in a file: it is read as a document in which every value is fit for use, or refused in words."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import DocumentError, load
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import parse_time
from ansible_collections.vmfleet.backup.plugins.module_utils._report.record import parse_report
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import collect
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.description import parse_description
from ansible_collections.vmfleet.backup.tests.harness.fuzzing import as_bytes, changed, damaged, examples
from ansible_collections.vmfleet.backup.tests.harness.reports import ID, NOW, a_vm, of_a_fleet, told
from ansible_collections.vmfleet.backup.tests.unit import test_schemas as honest
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENTS: tuple[Any, ...] = (
    honest.MANIFEST,
    honest.INTENT,
    honest.FAILURE,
    honest.PROTECTION,
    honest.PIN,
    honest.VERIFICATION,
    honest.CONSOLIDATION,
    honest.RESTORATION,
    builders.record(),
)
NAMES = frozenset({"id", "image", "attempt", "job", "bitmap"})
"""What becomes a part of a path, or is told to QEMU."""
TIMES = frozenset({"started", "finished", "ended", "since", "when"})


def plain(document: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(document)))
    return found


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What is read; None where it is refused, in words that can be shown."""
    try:
        return read()
    except DocumentError as error:
        told = str(error)
    assert told.isprintable()
    return None


def assert_fit(found: Any, name: str = "") -> None:
    """Every value can be used as what it is: as a file name, a time, a size."""
    if isinstance(found, dict):
        for key, below in found.items():
            assert_fit(below, key)
    elif isinstance(found, (list, tuple)):
        for below in found:
            assert_fit(below, name)
    elif isinstance(found, str):
        assert b"\0" not in os.fsencode(found)
        assert not (name in NAMES and ("/" in found or ".." in found or "\n" in found))
        if name in TIMES and found:
            parse_time(found).timestamp()
    elif found is not None:
        assert 0 <= found < 2**64


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
@examples(10)
@given(data=st.data())
def test_documents(document: Any, data: st.DataObject) -> None:
    kind = type(document)
    content = data.draw(damaged(plain(document)))
    read = read_or_refused(lambda: kind.parse(load(content)))
    if read:
        assert_fit(asdict(read))
        # What is read can be written, and read again.
        assert kind.parse(load(as_bytes(plain(read)))) == read


@examples(20)
@given(data=st.data())
def test_descriptions(data: st.DataObject) -> None:
    content = data.draw(damaged(honest.describe()))
    assert_fit(read_or_refused(lambda: parse_description(content)))


@examples(20)
@given(data=st.data())
def test_reports(data: st.DataObject) -> None:
    content = data.draw(damaged(of_a_fleet(2, 2)))
    assert_fit(read_or_refused(lambda: parse_report(load(content))))


@examples(20)
@given(record=changed(told(a_vm(), a_vm("db01", set=None, last=None))))
def test_records_of_hypervisors(record: dict[str, Any]) -> None:
    found = collect(ID, NOW, {"hv1": told(a_vm()), "hv2": record}, {}, [], None)
    assert found["hypervisors"][0]["state"] == "reported"
    assert found["summary"]["published"] >= 1

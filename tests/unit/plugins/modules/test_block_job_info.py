# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""block_job_info: which jobs are listed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.modules import block_job_info
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, block_job, jobs

ENTRIES = [block_job("a", offset=SIZE // 2), block_job("b", type="mirror"), block_job("c")]


@pytest.mark.parametrize(
    ("params", "listed"),
    [
        ({}, ["a", "b", "c"]),
        ({"type": "backup"}, ["a", "c"]),
        ({"type": "stream"}, []),
        ({"job_id": "b"}, ["b"]),
        ({"job_id": "b", "type": "backup"}, []),
    ],
)
def test_filters(params: dict[str, Any], listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMonitor(jobs(*ENTRIES))
    monkeypatch.setattr(block_job_info, "Monitor", lambda _address: fake)
    given = {"monitor": "/run/qemu/web01.qmp", "libvirt_uri": "", "type": None, "job_id": None, **params}
    result = asyncio.run(block_job_info.main_task(SimpleNamespace(params=given)))  # type: ignore[arg-type]
    assert not result["changed"]
    assert [job["id"] for job in result["jobs"]] == listed
    assert not fake.commands
    if "a" in listed:
        assert result["jobs"][0]["percent"] == 50.0

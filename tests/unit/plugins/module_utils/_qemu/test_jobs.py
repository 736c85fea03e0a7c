# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The jobs of a VM, of which QEMU has two lists."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.jobs import merge_jobs, query_jobs
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, block_job, general_job, monitor

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job


@pytest.mark.parametrize(
    ("block_jobs", "general", "expected"),
    [
        pytest.param(
            [block_job(speed=5, paused=True, **{"io-status": "nospace"})],
            [general_job(status="paused")],
            [job("j0", "paused", offset=MIB, len=SIZE, speed=5, paused=True, io_status="nospace")],
            id="both",
        ),
        pytest.param(
            [block_job()],
            [general_job(status="concluded", error="Input/output error")],
            [job("j0", "concluded", offset=MIB, len=SIZE, error="Input/output error")],
            id="ended between the two",
        ),
        pytest.param(
            [block_job(status="concluded", error="Operation canceled")],
            [],
            [job("j0", "concluded", offset=MIB, len=SIZE, error="Operation canceled")],
            id="dismissed between the two",
        ),
        pytest.param([], [general_job("create0", type="create")], [], id="not a block job"),
        pytest.param(
            [block_job("j1"), block_job("j0", status="standby")],
            [general_job("j0", status="standby"), general_job("j1")],
            [job("j1", offset=MIB, len=SIZE), job("j0", "standby", offset=MIB, len=SIZE)],
            id="each with its own",
        ),
    ],
)
def test_jobs_of_both_lists_are_merged(
    block_jobs: list[dict[str, Any]], general: list[dict[str, Any]], expected: list[Job]
) -> None:
    assert merge_jobs(block_jobs, general) == tuple(expected)
    fake = FakeMonitor({"query-block-jobs": block_jobs, "query-jobs": general})
    assert asyncio.run(query_jobs(monitor(fake))) == tuple(expected)

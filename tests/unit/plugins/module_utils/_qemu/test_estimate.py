# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How large an image can become."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import ToolError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import estimate, qemu_img
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE, bitmap, disk

METADATA = 16 * 65536 + SIZE // 65536 * 8
FULLY = SIZE + METADATA + SIZE // 65536 * 16
"""What the largest qcow2 image of a 16 MiB disk takes."""


class TestExpectedBytes:
    @pytest.fixture(autouse=True)
    def measure(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """What qemu-img measures; nothing where it cannot."""
        answer: dict[str, int] = {}

        async def run_json(command: list[str]) -> dict[str, int]:
            assert command == qemu_img.measure_command("/images/web01.qcow2", "qcow2", "qcow2")
            if not answer:
                raise ToolError("qemu-img measure: Could not open")
            return answer

        monkeypatch.setattr(qemu_img, "run_json", run_json)
        return answer

    @pytest.mark.parametrize(
        ("required", "held", "expected"),
        [
            # What is measured has the tables in it.
            (5 * MIB, 3 * MIB, 5 * MIB + 5 * MIB // 100 + 16 * 65536),
            (3 * MIB, 5 * MIB, 5 * MIB + 5 * MIB // 100 + METADATA),
            (None, 5 * MIB, 5 * MIB + 5 * MIB // 100 + METADATA),
            (SIZE, 5 * MIB, 17 * MIB),
            (3 * MIB, 40 * MIB, 17 * MIB),
            (None, 40 * MIB, FULLY),
            (3 * MIB, None, FULLY),
            (None, None, FULLY),
            (0, 0, METADATA),
        ],
    )
    def test_full(self, required: int | None, held: int | None, expected: int, measure: dict[str, int]) -> None:
        if required is not None:
            measure.update({"required": required, "fully-allocated": 17 * MIB})
        assert asyncio.run(estimate.expected_bytes(disk(actual_size=held), "qcow2")) == expected

    @pytest.mark.parametrize(
        ("layer", "expected"), [(MIB, MIB + MIB // 100 + METADATA), (40 * MIB, FULLY), (None, FULLY)]
    )
    def test_top(self, layer: int | None, expected: int, measure: dict[str, int]) -> None:
        measure.update({"required": 9 * MIB, "fully-allocated": 17 * MIB})
        of_two = disk(layer_size=layer, actual_size=9 * MIB)
        assert asyncio.run(estimate.expected_bytes(of_two, "qcow2", "top")) == expected

    @pytest.mark.parametrize("sync", ["incremental", "bitmap"])
    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            # Its clusters, their entries, and the tables of both the data's size and the disk's.
            (2 * 65536, 2 * 65536 + 2 * 16 + 16 * 65536 + 2 * 8 + METADATA),
            (0, 2 * 16 * 65536),
            (SIZE, FULLY),
        ],
    )
    def test_increment(self, sync: str, count: int, expected: int) -> None:
        tracked = disk(actual_size=9 * MIB, bitmaps=(bitmap("b0", count=count),))
        assert asyncio.run(estimate.expected_bytes(tracked, "qcow2", sync, "b0")) == expected

    def test_increment_of_a_large_thin_disk_has_few_tables(self) -> None:
        large = replace(disk(bitmaps=(bitmap("b0", count=3 * 65536),)), virtual_size=64 << 40)
        expected = asyncio.run(estimate.expected_bytes(large, "qcow2", "bitmap", "b0"))
        # The first table alone has a MiB.
        assert MIB < expected < 5 * MIB

    def test_tables_of_a_large_thin_disk_are_counted_once(self, measure: dict[str, int]) -> None:
        # As qemu-img measures a disk of 1 TiB with 64 MiB of data; QEMU's image of it takes 201,588,736 bytes.
        measure.update({"required": 237_240_320, "fully-allocated": 1_099_679_662_080})
        large = replace(disk(actual_size=64 * MIB), virtual_size=1 << 40)
        assert 201_588_736 < asyncio.run(estimate.expected_bytes(large, "qcow2")) < 250_000_000

    @pytest.mark.parametrize(
        ("counted", "held", "expected"),
        [
            (3 * MIB, 5 * MIB, 5 * MIB + 5 * MIB // 100 + METADATA),
            (5 * MIB, 5 * MIB, 5 * MIB + 5 * MIB // 100 + METADATA),
            (3 * MIB, 40 * MIB, FULLY),
            # Compressed, or with holes that the file system makes: qemu-img tells what is in there.
            (5 * MIB + 65536, 5 * MIB, 9 * MIB + 9 * MIB // 100 + 16 * 65536),
            (None, 5 * MIB, 9 * MIB + 9 * MIB // 100 + 16 * 65536),
            (3 * MIB, None, FULLY),
        ],
    )
    def test_full_of_known_layers(
        self,
        counted: int | None,
        held: int | None,
        expected: int,
        measure: dict[str, int],
    ) -> None:
        measure.update({"required": 9 * MIB, "fully-allocated": 17 * MIB})
        assert asyncio.run(estimate.expected_bytes(disk(actual_size=held), "qcow2", counted=counted)) == expected

    def test_full_that_clears_a_bitmap_is_a_full(self) -> None:
        tracked = disk(actual_size=9 * MIB, bitmaps=(bitmap("b0", count=0),))
        assert asyncio.run(estimate.expected_bytes(tracked, "qcow2", "full", "b0")) > 9 * MIB

    def test_raw_is_written_whole(self) -> None:
        assert asyncio.run(estimate.expected_bytes(disk(actual_size=MIB), "raw")) == SIZE

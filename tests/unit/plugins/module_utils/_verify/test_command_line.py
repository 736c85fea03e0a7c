# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""QEMU's command lines as options with their properties."""

from __future__ import annotations

import json

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._verify.command_line import pairs, properties


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["qemu", "disk.img", "-S", "-m", "1G", "more.img"], [("-S", ""), ("-m", "1G")]),
        (["--enable-kvm", "-M", "q35"], [("-accel", ""), ("-machine", "q35")]),
    ],
)
def test_pairs(arguments: list[str], expected: list[tuple[str, str]]) -> None:
    assert pairs(arguments) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("q35,smm,kernel-irqchip=on", {"type": "q35", "smm": "on", "kernel-irqchip": "on"}),
        ("type=q35", {"type": "q35"}),
        (json.dumps({"driver": "nvme", "bootindex": 1}), {"driver": "nvme", "bootindex": "1"}),
        ("{'driver': 'nvme'}", {}),
        ("", {}),
    ],
)
def test_properties(value: str, expected: dict[str, str]) -> None:
    assert properties(value, "type") == expected

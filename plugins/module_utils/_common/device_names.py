# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the devices of disks as QEMU does: a disk is the same one under each of its names that lasts."""

from __future__ import annotations

import re

PERIPHERAL = "/machine/peripheral/"
ON_BOARD = re.compile(r"/machine/system\.flash[0-9]")
"""Devices without an id whose path is the same at each start: the flash chips of a machine."""
FLASH = re.compile(r"/machine/[^/]*\bflash\d+")
"""The flash chips of a VM's firmware, such as C(/machine/system.flash0)."""


def qdev_id(qdev: str) -> str:
    """Return C(vd0) of C(/machine/peripheral/vd0/virtio-backend); empty for devices without an id of their own.

    QEMU tells IDE and SCSI disks by their bare id, virtio disks by a path.
    """
    if qdev.startswith(PERIPHERAL):
        return qdev[len(PERIPHERAL) :].partition("/")[0]
    return "" if qdev.startswith("/") else qdev


def lasting_names(name: str, qdev: str) -> tuple[str, ...]:
    """Return the names by which a disk is known in sets, its own first.

    Which one is its own depends on how its VM is reached: libvirt has names for disks that QEMU does not know. The
    device is the same.
    """
    device = qdev if ON_BOARD.fullmatch(qdev) else qdev_id(qdev)
    return (name, device) if device and device != name else (name,)

# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Warn of full copies that a limit of speed makes last much longer than what they write would."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.formats import human
from .._repository.documents import Level

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .._qemu.model import Disk
    from .disks import ChainLink


LONG = 3600.0
"""Seconds of a copy that nobody has to be told of."""


def speed_warnings(
    disks: Iterable[Disk], links: Iterable[ChainLink], expected: Mapping[str, int], speed: int
) -> Iterator[str]:
    """Return which disks are copied in full for long, because QEMU counts their holes, too.

    C(expected) is what each image will take, and C(speed) the limit in bytes per second, 0 for none.
    """
    for disk, link in zip(disks, links):
        seconds = disk.virtual_size / speed if speed and link.level == Level.FULL else 0.0
        if seconds > LONG and disk.virtual_size > 2 * expected[disk.name]:
            yield (
                f"disk {disk.name} of {human(disk.virtual_size)} takes {seconds / 3600:.1f} h to copy at"
                f" {human(speed)} per second (speed), though about {human(expected[disk.name])} are written: QEMU"
                " counts holes like data. Give a higher speed for full copies"
            )

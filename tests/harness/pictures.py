# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the pictures of the guides: pages of made-up runs, as Chromium shows them."""

from __future__ import annotations

import math
import struct
import sys
import tempfile
import typing as t
import zlib
from collections import Counter
from pathlib import Path

from ansible_collections.vmfleet.backup.plugins.module_utils._report.html import page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run
from ansible_collections.vmfleet.backup.tests.harness.browser import Browser, Picture
from ansible_collections.vmfleet.backup.tests.harness.reports import ID, MIB, a_set, a_vm, failed, report, told

DESKTOP, PHONE = (1100, 1100), (390, 844)
COLOURS = 128
LICENCE = b"Copyright (c) 2026, vmfleet contributors. SPDX-License-Identifier: GPL-3.0-or-later"


def a_night() -> dict[str, t.Any]:
    """Return the report of a night in which five VMs of forty failed for two reasons."""
    full = "disk vda: /srv/backup/{}/.2026-11-22.staging/vda.qcow2: No space left on device; make room there"
    hosts: dict[str, list[dict[str, t.Any]]] = {}
    for number in range(40):
        name = f"web{number:02}"
        found = a_set(duration=40.0 + number, bytes=(90 + 17 * number) * MIB, consistency="filesystem")
        vm = a_vm(name, set=found, last=found, frozen_ms=41)
        if number % 10 == 3:
            vm = failed(name, full.format(name))
        if number == 25:
            vm = failed(name, "no answer to query-block within 30 s; look whether its QEMU hangs")
        hosts.setdefault(f"hv{number % 4 + 1}.example.com", []).append(vm)
    return report(**{host: told(*vms) for host, vms in hosts.items()})


def history() -> list[Run]:
    """Return the runs of the nights before."""
    return [
        Run(
            f"2026-11-{day:02}",
            f"2026-11-{day:02}T01:30:00Z",
            40,
            2 * (day == 9),
            int((15 + 4 * math.sin(day)) * 1024 * MIB),
            88 + 20 * math.cos(2 * day),
        )
        for day in range(1, int(ID[-2:]))
    ]


def packed(picture: Picture) -> bytes:
    """Return a picture as a PNG of few colours: a quarter of the size."""
    counts = Counter(row[place : place + 3] for row in picture.rows for place in range(0, len(row), 3))
    palette = [colour for colour, _count in counts.most_common(COLOURS)]
    nearest = {colour: palette.index(min(palette, key=lambda one: math.dist(one, colour))) for colour in counts}
    rows = b"".join(
        b"\0" + bytes(nearest[row[place : place + 3]] for place in range(0, len(row), 3)) for row in picture.rows
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 8, 3, 0, 0, 0)),
        (b"PLTE", b"".join(palette)),
        (b"tEXt", b"Copyright\0" + LICENCE),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def main(directory: Path) -> None:
    found = a_night()
    with tempfile.TemporaryDirectory() as place, Browser() as browser:
        path = Path(place) / f"{ID}.html"
        path.write_text(page(found, [*history(), Run.from_report(found)]), encoding="utf-8")
        for name, size, dark in (("report", DESKTOP, False), ("report-phone", PHONE, True)):
            browser.open(path, *size, dark=dark, phone=size == PHONE)
            (directory / f"{name}.png").write_bytes(packed(Picture.decode(browser.screenshot(*size))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

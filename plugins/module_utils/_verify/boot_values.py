# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say which values of C(vm.json) a throwaway VM is given: it comes out of the repository, and may hold anything."""

from __future__ import annotations

import re

from .._common.errors import BackupError

WORD = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
PRINTABLE = r"[^\x00-\x1f\x7f-\x9f]"
TRANSPORT = r"(?:-(?:pci|device|ccw)(?:-(?:non-)?transitional)?)?"
PATTERNS = {
    "machine": WORD,
    "property of the machine": r"[A-Za-z0-9.-]{1,32}",
    # The model, and features; some of their values are names.
    "processor": rf"{WORD}(?:,[+-]?{WORD}(?:=[^,\x00-\x1f\x7f-\x9f]{{0,64}})?)*",
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "kernel command line": rf"{PRINTABLE}{{0,4096}}",
    "firmware": r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    "-global": r"(?:driver=)?(?:cfi\.pflash01|ICH9-LPC)(?:\.|,property=)[a-z0-9_-]{1,32}(?:=|,value=)[a-z0-9]{1,32}",
    "disk": rf"(?:ide|scsi)-(?:hd|cd)|virtio-blk{TRANSPORT}|nvme|usb-storage|floppy|sd-card",
    "controller": (
        rf"virtio-scsi{TRANSPORT}|lsi|lsi53c8(?:10|95a)|megasas(?:-gen2)?|mptsas1068|pvscsi|am53c974|dc390|spapr-vscsi"
        r"|(?:qemu|nec-usb)-xhci|piix[34]-usb-uhci|(?:ich9-)?usb-[eu]hci[1-6]?|pci-ohci"
    ),
    "serial": rf"{PRINTABLE}{{0,64}}",
    "property of a disk": r"[A-Za-z0-9]{1,32}",
}
"""What each kind of value looks like, as a regular expression for all of it."""
TOLD = 80
"""Characters of a value that are told."""


def checked(kind: str, value: str) -> str:
    """Return a value of this kind; BackupError where it does not look like one."""
    if not re.fullmatch(PATTERNS[kind], value):
        shown = repr(value[:TOLD]) + ("..." if len(value) > TOLD else "")
        raise BackupError(
            f"vm.json has {shown} as {kind}, and a throwaway VM cannot have that; choose another with boot_options"
        )
    return value

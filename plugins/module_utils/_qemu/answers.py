# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what QEMU's answers look like, as far as they are read, and check one: a monitor may say anything.

A check is called with what was found, and raises Odd where that is something else. Members that are not named here may
be anything.

Reference: QEMU QMP Reference Manual 7.2; what is optional there is optional here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._common.errors import MonitorError
from .._common.redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .address import Address

    Check = Callable[[Any], None]


LARGEST = (1 << 63) - 1
LONGEST_NAME = 16384
"""Characters of the longest name of a file; QEMU cuts its names off at 4096."""
QUOTE_LIMIT = 200
"""Characters of what cannot be read that a message quotes."""


class Odd(ValueError):
    """What is wrong with an answer. Its words are C(place) and C(reason)."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__("{} {}".format(place.lstrip(".") or "it", reason))
        self.reason = reason
        self.place = place

    def within(self, place: str) -> Odd:
        return Odd(self.reason, place + self.place)


def text(found: Any) -> None:
    if not isinstance(found, str):
        raise Odd("is no text")
    if not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError:
            raise Odd("is no text in Unicode") from None
    if "\0" in found:
        raise Odd("has a zero in its text")


def file_name(found: Any) -> None:
    text(found)
    if len(found) > LONGEST_NAME:
        raise Odd("is too long for the name of a file")


def flag(found: Any) -> None:
    if not isinstance(found, bool):
        raise Odd("is neither true nor false")


def size(found: Any) -> None:
    # A truth value is a number to Python.
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= LARGEST:
        raise Odd("is no size or number")


def positive(found: Any) -> None:
    size(found)
    if not found:
        raise Odd("is 0")


def listed(check: Check) -> Check:
    """Return the check of a list, of which each entry is checked."""

    def checked(found: Any) -> None:
        if not isinstance(found, list):
            raise Odd("is no list")
        for place, entry in enumerate(found):
            try:
                check(entry)
            except Odd as odd:
                raise odd.within(f"[{place}]") from None

    return checked


def record(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """Return the check of an object with these members."""
    members = [*((key, check, True) for key, check in required.items())]
    members += [(key, check, False) for key, check in (optional or {}).items()]

    def checked(found: Any) -> None:
        if not isinstance(found, dict):
            raise Odd("is no object")
        for key, check, is_required in members:
            if key in found:
                try:
                    check(found[key])
                except Odd as odd:
                    raise odd.within(f".{key}") from None
            elif is_required:
                raise Odd("is missing", f".{key}")

    return checked


_BITMAP = record(
    {"count": size, "granularity": positive, "recording": flag, "busy": flag, "persistent": flag},
    {"name": text, "inconsistent": flag},
)
_DETAILS = record({}, {"data": record({}, {"data-file": file_name, "data-file-raw": flag, "compat": text})})
_IMAGE = record(
    {"filename": file_name, "virtual-size": size},
    {
        "actual-size": size,
        "backing-filename": file_name,
        "full-backing-filename": file_name,
        "encrypted": flag,
        "snapshots": listed(record({})),
        "format-specific": _DETAILS,
    },
)
_NODE = record(
    {"node-name": text, "drv": text, "ro": flag, "file": file_name, "image": _IMAGE},
    {
        "backing_file": file_name,
        "children": listed(record({"child": text, "node-name": text})),
        "dirty-bitmaps": listed(_BITMAP),
    },
)
_JOB = {"status": text}
_TPM = record({"model": text, "options": record({"type": text, "data": record({}, {"chardev": text})})})
STATISTICS = record({}, {"node-name": text, "parent": record({}, {"node-name": text}), "backing": record({})})
"""The entry of one node in query-blockstats. That of its backing file stands within it, and is checked on its own."""
VERSION = record({"major": size, "minor": size, "micro": size})
ANSWERS = {
    "add-fd": record({"fdset-id": size}),
    "qom-get": text,
    "qom-list": listed(record({"name": text, "type": text})),
    "query-block": listed(
        record({"device": text, "removable": flag}, {"qdev": text, "inserted": record({"node-name": text})})
    ),
    "query-block-jobs": listed(
        record(
            {
                **_JOB,
                **dict.fromkeys(("device", "type", "io-status"), text),
                **dict.fromkeys(("offset", "len", "speed"), size),
                **dict.fromkeys(("paused", "busy"), flag),
            },
            {"error": text},
        )
    ),
    "query-blockstats": listed(STATISTICS),
    "query-chardev": listed(record({"label": text, "filename": file_name, "frontend-open": flag})),
    "query-cpus-fast": listed(record({"qom-path": text, "thread-id": size})),
    "query-fdsets": listed(record({"fdset-id": size, "fds": listed(record({}, {"opaque": text}))})),
    "query-jobs": listed(record({**_JOB, "id": text}, {"error": text})),
    "query-kvm": record({"enabled": flag}),
    "query-memory-size-summary": record({"base-memory": size}, {"plugged-memory": size}),
    "query-name": record({}, {"name": text}),
    "query-named-block-nodes": listed(_NODE),
    "query-status": record({"status": text, "running": flag}),
    "query-tpm": listed(_TPM),
    "query-uuid": record({"UUID": text}),
}
"""The answers that are read. All we ask qom-get for is text."""


def check_answer(command: str, found: Any) -> None:
    """Raise Odd where an answer is none to this command."""
    if command in ANSWERS:
        ANSWERS[command](found)


def version_text(found: Any) -> str:
    """Return a version of QEMU, such as C(7.2.22), as a greeting or query-version tells it; Odd where none is told."""
    record({"qemu": VERSION})(found)
    return "{major}.{minor}.{micro}".format(**found["qemu"])


def senseless(address: Address, command: str, why: object) -> MonitorError:
    """Return the error for an answer that was read, but tells nothing. The conversation can go on."""
    return MonitorError(f"{address}: the answer to {command} makes no sense: {quoted(why)}")


def quoted(what: object) -> str:
    """Return what was said, in one line of a length that can be printed: it may be anything, and megabytes of it."""
    text = " ".join(redact_text(str(what)).split())
    return text if len(text) <= QUOTE_LIMIT else text[:QUOTE_LIMIT] + "..."

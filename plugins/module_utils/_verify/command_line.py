# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read and write QEMU's command line options."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .._common.redaction import ITEM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


ALIASES = {"-M": "-machine", "-enable-kvm": "-accel", "-no-kvm": "-accel"}


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return options with their values, which are empty where they have none. Names of images are left out."""
    found: list[tuple[str, str]] = []
    free = False
    for argument in arguments:
        if argument.startswith("-"):
            # QEMU takes --object for -object.
            name = "-" + argument.lstrip("-")
            found.append((ALIASES.get(name, name), ""))
            free = True
        elif free:
            found[-1] = (found[-1][0], argument)
            free = False
    return found


def properties(value: str, first: str) -> dict[str, str]:
    """Return an option's C(key=value) pairs. The first may lack its key, which is C(first). JSON is read too."""
    if value.startswith("{"):
        try:
            return {key: str(one) for key, one in json.loads(value).items()}
        except (ValueError, RecursionError):
            return {}
    found: dict[str, str] = {}
    for number, item in enumerate(ITEM.findall(value)):
        key, equals, text = item.partition("=")
        if not equals:
            key, text = (first, item) if number == 0 else (item, "on")
        found[key] = text.replace(",,", ",")
    return found


def option_keys(values: Mapping[str, str]) -> str:
    """Return an option's value of these keys and values."""
    return ",".join(f"{key}={escape(value)}" for key, value in values.items())


def escape(value: str) -> str:
    """Return a value as it stands within an option."""
    return value.replace(",", ",,")

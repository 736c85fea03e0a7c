# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Collect the warnings that the result of a module shows."""

from __future__ import annotations

_warnings: dict[str, str] = {}


def warn_once(subject: str, text: str) -> None:
    """Keep a warning for the result of the module, one for each subject."""
    _warnings.setdefault(subject, text)


def kept_warnings() -> list[str]:
    """Return the warnings so far."""
    return list(_warnings.values())

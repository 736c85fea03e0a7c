# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What libvirt has said of real domains: see tests/data/libvirt/README.md."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "libvirt"
SAMPLES = sorted(path.stem for path in DATA.glob("*.xml"))


def domain_xml(sample: str) -> str:
    """The XML of a domain."""
    return (DATA / f"{sample}.xml").read_text(encoding="utf-8")

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A release writes the changelog that the README points to."""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parents[2]


def test_a_release_writes_the_changelog() -> None:
    config = yaml.safe_load((HERE / "changelogs" / "config.yaml").read_text(encoding="utf-8"))
    assert {"file": "CHANGELOG.md", "format": "md"} in config["output"]

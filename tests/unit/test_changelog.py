# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The files that the README points to are there, and a release writes the changelog that it means."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

HERE = Path(__file__).parents[2]


def test_the_readme_points_to_files_that_are_there() -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    pointed = re.findall(r"https://github[.]com/vmfleet/backup/(?:blob|tree|raw)/main/([^)#\s]+)", text)
    assert "CHANGELOG.md" in pointed
    assert not [path for path in pointed if not (HERE / path).exists()]


def test_a_release_writes_the_changelog() -> None:
    config = yaml.safe_load((HERE / "changelogs" / "config.yaml").read_text(encoding="utf-8"))
    assert {"file": "CHANGELOG.md", "format": "md"} in config["output"]

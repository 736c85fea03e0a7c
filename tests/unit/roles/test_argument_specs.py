# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a role documents is what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).parents[3] / "roles").iterdir() if path.is_dir())


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def options(role: Path) -> dict[str, Any]:
    """Return the options of all entry points: they share the defaults."""
    specs = load(role / "meta" / "argument_specs.yml")["argument_specs"]
    return {name: option for spec in specs.values() for name, option in spec.get("options", {}).items()}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_defaults_are_those_documented(self, role: Path) -> None:
        documented = {
            name: option.get("default") for name, option in options(role).items() if not option.get("required")
        }
        assert load(role / "defaults" / "main.yml") == documented

    def test_required_options_have_no_default(self, role: Path) -> None:
        assert not [name for name, option in options(role).items() if option.get("required") and "default" in option]

    def test_public_names_begin_with_the_role(self, role: Path) -> None:
        assert not [name for name in options(role) if not name.startswith(f"{role.name}_")]

    def test_internal_names_begin_with_the_role(self, role: Path) -> None:
        files = sorted((role / "vars").glob("*.yml"))
        assert not [name for file in files for name in load(file) if not name.startswith(f"__{role.name}_")]

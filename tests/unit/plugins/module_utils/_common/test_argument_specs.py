# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The argument specs that modules share."""

from __future__ import annotations

import dataclasses
from typing import Any

from ansible_collections.vmfleet.backup.plugins.module_utils._common.argument_specs import drive_argument_spec
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import (
    BitmapMode,
    Drive,
    Sync,
    TargetMode,
)


def without(spec: dict[str, Any], *names: str) -> dict[str, Any]:
    return {
        option: {name: value for name, value in description.items() if name not in names}
        for option, description in spec.items()
    }


def test_drives_have_the_modules_options_without_defaults() -> None:
    general, drive = drive_argument_spec(defaults=True), drive_argument_spec(required=True)
    assert without(drive, "required") == without(general, "required", "default")
    assert [option for option, description in drive.items() if description.get("required")] == ["device", "target"]
    assert not [option for option, description in general.items() if description.get("required")]


def test_options_are_the_fields_of_a_drive() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Drive)}
    spec = drive_argument_spec(defaults=True)
    assert list(spec) == list(fields)
    for name, option in spec.items():
        if "default" in option:
            assert str(option["default"]) == str(fields[name])


def test_choices_are_the_words_of_their_lists() -> None:
    spec = drive_argument_spec()
    for name, words in {"mode": TargetMode, "sync": Sync}.items():
        assert spec[name]["choices"] == list(words)
    assert spec["bitmap_mode"]["choices"] == [word for word in BitmapMode if word]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What tells a machine from all others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import process

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_machine_id(missing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    places = {"/etc/machine-id": "one", "/var/lib/dbus/machine-id": "two"}

    def open_instead(path: str, **options: Any) -> Any:
        if list(places).index(path) < missing:
            raise FileNotFoundError(path)
        (tmp_path / places[path]).write_text(places[path] + "\n")
        return open(tmp_path / places[path], **options)

    monkeypatch.setattr(process, "open", open_instead, raising=False)
    assert process.machine_id() == ["one", "two", os.uname().nodename][missing]


def test_a_machine_id_that_is_still_to_be_made_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    def open_empty(_path: str, **options: Any) -> Any:
        return open(tmp_path / "empty", **options)

    monkeypatch.setattr(process, "open", open_empty, raising=False)
    assert process.machine_id() == os.uname().nodename

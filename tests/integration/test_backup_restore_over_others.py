# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_restore over an overlay of another VM."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.restoring import one_disk, pins

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("clean")


def test_a_pin_of_what_another_vm_has_replaced(chain: Chain, where: Path) -> None:
    library = chain.library
    shutil.copytree(library.path / NAME, library.path / "web02")
    for path in library.path.glob("web02/*/manifest.json"):
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "vm": {**found["vm"], "name": "web02"}}))
    library.restore(id="s2", method="overlay", disks=one_disk(where / "look"))
    library.restore(vm="web02", id="s3", disks=one_disk(where / "look"), overwrite=True)
    assert pins(library) == []

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""UEFI variables of a domain that is off, in a file that cannot be looked at."""

from __future__ import annotations

import os
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.turns import Turns

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt


def test_file_system_that_answers_with_an_error(libvirt: Libvirt, directory: Path) -> None:
    """That the file cannot be looked at is not that there is none."""
    turns = Turns(libvirt, directory, nvram=True)
    turns.domain.nvram.write_bytes(bytes(range(256)) * 2112)
    turns.back_up("s1")
    assert list(turns.sets.images("web", "s1")) == ["vda", "vdb", "nvram"]
    # Of all errors, root gets this one without a broken file system.
    turns.domain.nvram.unlink()
    os.symlink(turns.domain.nvram.name, turns.domain.nvram)
    try:
        [planned] = turns.plan("s2")["vms"]
    finally:
        turns.domain.nvram.unlink()
    assert planned["action"] == "fail", planned
    assert "disk nvram" in planned["reason"]

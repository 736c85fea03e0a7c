# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of restored disks: as results, and for people to read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._restore.model import RestoreMethod, describe, headline
from ansible_collections.vmfleet.backup.tests.unit.plugins.restoring import IMAGE, MANIFEST, disk_restore


def restored(*changed: bool) -> list[dict[str, Any]]:
    return [disk_restore(f"/t/{number}").result(done) for number, done in enumerate(changed)]


class TestText:
    """What is told of the disks."""

    @pytest.mark.parametrize(
        ("disks", "done", "checked"),
        [
            (restored(True, True), "2 of 2 disks were restored just now", "2 of 2 disks would be restored"),
            (restored(False, True), "1 of 2 disks were restored just now", "1 of 2 disks would be restored"),
            (restored(False, False), "all disks are there already", "0 of 2 disks would be restored"),
        ],
    )
    def test_headline(self, disks: list[dict[str, Any]], done: str, checked: str) -> None:
        assert (headline(disks, check_mode=False), headline(disks, check_mode=True)) == (done, checked)

    def test_where_each_disk_is(self) -> None:
        chain = ((replace(MANIFEST, id="s2"), IMAGE), (MANIFEST, IMAGE))
        disks = [
            disk_restore("/t/a").result(True),
            disk_restore("/t/b", RestoreMethod.OVERLAY, chain=chain, format="raw").result(True),
        ]
        assert describe(disks) == [
            "vda: /t/a (qcow2, 16.0 MiB, copy of set s1)",
            "vda: /t/b (raw, 16.0 MiB, overlay of set s2 on s1)",
        ]

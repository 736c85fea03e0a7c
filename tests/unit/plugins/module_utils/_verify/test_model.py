# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of findings: as results, and for people to read."""

from __future__ import annotations

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import Finding, bad_sets, describe, headline
from ansible_collections.vmfleet.backup.tests.unit.plugins.verifying import VM


def test_results() -> None:
    assert "console" not in Finding(VM, "s1", "a", Depth.BOOT).result()
    assert Finding(VM, "s1", "", Depth.BOOT, console=("x",)).result()["console"] == ["x"]
    assert Finding(VM, "", "", Depth.MANIFEST, "wrong").full_text == "VM web01: wrong"
    assert Finding(VM, "s1", "a", Depth.MANIFEST, "wrong").full_text == "VM web01, set s1: disk a: wrong"


class TestText:
    """What is told of all sets."""

    FOUND = (
        Finding("web01", "s2", "vda", Depth.CHECKSUM),
        Finding("web01", "s2", "vdb", Depth.CHECKSUM, note="vdb: it has no checksum"),
        Finding("web01", "s1", "vda", Depth.CHECKSUM, "the image has changed"),
        Finding("web01", "s1", "vdb", Depth.CHECKSUM),
        Finding("db01", "s2", "", Depth.BOOT, "no sign of life", console=("Booting", "panic")),
        Finding("mail01", "s2", "", Depth.MANIFEST),
    )

    def test_what_is_not_good_comes_first_with_the_last_lines_of_its_console(self) -> None:
        assert describe(self.FOUND) == [
            "NOT GOOD  web01/s1  vda: the image has changed",
            "NOT GOOD  db01/s2  no sign of life",
            "          | Booting",
            "          | panic",
            "good      mail01/s2  ",
            "good      web01/s2  vda, vdb",
            "          vdb: it has no checksum",
        ]

    def test_a_set_is_bad_if_one_of_its_disks_is(self) -> None:
        assert bad_sets(self.FOUND) == ["web01/s1", "db01/s2"]
        assert headline(self.FOUND) == "2 of 4 sets are good"

    def test_no_set(self) -> None:
        assert (bad_sets(()), headline(()), describe(())) == ([], "0 of 0 sets are good", [])

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_verify of a set whose vm.json is not what was written."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.modules import fail

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize("depth", ["checksum", "image"])
def test_a_byte_of_the_description(chain: Chain, depth: str) -> None:
    path = chain.library.path / NAME / "s3" / "vm.json"
    text = path.read_text()
    assert '"machine": ' in text
    path.chmod(0o600)
    path.write_text(text.replace('"machine": "', '"machine": "q', 1))
    told = fail("backup_verify", {"repository": str(chain.library.path), "depth": depth})
    assert "vm.json" in told["msg"]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""When a throwaway VM is not started, and whose fault that is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.catalog import read_catalog
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_check import check_boot
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_options import BootOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.manifest_check import check_manifest
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import SetCheck, VerifyOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.run import VerifyRun
from ansible_collections.vmfleet.backup.tests.unit.plugins.verifying import VM, image, publish

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def test_a_set_with_faults_of_its_own_is_not_started(repository: Repository, tmp_path: Path) -> None:
    made = publish(repository, 1, image("a"))
    options = BootOptions("/bin/false", str(tmp_path), 1, "x", agent=False)
    check = SetCheck(read_catalog(repository, VM), made)
    check_manifest(repository, check)
    check.fail("", Depth.MANIFEST, "there are notes")
    asyncio.run(check_boot(VerifyRun(repository, VerifyOptions(Depth.BOOT, options)), check, options))
    found = check.findings[""]
    assert (found.depth, found.error) == (Depth.MANIFEST, "there are notes; not started, since the set is not good")


def test_what_was_not_started_is_not_called_broken(repository: Repository, tmp_path: Path) -> None:
    """The description changes to something that is none after it was looked at."""
    made = publish(repository, 1, image("a"))
    options = BootOptions("/bin/false", str(tmp_path), 1, "x", agent=False)
    check = SetCheck(read_catalog(repository, VM), made)
    check_manifest(repository, check)
    (Path(repository.set_path(VM, "s1")) / "vm.json").write_text(json.dumps({"schema": 1, "cpus": 4}))
    asyncio.run(check_boot(VerifyRun(repository, VerifyOptions(Depth.BOOT, options)), check, options))
    found = check.findings[""]
    assert (found.depth, found.error) == (Depth.BOOT, "cpus: 4 is not a mapping")
    assert not found.is_backup_fault
    assert list(tmp_path.glob("vmfleet-boot-*")) == []

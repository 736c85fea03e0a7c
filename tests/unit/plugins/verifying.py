# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make sets of one VM, and verify them without any warning."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.boot_options import BootOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import VerifyOptions
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.verify import verify_all
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import manifest, put

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import DiskImage, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
    from ansible_collections.vmfleet.backup.plugins.module_utils._verify.model import Finding


VM = "web01"
THEN = "2026-11-23T00:00:00Z"


def image(name: str, below: str | None = None, **more: Any) -> DiskImage:
    """Return a disk's image in a set, as publish() writes it."""
    return builders.image(name, below, **{"bytes": builders.IMAGE_BYTES, **more})


def publish(repository: Repository, number: int, *images: DiskImage) -> Manifest:
    """Put a set into a repository; its images are headers."""
    made = manifest(f"s{number}", disks=images, sequence=number, started=THEN, finished=THEN)
    directory = put(repository, made, None)
    (directory / "vm.json").write_text(json.dumps({"schema": 1}))
    return made


def verify(
    repository: Repository, depth: Depth = Depth.MANIFEST, set_id: str = "", vm: str = VM, check: bool = False
) -> list[Finding]:
    """Return what is found of a set, or of the newest one."""
    findings, warnings = asyncio.run(verify_all(repository, [vm], set_id, VerifyOptions(depth, check_mode=check)))
    assert not warnings
    return findings


def start_from(repository: Repository, tmpdir: Path, set_id: str = "") -> list[Finding]:
    """Return what is found by a check as deep as it goes, with a QEMU that never starts anything."""
    options = BootOptions("/bin/false", str(tmpdir), 1, "x", agent=False)
    findings, warnings = asyncio.run(verify_all(repository, [VM], set_id, VerifyOptions(Depth.BOOT, options)))
    assert not warnings
    return findings

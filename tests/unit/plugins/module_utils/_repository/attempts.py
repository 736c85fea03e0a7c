# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a set of one image as backup_set does, step by step, with no QEMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Failure, Intent, Manifest
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

FAILURE = Failure("run", "a1", "s1", "failed", "target full", builders.TIME, builders.TIME)
IMAGE = builders.image(bytes=3, sha256="ab" * 32)


def intent(**more: Any) -> Intent:
    """Return the intent of the set s1, in its attempt a1."""
    return builders.intent("s1", IMAGE, **{"attempt": "a1", **more})


def manifest(of: Intent) -> Manifest:
    """Return what becomes of an intent."""
    return builders.manifest(of.id, IMAGE, attempt=of.attempt, sequence=1)


def begin(repository: Repository, of: Intent) -> None:
    """Claim a set's id, and make its image."""
    staging.begin(repository, of)
    for disk in of.disks:
        with open(repository.image_path(of, disk.image.image), "wb") as image:
            image.write(b"abc")


def publish(repository: Repository, of: Intent) -> Manifest:
    """Make a set from its beginning to its end."""
    begin(repository, of)
    staging.describe(repository, of, manifest(of))
    published = staging.publish(repository, of)
    staging.tidy(repository, of.vm.name, of.id)
    return published

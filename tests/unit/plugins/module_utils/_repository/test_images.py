# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Checksums of images: what differs is named, and what cannot be read as well."""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.images import check_all
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image, manifest, put

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import DiskImage, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def images(repository: Repository, count: int) -> list[tuple[Manifest, DiskImage]]:
    """Sets of one image each, as good as their manifests say."""
    found = []
    for number in range(count):
        content = f"image {number}".encode()
        one = image(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        made = manifest(f"s{number}", one, sequence=number)
        put(repository, made, content)
        found.append((made, one))
    return found


def test_what_is_wrong_is_told_by_set_and_disk(repository: Repository) -> None:
    checked = images(repository, 9)
    assert asyncio.run(check_all(repository, checked)) == {}
    changed, missing = (os.path.join(repository.set_path("web01", name), "vda.qcow2") for name in ("s3", "s7"))
    with open(changed, "r+b") as file:
        file.write(b"I")
    os.unlink(missing)
    errors = asyncio.run(check_all(repository, checked))
    assert set(errors) == {("s3", "vda"), ("s7", "vda")}
    digests = hashlib.sha256(b"Image 3").hexdigest(), checked[3][1].sha256
    assert errors["s3", "vda"] == (
        f"image {changed} is not what was written: its SHA-256 is {digests[0]}, and was {digests[1]}"
    )
    assert (
        errors["s7", "vda"] == f"image {missing} cannot be read: No such file or directory while its checksum was taken"
    )


def test_what_was_made_without_a_checksum_counts_as_good(repository: Repository) -> None:
    [(manifest, image)] = images(repository, 1)
    os.unlink(os.path.join(repository.set_path("web01", "s0"), "vda.qcow2"))
    assert asyncio.run(check_all(repository, [(manifest, replace(image, sha256=None))])) == {}

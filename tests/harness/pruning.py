# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of backup_prune work on, and what they look at."""

from __future__ import annotations

import contextlib
import hashlib
import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Verification
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import open_repository
from ansible_collections.vmfleet.backup.tests.harness.images import identical, info, sound
from ansible_collections.vmfleet.backup.tests.harness.library import LOCKS, NAME, prepared

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.library import Chain, Library


@contextlib.contextmanager
def two_chains() -> t.Iterator[Chain]:
    """Prepare a full and two increments, and again a full and one increment, of a VM that is off."""
    with prepared() as chain:
        chain.vm.restart()
        chain.go_on(4, level="full")
        chain.go_on(5)
        chain.vm.quit()
        yield chain


def assert_whole(chain: Chain, library: Library, *expected: str) -> None:
    """Assert that these sets are there, newest first, and nothing else, and that all that is said of them is true."""
    assert library.listed() == list(expected)
    assert {path.name for path in (library.path / NAME).iterdir()} - set(LOCKS) == set(expected)
    for set_id in expected:
        images = library.images(NAME, set_id)
        for disk in library.manifest(NAME, set_id)["disks"]:
            image = images[disk["name"]]
            assert identical(chain.copies(set_id)[disk["name"]], image), f"{disk['name']} of {set_id}"
            assert sound(image)
            assert image.stat().st_mode & 0o777 == 0o440
            assert image.stat().st_size == disk["bytes"]
            assert hashlib.sha256(image.read_bytes()).hexdigest() == disk["sha256"]
            assert (disk["parent"] is None) == (disk["level"] == "full") == ("backing-filename" not in info(image))


def fates(result: dict[str, t.Any], which: str = "kept") -> dict[str, str]:
    """Return why sets were kept, or removed, by their ids."""
    return {one["id"]: one["reason"] for one in result[which]}


def judge(library: Library, set_id: str, *errors: str, depth: str = "checksum") -> None:
    """Note a verification of a set with this result."""
    attempt = library.manifest(NAME, set_id)["attempt"]
    mark = Verification(set_id, attempt, depth, "2026-12-01T00:00:00Z", errors)
    write_annotation(open_repository(str(library.path)), NAME, mark)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The repository's documents: what is written is read again, also by a release before and after."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import DocumentError, NewerSchema
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import COLLECTION_VERSION
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth, Verification
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Intent, Level, Manifest, Phase
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders

DISK = {
    "name": "vda",
    "node": "n0",
    "qdev": "",
    "source": "/src",
    "source_format": "qcow2",
    "virtual_size": 1,
    "level": "full",
    "reason": "",
    "parent": None,
    "image": "vda.qcow2",
    "format": "qcow2",
    "compression": "none",
    "bytes": 5,
    "sha256": None,
    "bitmap": None,
}
# What the first release has written.
MANIFEST: dict[str, Any] = {
    "repository": builders.UUID,
    "vm": {"name": "web01", "identity": "u", "uuid": "u"},
    "id": "s1",
    "sequence": 1,
    "level": "full",
    "run": "run",
    "attempt": "a",
    "started": builders.TIME,
    "finished": builders.TIME,
    "duration": 1.0,
    "consistency": "crash",
    "qemu": "7.2.0",
    "disks": [DISK],
    "collection": "0.1.0",
    "schema": 1,
}


def test_the_version_in_manifests_is_that_of_the_collection() -> None:
    galaxy = yaml.safe_load((Path(__file__).parents[5] / "galaxy.yml").read_text(encoding="utf-8"))
    assert galaxy["version"] == COLLECTION_VERSION


def test_a_manifest_of_the_first_form_is_read() -> None:
    manifest = Manifest.parse(MANIFEST)
    assert (manifest.hypervisor, manifest.monitor, manifest.bytes) == (None, "", 5)
    assert manifest.disk("vda") == manifest.disks[0]
    assert manifest.disk("vdb") is None


def test_a_manifest_is_read_as_it_was_written() -> None:
    maker = {"name": "hv1", "machine_id": "m", "boot_id": "b"}
    parent = {"id": "s0", "sha256": "0" * 64, "attempt": "a0"}
    manifest = Manifest.parse({**MANIFEST, "hypervisor": maker, "disks": [{**DISK, "parent": parent}]})
    assert Manifest.parse(json.loads(json.dumps(asdict(manifest)))) == manifest
    assert manifest.hypervisor
    assert manifest.hypervisor.name == "hv1"
    assert manifest.disks[0].parent
    assert manifest.disks[0].parent.attempt == "a0"


def test_what_a_later_release_adds_is_left_out() -> None:
    assert Manifest.parse({**MANIFEST, "colour": "red"}) == Manifest.parse(MANIFEST)


def test_words_are_read_as_such_and_unknown_ones_stay() -> None:
    manifest = Manifest.parse(MANIFEST)
    assert manifest.level is manifest.disks[0].level is Level.FULL
    intent = builders.intent(phase="copying", level="differential")
    read = Intent.parse(json.loads(json.dumps(asdict(intent))))
    assert read == intent
    assert (read.phase, read.level) == (Phase.COPYING, Level.DIFFERENTIAL)
    assert read.phase is Phase.COPYING
    look = {"id": "s1", "attempt": "a", "depth": "boot", "when": builders.TIME, "schema": 1}
    assert Verification.parse(look).depth is Depth.BOOT
    # What a later release may say.
    later = Manifest.parse({**MANIFEST, "level": "synthetic", "disks": [{**DISK, "level": "mirror"}]})
    assert (later.level, later.disks[0].level) == ("synthetic", "mirror")


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(NewerSchema, match="update"):
        Manifest.parse({**MANIFEST, "schema": 2})


@pytest.mark.parametrize("found", [[], {}, {"schema": "1"}, {"schema": 1}, {**MANIFEST, "disks": None}])
def test_what_is_no_manifest(found: Any) -> None:
    with pytest.raises(DocumentError):
        Manifest.parse(found)
    with pytest.raises(DocumentError):
        Intent.parse(found)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The making of a set: what is listed after a crash between any two steps, and what is refused."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import file_label, set_file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import repository as repository_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils._repository.attempts import (
    FAILURE,
    begin,
    intent,
    manifest,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def test_documents_come_back_as_they_were_written(repository: Repository) -> None:
    begin(repository, intent())
    assert repository.records("web01").intents == (intent(),)
    staging.record_failure(repository, "web01", FAILURE)
    assert repository.records("web01").failures == (FAILURE,)
    staging.describe(repository, intent(), manifest(intent()))
    staging.publish(repository, intent())
    assert repository.records("web01").sets == (replace(manifest(intent()), sequence=1),)


@pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
def test_images_get_their_labels_back(repository: Repository) -> None:
    before, of = "system_u:object_r:var_t:s0", intent()
    labelled = replace(of, disks=(replace(of.disks[0], label=before),))
    begin(repository, of)
    path = repository.image_path(of, of.disks[0].image.image)
    set_file_label(path, "system_u:object_r:svirt_image_t:s0:c1,c2")
    staging.restore_labels(repository, of)
    assert file_label(path) == "system_u:object_r:svirt_image_t:s0:c1,c2"
    staging.restore_labels(repository, labelled)
    staging.restore_labels(repository, labelled)
    assert file_label(path) == before


class TestCrash:
    """Stopped between two steps: a set is listed when it is complete, and never before."""

    def test_before_the_intent(self, repository: Repository) -> None:
        os.mkdir(repository.staging_path("web01", "s1"))
        assert repository.records("web01") == repository_repository.VmRecords()
        staging.begin(repository, intent())
        assert repository.records("web01").intents == (intent(),)

    def test_in_the_middle_of_writing_the_intent(self, repository: Repository) -> None:
        os.mkdir(repository.staging_path("web01", "s1"))
        with open(repository.staging_path("web01", "s1") + "/intent.json.new", "w", encoding="utf-8") as half:
            half.write('{"schema": 1, "run"')
        staging.begin(repository, intent())
        assert repository.records("web01").intents == (intent(),)
        assert os.listdir(repository.staging_path("web01", "s1")) == ["intent.json"]

    def test_while_the_images_grow(self, repository: Repository) -> None:
        begin(repository, intent())
        records = repository.records("web01")
        assert (records.sets, records.described) == ((), frozenset())
        with pytest.raises(FileExistsError):
            staging.begin(repository, intent(attempt="a2"))

    def test_between_manifest_and_rename(self, repository: Repository) -> None:
        begin(repository, intent())
        staging.describe(repository, intent(), manifest(intent()))
        records = repository.records("web01")
        assert (records.sets, records.intents, records.described) == ((), (intent(),), frozenset({"a1"}))
        assert staging.publish(repository, intent()).sequence == 1

    def test_between_rename_and_tidying_up(self, repository: Repository) -> None:
        staging.record_failure(repository, "web01", FAILURE)
        begin(repository, intent())
        staging.describe(repository, intent(), manifest(intent()))
        staging.publish(repository, intent())
        assert [found.id for found in repository.records("web01").sets] == ["s1"]
        assert repository.records("web01").intents == ()
        for path in ("s1/intent.json.new", ".s1.failed.json.new"):
            with open(os.path.join(repository.directory("web01"), path), "w", encoding="utf-8"):
                pass
        assert staging.untidy(repository, "web01", "s1")
        staging.tidy(repository, "web01", "s1")
        assert not staging.untidy(repository, "web01", "s1")
        assert sorted(os.listdir(repository.directory("web01"))) == ["s1"]
        assert sorted(os.listdir(repository.set_path("web01", "s1"))) == ["manifest.json", "vda.qcow2"]

    def test_in_the_middle_of_discarding(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        begin(repository, intent())
        unlink = os.unlink
        removed = []

        def dying_unlink(path: str, **where: int) -> None:
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
            unlink(path, **where)

        monkeypatch.setattr(os, "unlink", dying_unlink)
        with pytest.raises(KeyboardInterrupt):
            staging.discard(repository, intent())
        # The intent goes last: what is left is known to be ours.
        assert repository.records("web01").intents == (intent(),)
        monkeypatch.undo()
        staging.discard(repository, intent())
        assert os.listdir(repository.directory("web01")) == []


def test_another_attempts_staging_is_not_discarded(repository: Repository) -> None:
    begin(repository, intent())
    staging.discard(repository, intent(attempt="a2"))
    assert repository.records("web01").intents == (intent(),)


def test_publishing_never_replaces_anything(repository: Repository) -> None:
    begin(repository, intent())
    staging.describe(repository, intent(), manifest(intent()))
    # rename(2) would take an empty directory's place.
    os.mkdir(repository.set_path("web01", "s1"))
    with pytest.raises(BackupError, match="move it away"):
        staging.publish(repository, intent())


def test_modes(repository: Repository) -> None:
    begin(repository, intent())
    assert stat.S_IMODE(os.stat(repository.staging_path("web01", "s1")).st_mode) == 0o700
    staging.describe(repository, intent(), manifest(intent()))
    staging.publish(repository, intent())
    for name in ("manifest.json", "vda.qcow2"):
        assert stat.S_IMODE(os.stat(repository.set_path("web01", "s1") + "/" + name).st_mode) == 0o440


def test_promised_is_what_is_not_allocated_yet(repository: Repository) -> None:
    begin(repository, intent())
    allocated = os.stat(repository.image_path(intent(), "vda.qcow2")).st_blocks * 512
    assert staging.outstanding(repository, intent()) == (1 << 20) - allocated


def test_nothing_is_promised_to_a_set_that_has_come_to_its_end(repository: Repository) -> None:
    assert staging.outstanding(repository, intent()) == 0

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is removed with a set and after it, and what stays."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import published, staging
from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils._repository.attempts import (
    FAILURE,
    begin,
    intent,
    publish,
)

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def litter(repository: Repository) -> list[str]:
    with repository.opened("web01") as directory:
        return staging.litter(directory)


class TestTidy:
    """What killed processes leave goes with the next set; what only looks like it stays."""

    def touch(self, repository: Repository, *paths: str) -> None:
        for path in paths:
            full = os.path.join(repository.directory("web01"), path)
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "w", encoding="utf-8"):
                pass

    def entries(self, repository: Repository) -> set[str]:
        return set(os.listdir(repository.directory("web01")))

    def test_nothing_to_do(self, repository: Repository) -> None:
        assert not staging.untidy(repository, "nobody", "s1")
        staging.tidy(repository, "nobody", "s1")
        publish(repository, intent())
        assert not staging.untidy(repository, "web01", "s1")

    def test_leftovers_of_whatever_set(self, repository: Repository) -> None:
        publish(repository, intent())
        left = (".s0.staging/vda.qcow2", ".s9.staging/intent.json.new", ".s5.failed.json.new", ".s4.removed/vda.qcow2")
        self.touch(repository, *left)
        assert staging.untidy(repository, "web01", "s1")
        staging.tidy(repository, "web01", "s1")
        assert not staging.untidy(repository, "web01", "s1")
        assert self.entries(repository) == {"s1"}

    def test_what_others_are_at_stays(self, repository: Repository) -> None:
        publish(repository, intent())
        begin(repository, intent(id="s2", attempt="a2"))
        staging.record_failure(repository, "web01", replace(FAILURE, id="s3"))
        self.touch(repository, ".lock", ".snapshot/hourly", "notes.txt")
        assert not staging.untidy(repository, "web01", "s1")
        staging.tidy(repository, "web01", "s1")
        there = {".lock", ".snapshot", "notes.txt", "s1", ".s2.staging", ".s3.failed.json"}
        assert self.entries(repository) == there
        assert [found.id for found in repository.records("web01").intents] == ["s2"]
        assert [found.id for found in repository.records("web01").failures] == ["s3"]

    def test_ids_that_look_like_leftovers(self, repository: Repository) -> None:
        ids = ["x.new", "a.failed.json", "b.staging", "c.removed", "d.failed.json.new", "intent.json", "manifest.json"]
        for number, set_id in enumerate(ids):
            publish(repository, intent(id=set_id, attempt=f"a{number}"))
            # And one that is being made, and one that has failed, under names made of these.
            begin(repository, intent(id=f"{set_id}.2", attempt=f"b{number}"))
            staging.record_failure(repository, "web01", replace(FAILURE, id=f"{set_id}.3"))
        for set_id in ids:
            assert not staging.untidy(repository, "web01", set_id)
            staging.tidy(repository, "web01", set_id)
        records = repository.records("web01")
        assert [found.id for found in records.sets] == ids
        assert {found.id for found in records.intents} == {f"{set_id}.2" for set_id in ids}
        assert {found.id for found in records.failures} == {f"{set_id}.3" for set_id in ids}
        assert records.strays == set()


class TestLitterThatStays:
    """What cannot be removed is in nobody's way."""

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
    def test_of_a_set(self, repository: Repository, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        publish(repository, intent())
        unlink = os.unlink

        def busy(path: str, **where: int) -> None:
            if path.endswith(".nfs0001"):
                raise OSError(code, os.strerror(code), path)
            unlink(path, **where)

        with open(os.path.join(repository.set_path("web01", "s1"), ".nfs0001"), "w", encoding="utf-8"):
            pass
        monkeypatch.setattr(os, "unlink", busy)
        left = os.path.join(repository.directory("web01"), ".s1.removed")
        assert (
            published.remove_set(repository, "web01", "s1")
            == f"{left}/.nfs0001 cannot be removed ({os.strerror(code)})"
        )
        assert os.listdir(left) == [".nfs0001"]
        staging.tidy(repository, "web01", "s2")
        assert litter(repository) == [".s1.removed"]
        monkeypatch.undo()
        staging.tidy(repository, "web01", "s2")
        assert os.listdir(repository.directory("web01")) == []

    def test_of_an_attempt(self, repository: Repository) -> None:
        begin(repository, intent())
        stray = os.path.join(repository.staging_path("web01", "s1"), "mine")
        os.mkdir(stray)
        staging.discard(repository, intent())
        assert litter(repository) == [".s1.staging"]
        with pytest.raises(BackupError, match=rf"^VM web01: {stray} cannot be removed \(Is a directory\); remove it"):
            staging.begin(repository, intent())
        os.rmdir(stray)
        staging.begin(repository, intent())

    def test_a_repository_that_gives_out_is_an_error(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(repository, intent())

        def broken(path: str, **_where: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        monkeypatch.setattr(os, "unlink", broken)
        with pytest.raises(OSError, match="Input/output error"):
            published.remove_set(repository, "web01", "s1")

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a repository lists, and when it refuses to be used."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import published, staging
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import repository as repository_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Consolidation, Parent
from ansible_collections.vmfleet.backup.tests.unit.plugins.module_utils._repository.attempts import (
    IMAGE,
    begin,
    intent,
    manifest,
    publish,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


def test_order_is_the_sequence_and_neither_names_nor_times(repository: Repository) -> None:
    for number, set_id in enumerate(("zulu", "alpha", "s10", "s9"), 1):
        assert publish(repository, intent(id=set_id, attempt=set_id)).sequence == number
        os.utime(repository.set_path("web01", set_id), (1000 - number, 1000 - number))
    assert [found.id for found in repository.records("web01").sets] == ["zulu", "alpha", "s10", "s9"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": "1"}', "null"])
def test_a_directory_without_a_valid_manifest_is_no_set(repository: Repository, content: str) -> None:
    os.mkdir(repository.set_path("web01", "s1"))
    with open(repository.set_path("web01", "s1") + "/manifest.json", "w", encoding="utf-8") as broken:
        broken.write(content)
    records = repository.records("web01")
    assert (records.sets, records.strays) == ((), {"s1"})


def test_a_set_under_another_name_is_no_set(repository: Repository) -> None:
    publish(repository, intent())
    os.rename(repository.set_path("web01", "s1"), repository.set_path("web01", "renamed"))
    assert repository.records("web01").sets == ()


def test_what_later_releases_add_is_left_alone(repository: Repository) -> None:
    publish(repository, intent())
    path = repository.set_path("web01", "s1") + "/manifest.json"
    os.chmod(path, 0o600)
    with open(path, encoding="utf-8") as source:
        content = json.load(source)
    with open(path, "w", encoding="utf-8") as sink:
        json.dump({**content, "colour": "blue"}, sink)
    assert [found.id for found in repository.records("web01").sets] == ["s1"]
    with open(path, "w", encoding="utf-8") as sink:
        json.dump({**content, "schema": 2}, sink)
    records = repository.records("web01")
    assert (records.sets, records.unread) == ((), {"s1"})
    assert records.barred.endswith("update vmfleet.backup")
    assert records.odd == {"s1": records.barred}


class TestNotes:
    """While an increment becomes a full image, its file tells which of the two it is."""

    @pytest.mark.parametrize(
        ("content", "level"), [(b"abc", "incremental"), (b"abcde", "full"), (b"", "incremental"), (None, "incremental")]
    )
    def test_which_image_it_is(self, repository: Repository, content: bytes | None, level: str) -> None:
        increment = replace(IMAGE, level="incremental", parent=Parent("s0", None, "a0"))
        begin(repository, intent())
        staging.describe(repository, intent(), replace(manifest(intent()), disks=(increment,)))
        staging.publish(repository, intent())
        image = os.path.join(repository.set_path("web01", "s1"), "vda.qcow2")
        os.unlink(image)
        if content is not None:
            with open(image, "wb") as file:
                file.write(content)
        with repository.opened("web01") as directory:
            published.write_note(directory, Consolidation("s1", "a1", replace(IMAGE, bytes=5)))
        [found] = repository.records("web01").sets
        assert (found.disks[0].level, found.disks[0].parent is None) == (level, level == "full")


class TestDamage:
    """What an image's metadata tells without its being read."""

    def damage(self, repository: Repository) -> str:
        [found] = repository.records("web01").sets
        return repository.damage(found, found.disks[0])

    def image(self, repository: Repository) -> str:
        return os.path.join(repository.set_path("web01", "s1"), "vda.qcow2")

    def test_none(self, repository: Repository) -> None:
        publish(repository, intent())
        assert self.damage(repository) == ""

    def test_missing(self, repository: Repository) -> None:
        publish(repository, intent())
        os.unlink(self.image(repository))
        assert self.damage(repository) == f"image {self.image(repository)} is missing"

    @pytest.mark.parametrize("content", [b"", b"ab", b"abcd"])
    def test_of_another_size(self, repository: Repository, content: bytes) -> None:
        publish(repository, intent())
        os.unlink(self.image(repository))
        with open(self.image(repository), "wb") as image:
            image.write(content)
        assert "is not the file that its manifest describes (3 bytes)" in self.damage(repository)

    def test_a_link_is_not_the_image(self, repository: Repository) -> None:
        publish(repository, intent())
        os.rename(self.image(repository), repository.path + "/elsewhere")
        os.symlink(repository.path + "/elsewhere", self.image(repository))
        assert "is not the file" in self.damage(repository)
        os.unlink(self.image(repository))
        os.mkdir(self.image(repository))
        assert "is not the file" in self.damage(repository)


class TestManifestsAreReadOnce:
    """A VM of many sets is looked at often."""

    def test_an_unchanged_one_is_not_read_again(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(repository, intent())
        first = repository.records("web01")
        monkeypatch.setattr(repository_repository, "read_document", lambda *_args, **_more: pytest.fail("read again"))
        assert repository.records("web01") == first

    def test_a_changed_one_is(self, repository: Repository) -> None:
        publish(repository, intent())
        assert [found.qemu for found in repository.records("web01").sets] == ["7.2.22"]
        path = repository.set_path("web01", "s1") + "/manifest.json"
        with open(path, encoding="utf-8") as source:
            content = source.read()
        status = os.stat(path)
        os.unlink(path)
        with open(path, "w", encoding="utf-8") as sink:
            # Of the same length, and made to look as old.
            sink.write(content.replace("7.2.22", "7.2.23"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert [found.qemu for found in repository.records("web01").sets] == ["7.2.23"]
        os.truncate(path, 10)
        assert repository.records("web01").strays == {"s1"}
        os.unlink(path)
        assert repository.records("web01").sets == ()

    def test_one_that_takes_the_place_of_a_removed_one(self, repository: Repository) -> None:
        publish(repository, intent())
        repository.records("web01")
        published.remove_set(repository, "web01", "s1")
        assert repository.records("web01").sets == ()
        publish(repository, intent(attempt="a2"))
        assert [found.attempt for found in repository.records("web01").sets] == ["a2"]


class TestLock:
    def test_keeps_others_out(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(repository_repository, "locked", _impatient)

        async def twice() -> None:
            async with repository.lock("web01"), repository.lock("db01"):
                with pytest.raises(BackupError, match="web01"):
                    await repository.lock("web01").__aenter__()

        asyncio.run(twice())

    def test_that_does_not_lock_is_refused(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fcntl.flock", lambda *_args: None)

        async def once() -> None:
            async with repository.lock("web01"):
                pass

        with pytest.raises(BackupError, match="flock does not work"):
            asyncio.run(once())

    def test_makes_nothing_where_the_repository_has_gone(self, repository: Repository, tmp_path: Path) -> None:
        os.rename(repository.path, tmp_path / "unmounted")

        async def once() -> None:
            async with repository.lock("web01"):
                pass

        with pytest.raises(BackupError, match="mounted"):
            asyncio.run(once())
        assert not os.path.lexists(repository.path)


def _impatient(path: str, holder_of: str, calls: Any) -> Any:
    from ansible_collections.vmfleet.backup.plugins.module_utils._host.lock import locked

    return locked(path, holder_of, timeout=0.05, calls=calls)

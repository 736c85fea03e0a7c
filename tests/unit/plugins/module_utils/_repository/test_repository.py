# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository on disk: what is listed after a crash between any two steps, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import json_file
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import repository as repository_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.create import (
    check_creatable,
    check_writable,
    create_repository,
    find_repository,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Consolidation,
    Failure,
    Intent,
    Manifest,
    Parent,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository, open_repository
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import image

if TYPE_CHECKING:
    from pathlib import Path

FAILURE = Failure("run", "a1", "s1", "failed", "target full", "then", "now")


IMAGE = image(bytes=3, sha256="abc")


def intent(**more: Any) -> Intent:
    """Return the intent of the set s1, in its attempt a1."""
    return builders.intent("s1", IMAGE, **{"attempt": "a1", **more})


def manifest(of: Intent) -> Manifest:
    """Return what becomes of an intent."""
    return builders.manifest(of.id, IMAGE, attempt=of.attempt, sequence=0)


@pytest.fixture
def repository(repository: Repository) -> Repository:
    """An empty repository that knows of a VM."""
    os.mkdir(repository.directory("web01"))
    return repository


def begin(repository: Repository, of: Intent) -> None:
    repository.begin(of)
    for disk in of.disks:
        with open(repository.image_path(of, disk.image.image), "wb") as image:
            image.write(b"abc")


def publish(repository: Repository, of: Intent) -> Manifest:
    begin(repository, of)
    repository.describe(of, manifest(of))
    published = repository.publish(of)
    repository.tidy(of.vm.name, of.id)
    return published


def test_documents_come_back_as_they_were_written(repository: Repository) -> None:
    begin(repository, intent())
    assert repository.shelf("web01").intents == (intent(),)
    repository.record_failure("web01", FAILURE)
    assert repository.shelf("web01").failures == (FAILURE,)
    repository.describe(intent(), manifest(intent()))
    repository.publish(intent())
    assert repository.shelf("web01").sets == (replace(manifest(intent()), sequence=1),)


def test_order_is_the_sequence_and_neither_names_nor_times(repository: Repository) -> None:
    for number, set_id in enumerate(("zulu", "alpha", "s10", "s9"), 1):
        assert publish(repository, intent(id=set_id, attempt=set_id)).sequence == number
        os.utime(repository.set_path("web01", set_id), (1000 - number, 1000 - number))
    assert [found.id for found in repository.shelf("web01").sets] == ["zulu", "alpha", "s10", "s9"]


class TestCrash:
    """Stopped between two steps: a set is listed when it is complete, and never before."""

    def test_before_the_intent(self, repository: Repository) -> None:
        os.mkdir(repository.staging("web01", "s1"))
        assert repository.shelf("web01") == repository_repository.VmRecords()
        repository.begin(intent())
        assert repository.shelf("web01").intents == (intent(),)

    def test_in_the_middle_of_writing_the_intent(self, repository: Repository) -> None:
        os.mkdir(repository.staging("web01", "s1"))
        with open(repository.staging("web01", "s1") + "/intent.json.new", "w", encoding="utf-8") as half:
            half.write('{"schema": 1, "run"')
        repository.begin(intent())
        assert repository.shelf("web01").intents == (intent(),)
        assert os.listdir(repository.staging("web01", "s1")) == ["intent.json"]

    def test_while_the_images_grow(self, repository: Repository) -> None:
        begin(repository, intent())
        shelf = repository.shelf("web01")
        assert (shelf.sets, shelf.described) == ((), frozenset())
        with pytest.raises(FileExistsError):
            repository.begin(intent(attempt="a2"))

    def test_between_manifest_and_rename(self, repository: Repository) -> None:
        begin(repository, intent())
        repository.describe(intent(), manifest(intent()))
        shelf = repository.shelf("web01")
        assert (shelf.sets, shelf.intents, shelf.described) == ((), (intent(),), frozenset({"a1"}))
        assert repository.publish(intent()).sequence == 1

    def test_between_rename_and_tidying_up(self, repository: Repository) -> None:
        repository.record_failure("web01", FAILURE)
        begin(repository, intent())
        repository.describe(intent(), manifest(intent()))
        repository.publish(intent())
        assert [found.id for found in repository.shelf("web01").sets] == ["s1"]
        assert repository.shelf("web01").intents == ()
        for path in ("s1/intent.json.new", ".s1.failed.json.new"):
            with open(os.path.join(repository.directory("web01"), path), "w", encoding="utf-8"):
                pass
        assert repository.untidy("web01", "s1")
        repository.tidy("web01", "s1")
        assert not repository.untidy("web01", "s1")
        assert sorted(os.listdir(repository.directory("web01"))) == ["s1"]
        assert sorted(os.listdir(repository.set_path("web01", "s1"))) == ["manifest.json", "vda.qcow2"]

    def test_in_the_middle_of_discarding(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        begin(repository, intent())
        unlink = os.unlink
        removed = []

        def dying_unlink(path: str) -> None:
            if removed:
                raise KeyboardInterrupt
            removed.append(path)
            unlink(path)

        monkeypatch.setattr(os, "unlink", dying_unlink)
        with pytest.raises(KeyboardInterrupt):
            repository.discard(intent())
        # The intent goes last: what is left is known to be ours.
        assert repository.shelf("web01").intents == (intent(),)
        monkeypatch.undo()
        repository.discard(intent())
        assert os.listdir(repository.directory("web01")) == []


def test_another_attempts_staging_is_not_discarded(repository: Repository) -> None:
    begin(repository, intent())
    repository.discard(intent(attempt="a2"))
    assert repository.shelf("web01").intents == (intent(),)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": "1"}', "null"])
def test_a_directory_without_a_valid_manifest_is_no_set(repository: Repository, content: str) -> None:
    os.mkdir(repository.set_path("web01", "s1"))
    with open(repository.set_path("web01", "s1") + "/manifest.json", "w", encoding="utf-8") as broken:
        broken.write(content)
    shelf = repository.shelf("web01")
    assert (shelf.sets, shelf.strays) == ((), {"s1"})


def test_a_set_under_another_name_is_no_set(repository: Repository) -> None:
    publish(repository, intent())
    os.rename(repository.set_path("web01", "s1"), repository.set_path("web01", "renamed"))
    assert repository.shelf("web01").sets == ()


def test_what_later_releases_add_is_left_alone(repository: Repository) -> None:
    publish(repository, intent())
    path = repository.set_path("web01", "s1") + "/manifest.json"
    os.chmod(path, 0o600)
    with open(path, encoding="utf-8") as source:
        content = json.load(source)
    with open(path, "w", encoding="utf-8") as sink:
        json.dump({**content, "colour": "blue"}, sink)
    assert [found.id for found in repository.shelf("web01").sets] == ["s1"]
    with open(path, "w", encoding="utf-8") as sink:
        json.dump({**content, "schema": 2}, sink)
    with pytest.raises(BackupError, match=r"update vmfleet\.backup"):
        repository.shelf("web01")


def test_publishing_never_replaces_anything(repository: Repository) -> None:
    begin(repository, intent())
    repository.describe(intent(), manifest(intent()))
    # rename(2) would take an empty directory's place.
    os.mkdir(repository.set_path("web01", "s1"))
    with pytest.raises(BackupError, match="move it away"):
        repository.publish(intent())


def test_modes(repository: Repository) -> None:
    begin(repository, intent())
    assert stat.S_IMODE(os.stat(repository.staging("web01", "s1")).st_mode) == 0o700
    repository.describe(intent(), manifest(intent()))
    repository.publish(intent())
    for name in ("manifest.json", "vda.qcow2"):
        assert stat.S_IMODE(os.stat(repository.set_path("web01", "s1") + "/" + name).st_mode) == 0o440


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
        assert not repository.untidy("nobody", "s1")
        repository.tidy("nobody", "s1")
        publish(repository, intent())
        assert not repository.untidy("web01", "s1")

    def test_leftovers_of_whatever_set(self, repository: Repository) -> None:
        publish(repository, intent())
        left = (".s0.staging/vda.qcow2", ".s9.staging/intent.json.new", ".s5.failed.json.new", ".s4.removed/vda.qcow2")
        self.touch(repository, *left)
        assert repository.untidy("web01", "s1")
        repository.tidy("web01", "s1")
        assert not repository.untidy("web01", "s1")
        assert self.entries(repository) == {"s1"}

    def test_what_others_are_at_stays(self, repository: Repository) -> None:
        publish(repository, intent())
        begin(repository, intent(id="s2", attempt="a2"))
        repository.record_failure("web01", replace(FAILURE, id="s3"))
        self.touch(repository, ".lock", ".snapshot/hourly", "notes.txt")
        assert not repository.untidy("web01", "s1")
        repository.tidy("web01", "s1")
        there = {".lock", ".snapshot", "notes.txt", "s1", ".s2.staging", ".s3.failed.json"}
        assert self.entries(repository) == there
        assert [found.id for found in repository.shelf("web01").intents] == ["s2"]
        assert [found.id for found in repository.shelf("web01").failures] == ["s3"]

    def test_ids_that_look_like_leftovers(self, repository: Repository) -> None:
        ids = ["x.new", "a.failed.json", "b.staging", "c.removed", "d.failed.json.new", "intent.json", "manifest.json"]
        for number, set_id in enumerate(ids):
            publish(repository, intent(id=set_id, attempt=f"a{number}"))
            # And one that is being made, and one that has failed, under names made of these.
            begin(repository, intent(id=f"{set_id}.2", attempt=f"b{number}"))
            repository.record_failure("web01", replace(FAILURE, id=f"{set_id}.3"))
        for set_id in ids:
            assert not repository.untidy("web01", set_id)
            repository.tidy("web01", set_id)
        shelf = repository.shelf("web01")
        assert [found.id for found in shelf.sets] == ids
        assert {found.id for found in shelf.intents} == {f"{set_id}.2" for set_id in ids}
        assert {found.id for found in shelf.failures} == {f"{set_id}.3" for set_id in ids}
        assert shelf.strays == set()


class TestNotes:
    """While an increment becomes a full image, its file tells which of the two it is."""

    @pytest.mark.parametrize(
        ("content", "level"), [(b"abc", "incremental"), (b"abcde", "full"), (b"", "incremental"), (None, "incremental")]
    )
    def test_which_image_it_is(self, repository: Repository, content: bytes | None, level: str) -> None:
        increment = replace(IMAGE, level="incremental", parent=Parent("s0", None, "a0"))
        begin(repository, intent())
        repository.describe(intent(), replace(manifest(intent()), disks=(increment,)))
        repository.publish(intent())
        image = os.path.join(repository.set_path("web01", "s1"), "vda.qcow2")
        os.unlink(image)
        if content is not None:
            with open(image, "wb") as file:
                file.write(content)
        repository.write_note("web01", Consolidation("s1", "a1", replace(IMAGE, bytes=5)))
        [found] = repository.shelf("web01").sets
        assert (found.disks[0].level, found.disks[0].parent is None) == (level, level == "full")


class TestLitterThatStays:
    """What cannot be removed is in nobody's way."""

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
    def test_of_a_set(self, repository: Repository, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        publish(repository, intent())
        unlink = os.unlink

        def busy(path: str) -> None:
            if path.endswith(".nfs0001"):
                raise OSError(code, os.strerror(code), path)
            unlink(path)

        with open(os.path.join(repository.set_path("web01", "s1"), ".nfs0001"), "w", encoding="utf-8"):
            pass
        monkeypatch.setattr(os, "unlink", busy)
        left = os.path.join(repository.directory("web01"), ".s1.removed")
        assert repository.remove_set("web01", "s1") == f"{left}/.nfs0001 cannot be removed ({os.strerror(code)})"
        assert os.listdir(left) == [".nfs0001"]
        repository.tidy("web01", "s2")
        assert repository.litter("web01") == [left]
        monkeypatch.undo()
        repository.tidy("web01", "s2")
        assert os.listdir(repository.directory("web01")) == []

    def test_of_an_attempt(self, repository: Repository) -> None:
        begin(repository, intent())
        stray = os.path.join(repository.staging("web01", "s1"), "mine")
        os.mkdir(stray)
        repository.discard(intent())
        assert repository.litter("web01") == [repository.staging("web01", "s1")]
        with pytest.raises(BackupError, match=rf"^VM web01: {stray} cannot be removed \(Is a directory\); remove it"):
            repository.begin(intent())
        os.rmdir(stray)
        repository.begin(intent())

    def test_a_repository_that_gives_out_is_an_error(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(repository, intent())

        def broken(path: str) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        monkeypatch.setattr(os, "unlink", broken)
        with pytest.raises(OSError, match="Input/output error"):
            repository.remove_set("web01", "s1")


class TestDamage:
    """What an image's metadata tells without its being read."""

    def damage(self, repository: Repository) -> str:
        [found] = repository.shelf("web01").sets
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
        first = repository.shelf("web01")
        monkeypatch.setattr(json_file, "read_document", lambda *_args: pytest.fail("read again"))
        assert repository.shelf("web01") == first

    def test_a_changed_one_is(self, repository: Repository) -> None:
        publish(repository, intent())
        assert [found.consistency for found in repository.shelf("web01").sets] == ["crash"]
        path = repository.set_path("web01", "s1") + "/manifest.json"
        with open(path, encoding="utf-8") as source:
            content = source.read()
        status = os.stat(path)
        os.unlink(path)
        with open(path, "w", encoding="utf-8") as sink:
            # Of the same length, and made to look as old.
            sink.write(content.replace('"crash"', '"clash"'))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert [found.consistency for found in repository.shelf("web01").sets] == ["clash"]
        os.truncate(path, 10)
        assert repository.shelf("web01").strays == {"s1"}
        os.unlink(path)
        assert repository.shelf("web01").sets == ()

    def test_one_that_takes_the_place_of_a_removed_one(self, repository: Repository) -> None:
        publish(repository, intent())
        repository.shelf("web01")
        repository.remove_set("web01", "s1")
        assert repository.shelf("web01").sets == ()
        publish(repository, intent(attempt="a2"))
        assert [found.attempt for found in repository.shelf("web01").sets] == ["a2"]


def test_promised_is_what_is_not_allocated_yet(repository: Repository) -> None:
    begin(repository, intent())
    allocated = os.stat(repository.image_path(intent(), "vda.qcow2")).st_blocks * 512
    assert repository.outstanding(intent()) == (1 << 20) - allocated


def test_nothing_is_promised_to_a_set_that_has_come_to_its_end(repository: Repository) -> None:
    assert repository.outstanding(intent()) == 0


class TestRepository:
    def test_is_made_once(self, tmp_path: Path) -> None:
        first = create_repository(str(tmp_path / "new"))
        assert create_repository(str(tmp_path / "new")) == first == open_repository(str(tmp_path / "new"))
        assert os.listdir(tmp_path / "new") == ["vmfleet.json"]
        assert len(first.tag) == 8

    def test_a_creator_that_died_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / ".vmfleet.json.0123").touch()
        create_repository(str(tmp_path))
        assert os.listdir(tmp_path) == ["vmfleet.json"]

    def test_missing_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(BackupError, match="mounted"):
            find_repository(str(tmp_path), create=False)

    def test_is_not_made_by_looking(self, tmp_path: Path) -> None:
        assert find_repository(str(tmp_path / "new"), create=True) == Repository(str(tmp_path / "new"), "")
        assert os.listdir(tmp_path) == []

    def test_is_not_made_among_other_things(self, tmp_path: Path) -> None:
        (tmp_path / "holiday.jpg").touch()
        with pytest.raises(BackupError, match=r"holiday\.jpg"):
            check_creatable(str(tmp_path))

    def test_lost_and_found_is_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "lost+found").mkdir()
        check_creatable(str(tmp_path))

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "uuid": "no"}'])
    def test_broken(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "vmfleet.json").write_text(content)
        with pytest.raises(BackupError, match="cannot be read"):
            open_repository(str(tmp_path))

    def test_newer(self, tmp_path: Path) -> None:
        (tmp_path / "vmfleet.json").write_text('{"schema": 2, "uuid": ""}')
        with pytest.raises(BackupError, match=r"update vmfleet\.backup"):
            open_repository(str(tmp_path))

    def test_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_args: False)
        with pytest.raises(BackupError, match="not writable"):
            check_writable(str(tmp_path))


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

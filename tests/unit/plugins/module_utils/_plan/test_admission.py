# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether QEMU would be given the images of a set: on which file that is asked, and what is left of it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import ADMITTED, Admission, Label, Sample
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import admission
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.admission import with_admission
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.observe import with_records
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import HERE, begin, intent, vm

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

QEMU = Label("system_u:system_r:svirt_t:s0:c1,c2")
REFUSED = Admission("not given", "system_u:object_r:var_t:s0", "system_u:object_r:svirt_image_t:s0:c1,c2")


class Asked:
    """Where it was asked about QEMU: the directory of the file, and what messages name."""

    def __init__(self) -> None:
        self.places: list[tuple[str, str]] = []
        self.images: list[str] = []

    def admit(self, _qemu: Label, sample: Sample, images: Collection[str] = ()) -> Admission:
        assert sample.spare
        os.write(sample.fd, b"x")
        name = os.readlink(f"/proc/self/fd/{sample.fd}")
        self.places.append((os.path.dirname(name), sample.place))
        self.images += images
        return REFUSED


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(admission, "label_of", lambda _process: QEMU)
    monkeypatch.setattr(admission, "open_labels", lambda process, files: [f"{process} {files}"])
    monkeypatch.setattr(admission, "admit", made.admit)
    return made


def test_is_asked_where_the_set_would_grow(asked: Asked, repository: Repository) -> None:
    os.mkdir(repository.directory("web01"))
    seen = Observation(vm(files=("/images/web01.qcow2",)))
    assert seen.vm
    assert seen.vm.process
    assert with_admission(seen, repository, "web01").admission == REFUSED
    assert asked.places == [(repository.directory("web01"), repository.path)]
    assert asked.images == [f"{seen.vm.process.pid} {seen.vm.files}"]
    assert os.listdir(repository.directory("web01")) == []


def test_first_set_of_a_vm(asked: Asked, repository: Repository) -> None:
    before = os.listdir(repository.path)
    assert with_admission(Observation(vm()), repository, "web01").admission == REFUSED
    assert asked.places == [(repository.path, repository.path)]
    assert os.listdir(repository.path) == before


def test_repository_that_is_to_be_made(asked: Asked, tmp_path: Path) -> None:
    path = str(tmp_path / "srv" / "backup")
    assert with_admission(Observation(vm()), Repository(path, ""), "web01").admission == REFUSED
    assert asked.places == [(str(tmp_path), path)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seen", [Observation(), Observation(vm(process=None))], ids=["off", "over TCP"])
def test_nobody_knows_which_qemu_it_is(asked: Asked, repository: Repository, seen: Observation) -> None:
    assert with_admission(seen, repository, "web01") == seen
    assert not asked.places


@pytest.mark.parametrize("label", ["", "unconfined", "libvirt-1 (complain)"])
def test_qemu_that_is_not_confined(
    asked: Asked, repository: Repository, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    monkeypatch.setattr(admission, "label_of", lambda _process: Label(label))
    assert with_admission(Observation(vm()), repository, "web01").admission == ADMITTED
    assert not asked.places


def test_place_in_which_nothing_can_be_made(
    asked: Asked, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever needs it says so. A set that is being made needs it no more."""

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(admission, "scratch", full)
    assert with_admission(Observation(vm()), repository, "web01").admission == ADMITTED
    assert not asked.places


def test_is_asked_only_where_a_set_may_begin(asked: Asked, repository: Repository) -> None:
    assert with_records(repository, Observation(vm()), "web01", HERE)[0].admission == REFUSED
    assert with_records(repository, Observation(vm()), "web01", HERE, damage=False)[0].admission == ADMITTED
    begin(repository, intent())
    assert with_records(repository, Observation(vm()), "web01", HERE)[0].admission == ADMITTED
    assert len(asked.places) == 1

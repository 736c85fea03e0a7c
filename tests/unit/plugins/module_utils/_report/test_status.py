# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The status of a VM: what its run says, and what its sets say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import Outcome, VmState, results
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import this_machine
from ansible_collections.vmfleet.backup.plugins.module_utils._report.status import (
    ABSENT,
    made_here,
    status_from_repository,
    status_from_result,
    status_of_absent,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import Depth, Verification
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Hypervisor
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.published import write_annotation
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import ELSEWHERE, image, manifest, put

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository

VM = "web01"


def publish(repository: Repository, number: int, below: str | None = None, **values: Any) -> Manifest:
    """Put a set into a repository, with an image of three bytes."""
    made = manifest(f"s{number}", image("vda", below, bytes=3), sequence=number, **values)
    put(repository, made, b"abc")
    return made


def verify(repository: Repository, made: Manifest, depth: Depth, when: str, *errors: str) -> None:
    write_annotation(repository, VM, Verification(made.id, made.attempt, depth, when, errors))


class TestRun:
    """What is known of a VM without its sets."""

    def test_what_a_run_says(self) -> None:
        outcome = Outcome(VM, "s1", VmState.FAILED, error="no space", warnings=("slow",), path="/b/s1")
        status = status_from_result(results([outcome])[0])
        assert (status["name"], status["state"], status["error"]) == (VM, "failed", "no space")
        assert (list(status["warnings"]), status["path"], status["changed"]) == (["slow"], "/b/s1", False)
        assert (status["set"], status["last"], status["damage"], status["verified_at"]) == (None, None, "", "")

    def test_what_a_run_leaves_out(self) -> None:
        status = status_from_result({"name": VM, "state": "skipped"})
        assert status == {**status_of_absent(VM), "state": "skipped"}
        assert status_of_absent(VM)["state"] == ABSENT

    @pytest.mark.parametrize(
        "result", [{}, {"name": VM}, {"name": VM, "state": ABSENT}, {"name": 1, "state": "failed"}]
    )
    def test_what_is_no_result_of_a_run(self, result: dict[str, Any]) -> None:
        with pytest.raises(Refused, match=r"^results: .* is no result of backup_set"):
            status_from_result(result)


class TestSets:
    """What is known of a VM from its sets."""

    def test_the_set_of_the_run_and_the_newest_one(self, repository: Repository) -> None:
        publish(repository, 1, started="2026-11-21T01:00:00Z")
        publish(repository, 2, "s1", started="2026-11-22T01:00:00Z", duration=60.0)
        status = status_from_repository(repository, VM, "s1")
        assert status["set"]["id"] == "s1"
        assert status["last"] == {
            "id": "s2",
            "started": "2026-11-22T01:00:00Z",
            "duration": 60.0,
            "bytes": 3,
            "level": "incremental",
            "consistency": "crash",
            "chain": 2,
            "verified": "",
        }
        assert (status["damage"], status["verified_at"]) == ("", "")

    def test_a_vm_without_sets(self, repository: Repository) -> None:
        assert status_from_repository(repository, VM, "s1") == {
            "set": None,
            "last": None,
            "damage": "",
            "verified_at": "",
        }

    def test_the_newest_good_set_is_not_a_damaged_one(self, repository: Repository) -> None:
        first = publish(repository, 1)
        second = publish(repository, 2)
        verify(repository, first, Depth.IMAGE, "2026-11-23T00:00:00Z")
        verify(repository, second, Depth.CHECKSUM, "2026-11-24T00:00:00Z", "disk vda: it has changed")
        status = status_from_repository(repository, VM, "s2")
        assert (status["set"]["verified"], status["damage"]) == ("", "disk vda: it has changed")
        assert (status["last"]["id"], status["last"]["verified"]) == ("s1", "image")
        # When a set was found to be damaged is not when one was found to be good.
        assert status["verified_at"] == "2026-11-23T00:00:00Z"

    def test_damage_of_an_older_set_is_not_that_of_the_newest(self, repository: Repository) -> None:
        first = publish(repository, 1)
        publish(repository, 2)
        verify(repository, first, Depth.CHECKSUM, "2026-11-24T00:00:00Z", "wrong")
        status = status_from_repository(repository, VM, "s2")
        assert (status["damage"], status["last"]["id"]) == ("", "s2")


def test_the_maker_of_the_newest_set_counts(repository: Repository) -> None:
    assert not made_here(repository, VM)
    publish(repository, 1, hypervisor=Hypervisor(*this_machine()))
    assert made_here(repository, VM)
    publish(repository, 2, hypervisor=ELSEWHERE)
    assert not made_here(repository, VM)
    publish(repository, 3, hypervisor=None)
    assert not made_here(repository, VM)

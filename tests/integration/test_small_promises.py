# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of a set that was not frozen, names that are as long as they can be, and times with units."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.library import NAME
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import ID

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def hypervisor(directory: Path) -> Hypervisor:
    return Hypervisor(directory)


def test_a_set_that_nobody_wanted_frozen_is_not_said_to_have_resisted(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name=NAME)
    asked = [str(vm.monitor)]
    assert hypervisor.run(sockets=asked).rc == 0
    assert hypervisor.sets.manifest(NAME, ID)["consistency_reason"] == (
        "the run that made the set did not ask to freeze the guest"
    )
    again = hypervisor.run(sockets=asked, quiesce="try")
    assert again.rc == 0, again.output
    assert (
        "were not frozen: the run that made the set did not ask to freeze the guest; for a set of a frozen guest use"
        " another id" in again.output
    )


def test_times_have_units(vms: Vms, hypervisor: Hypervisor) -> None:
    vm = vms.start(name=NAME)
    wrong = hypervisor.run(sockets=[str(vm.monitor)], timeout="soon")
    assert wrong.rc != 0
    assert "vm_backup_timeout is 'soon'. Give seconds, or a number with s, m, h or d" in wrong.output
    wrong = hypervisor.run(sockets=[str(vm.monitor)], stall_timeout="-1")
    assert "vm_backup_stall_timeout is '-1'" in wrong.output
    play = hypervisor.run(sockets=[str(vm.monitor)], timeout="10m", stall_timeout=90)
    assert play.rc == 0, play.output

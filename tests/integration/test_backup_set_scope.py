# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Workers where systemd is the init: they have a unit of their own, and do not end with that which has started them."""

from __future__ import annotations

import json
import sys
import tempfile
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import scope
from ansible_collections.vmfleet.backup.tests.harness import systemd
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import PACKAGE, ROOT, module_input, succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import SLOW, Sets
from ansible_collections.vmfleet.backup.tests.harness.systemd import Systemd
from ansible_collections.vmfleet.backup.tests.integration.test_backup_set_worker import frozen, release_next, states

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

# In this order: the VMs end before the systemd that they are processes of.
pytestmark = pytest.mark.usefixtures("init", "clean")

SCOPES = "vmfleet-backup-*.scope"


@pytest.fixture
def init(directory: Path, monkeypatch: pytest.MonkeyPatch) -> t.Iterator[Systemd]:
    """A systemd. What is made for a test is made where it can be seen from there."""
    if systemd.missing():
        pytest.skip(f"a systemd of the test's own needs {systemd.missing()}")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with Systemd(directory) as init:
        yield init


@pytest.fixture
def sets(init: Systemd, directory: Path) -> Sets:
    return Sets(directory / "repository", init.inside)


@pytest.fixture
def three(init: Systemd, vms: Vms) -> list[Qemu]:
    """VMs with small disks."""
    with init.inside.for_children():
        return [vms.start(vms.disk(number, size=8 * MIB), name=f"vm{number}") for number in range(3)]


def planned(sets: Sets, vms: list[Qemu], **options: t.Any) -> dict[str, t.Any]:
    found: dict[str, t.Any] = sets.plan(*vms, **{"speed": SLOW, "id": "s1", **options})["plan"]
    return found


def arguments(plan: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    return {"plan": plan, "state": "started", "max_vms": 1, "detach": "required", **options}


def leave(init: Systemd, args: dict[str, t.Any], *then: str, unit: str = "run-ansible.service") -> dict[str, t.Any]:
    """Leave the sets to a worker, in a unit that ends when the module has, or does that and no more."""
    module = [sys.executable, "-m", f"{PACKAGE}.backup_set"]
    given = [f"--unit={unit}", "--collect", f"--setenv=PYTHONPATH={ROOT}"]
    said = init.run("systemd-run", "--quiet", "--wait", "--pipe", *given, *module, stdin=module_input(args))
    found: dict[str, t.Any] = json.loads(said)
    return found


def follow(sets: Sets, *key: str) -> dict[str, t.Any]:
    wanted = {"worker": key[0], "wait": 60} if key else {}
    return succeed("backup_follow", {"repository": str(sets.path), **wanted}, inside=sets.inside)


def release_each(vms: list[Qemu]) -> None:
    """Let one copy after the other go on."""
    for _vm in vms:
        release_next(vms)


def test_outlives_the_unit_that_has_started_it(init: Systemd, three: list[Qemu], sets: Sets, directory: Path) -> None:
    copies = [frozen(vm, directory) for vm in three]
    result = leave(init, arguments(planned(sets, three)))
    assert not result.get("warnings"), result
    scope_of = f"vmfleet-backup-{result['worker']}.scope"
    assert init.units("run-ansible.service") == []
    assert init.units(SCOPES) == [scope_of]
    found = follow(sets)
    assert found["running"]
    assert init.unit_of(found["pid"]) == f"/system.slice/{scope_of}"
    # With the child that does the work.
    assert found["pid"] in init.processes(scope_of)
    assert len(init.processes(scope_of)) == 2
    assert init.show(scope_of, "Description") == f"Backup of VMs to {sets.path}, sets s1"
    release_each(three)
    assert states(follow(sets, result["worker"])) == ["published"] * 3
    for number, expected in enumerate(copies):
        sets.assert_good(f"vm{number}", expected, "s1")
    wait_until(lambda: not init.units(SCOPES), "the end of its unit")

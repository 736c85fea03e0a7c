# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_set with a list that has become wrong while a set is made: that one is completed, and none is begun."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import release, wait_concluded
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, SLOW, History, overwrite
from ansible_collections.vmfleet.backup.tests.harness.images import create
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

pytestmark = pytest.mark.usefixtures("clean")

UUIDS = ("4dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e", "5dd12fd7-7f5c-4a4b-a8b1-a4dd0de4ae6e")


@pytest.mark.parametrize("again", ["the same set", "another set"])
def test_an_excluded_disk_is_gone_meanwhile(vms: Vms, sets: Sets, directory: Path, again: str) -> None:
    """The list is of what is to be begun: what is being made comes to its end."""
    history = History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)
    vm = history.vm
    scratch = create(directory / "scratch.qcow2", SIZE)
    vm.qmp.execute(
        "blockdev-add", driver="qcow2", node_name="scratch", file={"driver": "file", "filename": str(scratch)}
    )
    overwrite(vm, 0xA1)
    entry = [{"monitor": str(vm.monitor), "exclude_disks": ["scratch"]}]
    history.freeze("s1", "drive0")
    plan = sets.plan(id="s1", vms=entry, speed=SLOW)["plan"]
    succeed("backup_set", {"plan": plan, "state": "started"})
    vm.qmp.execute("blockdev-del", node_name="scratch")
    release(vm)
    wait_concluded(vm)
    if again == "the same set":
        for _dummy in range(2):
            assert result_of(succeed("backup_set", {"plan": plan}), "web01")["state"] == "published"
    else:
        said = result_of(sets.fail(id="s2", vms=entry), "web01")["error"]
        assert "exclude_disks: VM web01 has no device 'scratch'" in said
    history.note("s1")
    assert not vm.block_jobs
    assert history.back_up("s2") == "incremental"
    history.check()


def test_the_list_has_another_uuid_meanwhile(vms: Vms, sets: Sets, directory: Path) -> None:
    """It is the VM of the set that the jobs are of. The next one is not begun of a VM that is not meant."""
    history = History(vms.start(vms.disk(size=SIZE), name="web01", uuid=UUIDS[0]), sets, directory)
    overwrite(history.vm, 0xA1)
    history.freeze("s1")
    sets.start(history.vm, id="s1", speed=SLOW)
    release(history.vm)
    wait_concluded(history.vm)
    entry = {"name": "web01", "monitor": f"unix:{history.vm.monitor}", "uuid": UUIDS[1]}
    said = f"vms: web01 is listed with uuid {UUIDS[1]}, and the VM at {entry['monitor']} has uuid {UUIDS[0]}"
    assert result_of(sets.fail(id="s2", vms=[entry]), "web01")["error"] == said
    history.note("s1")
    assert not history.vm.block_jobs
    # Nor is the set reported as one of the VM that is meant.
    assert result_of(sets.fail(id="s1", vms=[entry]), "web01")["error"] == said
    assert history.back_up("s2", vms=[{**entry, "uuid": UUIDS[0]}]) == "incremental"
    history.check()

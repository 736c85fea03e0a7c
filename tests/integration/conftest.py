# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the integration tests."""

from __future__ import annotations

import contextlib
import tempfile
import typing as t
from pathlib import Path

import pytest

# Before their import: a failed assertion in there is to tell what it saw.
pytest.register_assert_rewrite("ansible_collections.vmfleet.backup.tests.harness")

from ansible_collections.vmfleet.backup.tests.harness.backup import backup
from ansible_collections.vmfleet.backup.tests.harness.choice import leave_out
from ansible_collections.vmfleet.backup.tests.harness.fixtures import (
    Vms,
    clean,
    directory,
    libvirt,
    libvirt_bed,
    slow_look,
    start_module,
    storage,
    target,
    vm,
    vms,
)
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.hostile import Canary, Pair
from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.library import Chain, Library, prepared
from ansible_collections.vmfleet.backup.tests.harness.offline import OffHistory
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` takes some of these tests."""
    leave_out([item for item in items if item.path.parent == Path(__file__).parent])


__all__ = [
    "clean",
    "directory",
    "libvirt",
    "libvirt_bed",
    "slow_look",
    "start_module",
    "storage",
    "target",
    "vm",
    "vms",
]


@pytest.fixture
def sets(directory: Path) -> Sets:
    """A repository that is still to be made."""
    return Sets(directory / "repository")


@pytest.fixture
def history(vms: Vms, sets: Sets, directory: Path) -> History:
    """A VM of one disk of 8 MiB, `drive0`, node `n0`, without a set."""
    return History(vms.start(vms.disk(size=SIZE), name="web01"), sets, directory)


@pytest.fixture
def off(vms: Vms, sets: Sets, directory: Path) -> t.Iterator[OffHistory]:
    """A VM of two disks of 8 MiB, `drive0` and `drive1`, that is off and has no set. No storage daemon outlives it."""
    vm = vms.start(vms.disk(0, size=SIZE), vms.disk(1, size=SIZE), name="web01")
    vm.quit()
    found = OffHistory(vm, sets, directory)
    yield found
    if (sets.path / "vmfleet.json").exists():
        try:
            found.daemon.assert_gone()
        finally:
            found.daemon.end()


@pytest.fixture(scope="module")
def template() -> t.Iterator[Chain]:
    with prepared() as chain:
        yield chain


@pytest.fixture
def chain(template: Chain, directory: Path) -> Chain:
    """Three sets of a VM that is off."""
    return template.copied(directory)


@pytest.fixture
def living(vms: Vms, directory: Path) -> Chain:
    """Three sets of a VM that goes on."""
    return Chain(vms, directory)


@pytest.fixture
def where(directory: Path) -> Path:
    """An empty directory for what is restored."""
    path = directory / "restored"
    path.mkdir()
    return path


@pytest.fixture
def library(chain: Chain) -> Library:
    return chain.library


@pytest.fixture
def two(vms: Vms) -> Qemu:
    """A VM with two disks."""
    return vms.start(vms.disk(0), vms.disk(1))


@pytest.fixture
def full(vm: Qemu, target: Path) -> Path:
    """A full backup beside the target, with a bitmap `b0` that has recorded 3 MiB of writes since."""
    full = target.with_name("full.qcow2")
    vm.qmp.execute("block-dirty-bitmap-add", node="n0", name="b0", persistent=True)
    backup(vm, full)
    vm.write("drive0", 0x51, 6 * MIB, 3 * MIB)
    return full


@pytest.fixture
def canary(directory: Path) -> t.Iterator[Canary]:
    """A tree that is not touched, whatever the test does."""
    found = Canary(directory / "outside")
    yield found
    found.assert_untouched()


@pytest.fixture(scope="module")
def made() -> t.Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        yield Pair.made(Vms(Path(path), stack), Path(path))


@pytest.fixture
def pair(made: Pair, directory: Path) -> Pair:
    """A repository with sets of two VMs, which are up."""
    return made.copied(directory)

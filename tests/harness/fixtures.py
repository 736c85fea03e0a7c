# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures that end what they begin: no QEMU, module process, mount or file outlives its test.

A conftest.py imports the ones its tests use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.filesystems import FileSystem, LoopDevice, PassThrough
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk, Qemu


@pytest.fixture
def directory() -> t.Iterator[Path]:
    """An empty directory that an unprivileged QEMU may enter (pytest's own are closed to others)."""
    path = Path(tempfile.mkdtemp(prefix="vmfleet-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


class Storage:
    """Makes file systems and block devices below the test's directory."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack

    def mount(self, kind: str, size: int, name: str = "mnt") -> FileSystem:
        """Mount a new file system."""
        return self._stack.enter_context(FileSystem(self._directory / name, kind, size))

    def without_permissions(self, name: str = "mnt") -> Path:
        """Mount a file system that keeps no permissions; returns its path."""
        return self._stack.enter_context(PassThrough(self._directory / name, self._directory / f"{name}.below")).path

    def loop(self, size: int, name: str = "loop.img") -> Path:
        """Attach a new block device; returns its path."""
        return self._stack.enter_context(LoopDevice(self._directory / name, size)).path


@pytest.fixture
def storage(directory: Path) -> t.Iterator[Storage]:
    """File systems and block devices."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with contextlib.ExitStack() as stack:
        yield Storage(directory, stack)


class Vms:
    """Starts VMs and remembers them."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self.started: list[Qemu] = []

    def start(self, *disks: Disk, **options: t.Any) -> Qemu:
        """A VM with these disks, or with one of 64 MiB that holds 32 MiB of patterns."""
        vm = Qemu(*(disks or [self.disk()]), **options)
        self.started.append(vm)
        return self._stack.enter_context(vm)

    def disk(self, number: int = 0, size: int = 64 * MIB, **options: t.Any) -> Disk:
        """A disk `drive<n>`, node `n<n>`, with a patterned image of its own."""
        options = {"id": f"drive{number}", "node": f"n{number}", "format": "qcow2", **options}
        path = self._directory / f"source{number}.{options['format']}"
        return Disk(patterned(path, options["format"], size, seed=number * 16), **options)


@pytest.fixture
def vms(directory: Path, request: pytest.FixtureRequest) -> t.Iterator[Vms]:
    """VMs."""
    if "storage" in request.fixturenames:
        # A file system can only be unmounted once no QEMU has a file open there any more.
        request.getfixturevalue("storage")
    with contextlib.ExitStack() as stack:
        yield Vms(directory, stack)


@pytest.fixture
def vm(vms: Vms) -> Qemu:
    """One VM with one disk `drive0`, node `n0`."""
    return vms.start()


@pytest.fixture
def start_module() -> t.Iterator[t.Callable[..., ModuleProcess]]:
    """Starts modules that the test kills, or runs side by side."""
    started: list[ModuleProcess] = []

    def start(name: str, args: dict[str, t.Any], **options: t.Any) -> ModuleProcess:
        started.append(ModuleProcess(name, args, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def libvirt_bed() -> t.Iterator[Libvirt]:
    """A libvirtd of the module's own."""
    if os.geteuid() != 0:
        pytest.skip("libvirt's name spaces need root")
    with Libvirt() as bed:
        yield bed


@pytest.fixture
def libvirt(libvirt_bed: Libvirt, directory: Path) -> t.Iterator[Libvirt]:
    """The module's libvirtd, without domains; it does not see what is mounted for a test."""
    # Its domains end before their images are removed.
    assert directory.is_dir()
    yield libvirt_bed
    libvirt_bed.clear()


@pytest.fixture
def target(directory: Path) -> Path:
    """Where the backup goes, in a directory of its own."""
    (directory / "backups").mkdir(mode=0o700)
    return directory / "backups" / "disk.qcow2"


def leftovers(vm: Qemu, directory: Path) -> list[str]:
    """What a backup leaves behind when it is not cleaned up: in QEMU and on disk."""
    found = [f"job {job['device']}" for job in vm.block_jobs]
    found += [f"job {job['id']}" for job in vm.qmp.execute("query-jobs")]
    for fdset in vm.fdsets:
        found += [f"fdset {fd['opaque']}" for fd in fdset["fds"] if fd.get("opaque", "").startswith("vmfleet")]
    # The node of a job's filter or target; those of the VM's own disks are named or were there before.
    nodes = vm.qmp.execute("query-named-block-nodes", flat=True)
    names = [node["node-name"] for node in nodes if node["drv"] == "copy-before-write"]
    names += [node["node-name"] for node in nodes if node["node-name"].startswith("vmf.")]
    found += [f"node {name}" for name in names]
    found += [f"file {path}" for path in directory.rglob("*.partial")]
    return found


@pytest.fixture
def clean(vms: Vms, directory: Path) -> t.Iterator[t.Callable[[], None]]:
    """Asserts, when called and at the end of the test, that nothing is left in any VM or on disk."""

    def check() -> None:
        for vm in vms.started:
            if vm.alive:
                assert not leftovers(vm, directory)

    yield check
    check()


@pytest.fixture
def slow_look(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A look at where a disk has data that makes the first file when it begins, and ends when the second is there."""
    real, (begun, end) = shutil.which("qemu-img"), (directory / "begun", directory / "end")
    program = directory / "bin" / "qemu-img"
    program.parent.mkdir()
    wait = f"touch {begun}; while [ ! -e {end} ]; do sleep 0.02; done"
    program.write_text(f'#!/bin/sh\n[ "$1" != map ] || {{ {wait}; }}\nexec {real} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return begun, end

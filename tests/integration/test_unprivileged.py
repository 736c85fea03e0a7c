# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A user without any rights has a VM and a repository: on a machine, and as root of a container without other users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import typing as t
from pathlib import Path

import ansible
import pytest
import qemu.qmp

from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.modules import PACKAGE, ROOT, module_input
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

PYTHON = "/usr/bin/python3"
"""That of the tests may stand where only root can go."""
AS_USER = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
CONTAINER = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
WITH_A_RUN_OF_ITS_OWN = ["sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "container"]
WAYS = {"user": AS_USER, "container": [*AS_USER, *CONTAINER, *WITH_A_RUN_OF_ITS_OWN]}
DISKS = ("drive0", "drive1")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path(PYTHON).exists(), reason="needs root to become another user, and a Python for all"
)


@pytest.fixture(scope="module")
def library() -> t.Iterator[Path]:
    """What a module imports, where everybody can read it."""
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as found:
        path = Path(found)
        path.chmod(0o755)
        only_there = shutil.ignore_patterns("cli", "executor", "galaxy", "modules", "__pycache__")
        shutil.copytree(Path(str(ansible.__file__)).parent, path / "ansible", ignore=only_there)
        shutil.copytree(Path(str(qemu.qmp.__file__)).parent, path / "qemu" / "qmp")
        plugins = "ansible_collections/vmfleet/backup/plugins"
        shutil.copytree(ROOT / plugins, path / plugins)
        yield path


class User:
    """Somebody who has no rights but on a directory."""

    def __init__(self, way: list[str], library: Path, home: Path) -> None:
        self._way = way
        self._library = library
        self.home = home

    def ask(self, module: str, arguments: dict[str, t.Any]) -> dict[str, t.Any]:
        """Run a module to its end, whatever that is."""
        done = subprocess.run(
            [*self._way, PYTHON, "-B", "-m", f"{PACKAGE}.{module}"],
            input=module_input(arguments),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self._library), "HOME": str(self.home)},
            check=False,
        )
        assert done.stdout, done.stderr
        found: dict[str, t.Any] = json.loads(done.stdout)
        assert "Traceback" not in done.stdout + done.stderr
        return found

    def run(self, module: str, **arguments: t.Any) -> dict[str, t.Any]:
        """Run a module that has to succeed."""
        found = self.ask(module, arguments)
        assert not found.get("failed"), found["msg"]
        return found


@pytest.fixture
def home(directory: Path) -> Path:
    path = directory / "home"
    path.mkdir()
    shutil.chown(path, "nobody", "nogroup")
    return path


@pytest.mark.parametrize("way", WAYS)
def test_all_verbs(way: str, library: Path, home: Path, vms: Vms) -> None:
    user = User(WAYS[way], library, home)
    vm = vms.start(vms.disk(0, size=8 << 20), vms.disk(1, size=8 << 20), name="web01", unprivileged=True)
    repository = {"repository": str(home / "repository")}
    wanted = {**repository, "create_repository": True, "reserve": "0", "vms": [{"monitor": str(vm.monitor)}]}
    copies = {}
    for number in (1, 2, 3):
        vm.write("drive0", number, 0, 65536)
        copies = {disk.name: vm.freeze(disk, home.parent / f"{disk.name}.copy") for disk in vm.disks}
        plan = user.run("backup_plan", **wanted, id=f"s{number}")["plan"]
        [made] = user.run("backup_set", plan=plan)["vms"]
        assert (made["state"], made["level"]) == ("published", "full" if number == 1 else "incremental")
        for copy in copies.values():
            copy.replace(copy.with_suffix(f".{number}"))
    newest = {disk: home.parent / f"{disk}.3" for disk in DISKS}
    assert [one["id"] for one in user.run("backup_info", **repository)["sets"]] == ["s3", "s2", "s1"]
    for depth in ("manifest", "checksum", "image"):
        assert user.run("backup_verify", **repository, depth=depth)["bad"] == []
    pruned = user.run("backup_prune", **repository, keep_last=1, consolidate=True)
    assert [one["id"] for one in pruned["removed"]] == ["s1", "s2"]
    targets = [{"name": disk, "target": str(home / disk)} for disk in DISKS]
    user.run("backup_restore", **repository, vm="web01", disks=targets)
    overlays = [{"name": disk, "target": str(home / f"{disk}.overlay")} for disk in DISKS]
    user.run("backup_restore", **repository, vm="web01", disks=overlays, method="overlay")
    for disk, copy in newest.items():
        assert identical(copy, home / disk)
        assert identical(copy, home / f"{disk}.overlay")
    gone = user.run("backup_restore", **repository, vm="web01", disks=overlays, state="absent")["removed"]
    assert gone == [overlay["target"] for overlay in overlays]
    user.run("drive_backup", monitor=str(vm.monitor), device="drive0", target=str(home / "copy.qcow2"))
    assert identical(newest["drive0"], home / "copy.qcow2")
    user.run("backup_metrics", **repository, id="s3", results=[], directory=str(home))
    user.run("backup_report", id="s3", hypervisors={"hv1": {}}, directory=str(home / "reports"))
    assert user.run("backup_set", **repository, state="untracked", names=["web01"])["changed"]
    assert {path.owner() for path in home.rglob("*")} == {"nobody"}


def test_a_vm_is_started_as_a_user_that_there_is(library: Path, home: Path, vms: Vms) -> None:
    vm = vms.start(
        vms.disk(0, size=8 << 20),
        name="web01",
        machine="q35,accel=tcg",
        paused=True,
        unprivileged=True,
        extra=["-m", "64"],
    )
    user = User(WAYS["container"], library, home)
    repository = {"repository": str(home / "repository")}
    wanted = {**repository, "create_repository": True, "reserve": "0", "vms": [{"monitor": str(vm.monitor)}]}
    user.run("backup_set", plan=user.run("backup_plan", **wanted, id="s1")["plan"])
    boot = {**repository, "depth": "boot", "boot_pattern": "never", "boot_timeout": 1, "tmpdir": str(home)}
    refused = user.ask("backup_verify", boot)["msg"]
    assert "(boot_user): " in refused
    assert "name a user that can start it, such as root in a container that has no other" in refused
    assert "gave no sign of life" in user.ask("backup_verify", {**boot, "boot_user": "root"})["msg"]


def test_root_of_a_container_needs_a_place_for_locks(library: Path, home: Path, vms: Vms) -> None:
    vm = vms.start(vms.disk(0, size=8 << 20), name="web01", unprivileged=True)
    Path("/run/vmfleet-locks").mkdir(mode=0o700, exist_ok=True)
    user = User([*AS_USER, *CONTAINER], library, home)
    call = {"monitor": str(vm.monitor), "device": "drive0", "target": str(home / "copy.qcow2")}
    assert "this is root of a container: mount a /run of its own there" in user.ask("drive_backup", call)["msg"]

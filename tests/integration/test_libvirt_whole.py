# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a set has of a VM besides its disks: the domain, UEFI variables, the state of its TPM."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import typing as t
from pathlib import Path
from xml.etree.ElementTree import canonicalize

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import block_jobs
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.description import parse_description
from ansible_collections.vmfleet.backup.tests.harness.booting import boot
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import run_module
from ansible_collections.vmfleet.backup.tests.harness.old_version import OldVersion
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of
from ansible_collections.vmfleet.backup.tests.unit.test_schemas import load, strict

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="name spaces need root")

QEMU = "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>{}</qemu:commandline>"
ADDRESS = "libvirt:web01"
STATE = "tpm2-00.permall"


def described(sets: Sets, set_id: str = "s1") -> dict[str, t.Any]:
    """Return vm.json of a set, which is what its schema says and what is read back."""
    raw = (sets.directory("web01") / set_id / "vm.json").read_bytes()
    found: dict[str, t.Any] = json.loads(raw)
    strict(load("vm")).validate(found)
    assert parse_description(raw) == found
    return found


@as_root
def test_all_of_a_domain_is_in_its_set(libvirt: Libvirt, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = libvirt.define(
        "web01",
        DomainDisk(patterned(directory / "a.qcow2")),
        memory=64,
        nvram=True,
        tpm=True,
        devices="<graphics type='vnc' passwd='hunter2'/>",
        more=QEMU.format("<qemu:env name='API_TOKEN' value='hunter2'/>"),
    )
    # Its firmware would write its variables at any moment.
    domain.start("--paused")
    domain.virsh("snapshot-create-as", "before", "--disk-only", "--diskspec", f"vda,file={directory}/b.qcow2")
    domain.virsh("checkpoint-create-as", "mark")
    sets = Sets(directory / "repository", libvirt.inside)
    disk = domain.freeze("vda", directory / "vda.qcow2")
    sets.back_up(ADDRESS)
    assert identical(sets.directory("web01") / "s1" / "vda.qcow2", disk)
    assert identical(sets.directory("web01") / "s1" / "nvram.qcow2", domain.nvram, other_format="raw")
    found = described(sets)
    assert "hunter2" not in json.dumps(found)
    xml = domain.virsh("dumpxml", "--inactive")
    assert canonicalize(found["domain"]["xml"].replace("&lt;removed&gt;", "hunter2")) == canonicalize(xml)
    assert (found["domain"]["uri"], found["domain"]["snapshots"]) == ("qemu:///system", ["before"])
    assert found["domain"]["checkpoints"] == ["mark"]
    assert [entry for entry in found["removed"] if "domain" in entry] == [
        "domain: devices/graphics@passwd",
        "domain, QEMU's environment API_TOKEN",
    ]
    [layers] = [disk["layers"] for disk in found["disks"] if disk["name"] == "vda"]
    assert layers == [str(directory / "a.qcow2")]
    state = (domain.tpm / STATE).read_bytes()
    assert (found["tpm"]["backend"], found["tpm"]["directory"]) == (
        "emulator",
        f"/var/lib/libvirt/swtpm/{domain.uuid}/tpm2",
    )
    assert base64.b64decode(found["tpm"]["state"][STATE]) == state

    # What the guest tells its TPM while the set is prepared is in it, too.
    start_backups = block_jobs.start_backups

    async def write_and_start(*args: t.Any) -> None:
        (Path(found["tpm"]["directory"]) / STATE).write_bytes(state + b"new")
        await start_backups(*args)

    monkeypatch.setattr(block_jobs, "start_backups", write_and_start)
    sets.back_up(ADDRESS, id="s2")
    assert base64.b64decode(described(sets, "s2")["tpm"]["state"][STATE]) == state + b"new"
    assert {**described(sets, "s2"), "tpm": None, "taken": ""} == {**found, "tpm": None, "taken": ""}


@pytest.mark.thorough
@as_root
def test_a_throwaway_vm_has_the_firmware_and_the_variables_of_a_domain(libvirt: Libvirt, directory: Path) -> None:
    libvirt.start("web01", DomainDisk(patterned(directory / "a.qcow2", size=MIB)), memory=64, nvram=True, tpm=True)
    sets = Sets(directory / "repository", libvirt.inside)
    sets.back_up(ADDRESS)
    with tempfile.TemporaryDirectory(prefix="vt-") as place:
        asked = {"repository": str(sets.path), "names": ["web01"]}
        # There is nothing on its disk to boot, which the firmware says.
        asked |= boot(Path(place), boot_pattern="BdsDxe", boot_timeout=200)
        verified = run_module("backup_verify", asked, inside=libvirt.inside, timeout=240)
    assert verified["rc"] == 0, verified


@contextlib.contextmanager
def says_to_be_swtpm(socket: Path) -> t.Iterator[None]:
    """Somebody without rights, whose state of a TPM is not that of a VM."""
    with tempfile.TemporaryDirectory(prefix="vt-") as found:
        place = Path(found)
        place.chmod(0o755)
        program = shutil.copy("/bin/sh", place / "swtpm")
        (place / STATE).write_bytes(b"forged")
        says = ["--tpmstate", f"dir={place}", "--ctrl", f"type=unixio,path={socket}"]
        command = ["setpriv", "--reuid", "nobody", "--clear-groups", program, "-c", "read -r line", "swtpm", *says]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "swtpm\n", "the process")
            yield


def test_state_of_the_tpm_of_a_vm_without_libvirt(vms: Vms, directory: Path, tmp_path: Path) -> None:
    place = directory / "tpm"
    place.mkdir()
    socket = place / "swtpm.sock"
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={place}", "--ctrl", f"type=unixio,path={socket}"]
    with says_to_be_swtpm(socket), subprocess.Popen(command) as swtpm:
        wait_until(socket.exists, "the socket of swtpm")
        vm = vms.start(
            name="web01",
            machine="q35,accel=tcg",
            extra=[
                *("-chardev", f"socket,id=tpm0,path={socket}"),
                *("-tpmdev", "emulator,id=t0,chardev=tpm0", "-device", "tpm-tis,tpmdev=t0"),
            ],
        )
        sets = Sets(directory / "repository")
        wait_until((place / STATE).exists, "the state of the TPM")
        sets.back_up(vm)
        state = (place / STATE).read_bytes()
        found = described(sets)
        assert (found["domain"], found["tpm"]["directory"]) == (None, str(place))
        assert base64.b64decode(found["tpm"]["state"][STATE]) == state
        # It is no fault of a set to have more than an earlier release has known of.
        asked = {"repository": str(sets.path), "names": ["web01"], "depth": "image"}
        assert OldVersion(tmp_path).run("backup_verify", **asked)["results"]
        # It can be elsewhere, and then nobody can tell where: that is said.
        (place / STATE).rename(directory / STATE)
        [warning] = result_of(sets.back_up(vm, id="s2"), "web01")["warnings"]
        assert warning == f"the state of the TPM is not in the set: there is none in {place}"
        assert described(sets, "s2")["removed"] == [f"TPM state: there is none in {place}"]
        vm.kill()
        swtpm.kill()

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where the state of a TPM is looked for, and what is told where it cannot be read."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import Domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import DomainXml, Tpm
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.tpm import (
    STORE,
    describe_stored,
    describe_tpm,
    losses,
    renewed,
)
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor

if TYPE_CHECKING:
    from pathlib import Path

EMULATOR = {"model": "tpm-crb", "options": {"type": "emulator", "data": {"chardev": "tpm0"}}}


def describe(entry: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """Return what is told of the TPM of a process with these arguments, as it is a part of vm.json."""
    removed: list[str] = []
    with subprocess.Popen(["sh", "-c", "read -r line", "vm", *arguments], stdin=subprocess.PIPE) as process:
        wait_until(lambda: seen(process).arguments[:1] == ["sh"], "the process")
        found = vm(process=seen(process))
        tpm = asyncio.run(describe_tpm(monitor(FakeMonitor({"query-tpm": [entry]})), found, removed))
        process.kill()
    return {"tpm": tpm, "removed": removed}


def seen(process: subprocess.Popen[bytes]) -> Process:
    found = Process.of(process.pid)
    assert found
    return found


def test_chip_of_the_hypervisor() -> None:
    found = describe({"model": "tpm-tis", "options": {"type": "passthrough", "data": {}}})
    assert found["tpm"] == {"model": "tpm-tis", "backend": "passthrough", "directory": "", "state": {}}
    assert losses(found) == [
        "the state of the TPM is not in the set: it is in a chip of the hypervisor, which keeps it"
    ]
    assert renewed(found) is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--chardev", "socket,id=other,path=/run/x/s"], "the socket of its swtpm is not on the command line of QEMU"),
        (["-chardev", "socket,id=tpm0,path={}/s"], "there is none in {}"),
        (["-chardev", "socket,id=tpm0,path={}/gone/s"], "{}/gone cannot be read: "),
    ],
)
def test_state_that_cannot_be_found(tmp_path: Path, arguments: list[str], reason: str) -> None:
    found = describe(EMULATOR, *(word.format(tmp_path) for word in arguments))
    assert found["tpm"]["state"] == {}
    assert losses(found)[0].startswith(f"the state of the TPM is not in the set: {reason.format(tmp_path)}")


def test_state_of_a_vm_that_is_off_is_where_it_was_found() -> None:
    domain = Domain(DomainXml("a", UUID, tpm=Tpm("tpm-tis", "emulator", "2.0")))
    found = vm(uuid=UUID, domain=domain)
    for state, directory in (({"tpm2-00.permall": "AAE="}, "/gone"), ({}, STORE.format(UUID, "tpm2"))):
        # Where there was none, the directory was a guess.
        tpm = describe_stored(found, {"directory": "/gone", "state": state}, [])
        assert tpm
        assert tpm["directory"] == directory


def test_state_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"\0\1")
    (tmp_path / "tpm2-00.volatilestate").write_bytes(b"none of it")
    found = describe(EMULATOR, "-chardev", f"socket,id=tpm0,path={tmp_path}/s,server=off")
    assert found["tpm"]["state"] == {"tpm2-00.permall": "AAE="}
    assert renewed(found) is None
    (tmp_path / "tpm2-00.permall").write_bytes(b"\0\2")
    assert renewed(found) == {**found, "tpm": {**found["tpm"], "state": {"tpm2-00.permall": "AAI="}}}
    # What was read is not given up for nothing.
    (tmp_path / "tpm2-00.permall").unlink()
    assert renewed(found) is None

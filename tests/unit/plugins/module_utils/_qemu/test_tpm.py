# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where the state of a TPM is looked for, and what is told where it cannot be read."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import tpm as module
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import SYSTEM
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import Domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import DomainXml, Tpm
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import OFF
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.tpm import (
    LARGEST,
    describe_stored,
    describe_tpm,
    losses,
    renewed,
    tpm_warnings,
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
    assert asyncio.run(renewed(found)) is None


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


SESSION = "qemu+unix:///session?socket=/run/user/1/s"


@pytest.mark.parametrize(
    ("uri", "named", "states", "known", "used", "told"),
    [
        # The definition decides, also where there is no state yet.
        (SYSTEM[0], True, {"named": b"1", "own": b"2", "before": b"3"}, True, "named", ""),
        (SYSTEM[0], True, {"own": b"2", "before": b"3"}, True, "named", ""),
        (SESSION, True, {"named": b"1", "before": b"3"}, True, "named", ""),
        # Then it is where libvirt has it by itself.
        (SYSTEM[0], False, {"own": b"2"}, False, "own", ""),
        (SYSTEM[0], False, {"own": b"2"}, True, "own", ""),
        (SYSTEM[0], False, {"own": b"2", "before": b"2"}, True, "own", ""),
        (SYSTEM[0], False, {"own": b"2", "before": b"3"}, True, "own", "There is another one in {before}, where an"),
        (SYSTEM[0], False, {"before": b"3"}, True, "before", "in {before}, where an earlier set has found it, and it"),
        (SYSTEM[0], False, {}, True, "own", ""),
        # Where there was none, the directory was a guess.
        (SYSTEM[0], False, {"before": b"3"}, False, "own", ""),
        # That of the libvirt of a user is only known while the domain runs.
        (SESSION, False, {"own": b"2", "before": b"3"}, True, "before", ""),
        (SESSION, False, {}, True, "before", ""),
        (SESSION, False, {"before": b"3"}, False, "", ""),
    ],
)
def test_state_of_a_vm_that_is_off(
    uri: str,
    named: bool,
    states: dict[str, bytes],
    known: bool,
    used: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STORE", f"{tmp_path}/own")
    for name, state in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tpm2-00.permall").write_bytes(state)
    places = {"": "", **{name: str(tmp_path / name) for name in ("named", "own", "before")}}
    tpm = Tpm("tpm-tis", "emulator", "2.0", place=places["named"] if named else "")
    last = {"directory": places["before"], "state": {"tpm2-00.permall": "AAE="} if known else {}}
    removed: list[str] = []
    doubts: list[str] = []
    off = vm(uuid=UUID, domain=Domain(DomainXml("a", UUID, tpm=tpm)))
    found = asyncio.run(describe_stored(off, uri, last, removed, doubts))
    assert found
    assert found["directory"] == places[used]
    state = states.get(used)
    assert found["state"] == ({"tpm2-00.permall": base64.b64encode(state).decode()} if state else {})
    assert len(removed) == (state is None)
    assert [told.format(**places) in doubt for doubt in doubts] == [True] * bool(told)


def test_state_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"\0\1")
    (tmp_path / "tpm2-00.volatilestate").write_bytes(b"none of it")
    found = describe(EMULATOR, "-chardev", f"socket,id=tpm0,path={tmp_path}/s,server=off")
    assert found["tpm"]["state"] == {"tpm2-00.permall": "AAE="}
    assert asyncio.run(renewed(found)) is None
    (tmp_path / "tpm2-00.permall").write_bytes(b"\0\2")
    assert asyncio.run(renewed(found)) == {**found, "tpm": {**found["tpm"], "state": {"tpm2-00.permall": "AAI="}}}
    # What was read is not given up for nothing.
    (tmp_path / "tpm2-00.permall").unlink()
    assert asyncio.run(renewed(found)) is None


def test_state_that_is_larger_than_any(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(bytes(LARGEST))
    arguments = ("-chardev", f"socket,id=tpm0,path={tmp_path}/s")
    found = describe(EMULATOR, *arguments)
    assert len(base64.b64decode(found["tpm"]["state"]["tpm2-00.permall"])) == LARGEST
    (tmp_path / "tpm2-00.permall").write_bytes(bytes(LARGEST + 1))
    assert f"has more than {LARGEST} bytes" in losses(describe(EMULATOR, *arguments))[0]


@pytest.mark.parametrize(
    ("tpm", "uri", "told"),
    [
        (Tpm("tpm-tis", "emulator", place="file:///srv/tpm"), SYSTEM[0], "swtpm has it in one file, /srv/tpm, and"),
        (Tpm("tpm-tis", "external"), SYSTEM[0], "another program than libvirt starts its swtpm"),
        (
            Tpm("tpm-tis", "emulator"),
            "qemu+unix:///session?socket=/run/user/1/s",
            "the libvirt at qemu+unix:///session",
        ),
        (Tpm("tpm-tis", "passthrough"), SYSTEM[0], "it is in a chip of the hypervisor"),
    ],
)
def test_state_that_no_set_has(tpm: Tpm, uri: str, told: str) -> None:
    found = replace(vm(uuid=UUID, domain=Domain(DomainXml("a", UUID, tpm=tpm))), status=OFF)
    removed: list[str] = []
    assert asyncio.run(describe_stored(found, uri, None, removed, []))
    assert removed[0].startswith(f"TPM state: {told}")
    # The plan says it, too, but of a chip: that stays where it is.
    assert [told in warning for warning in tpm_warnings(found, uri)] == [True] * (tpm.backend != "passthrough")


def test_state_at_a_place_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tpm2-00.permall").write_bytes(b"\0\1")
    found = vm(uuid=UUID, domain=Domain(DomainXml("a", UUID, tpm=Tpm("tpm-tis", "emulator", place=str(tmp_path)))))
    stored = asyncio.run(describe_stored(found, "qemu+unix:///session", None, [], []))
    assert stored
    assert stored["state"] == {"tpm2-00.permall": "AAE="}
    assert tpm_warnings(found, "qemu+unix:///session") == []


def test_a_file_system_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_directory: str) -> None:
        threading.Event().wait()

    monkeypatch.setattr(module, "read_state", hang)
    monkeypatch.setattr(module, "TIMEOUT", 0.01)
    found = describe(EMULATOR, "-chardev", f"socket,id=tpm0,path={tmp_path}/s")
    assert losses(found)[0].endswith(f"{tmp_path} cannot be read: its file system has not answered within 0.01 s")

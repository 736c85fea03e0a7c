# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""vm_info: which VMs are asked, and what is told of those that do not answer."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, MonitorGone, Refused
from ansible_collections.vmfleet.backup.plugins.modules import vm_info
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, Node, answers, device, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> Any:
    """Run the module among VMs that all have one disk; those in C(errors) fail with theirs."""

    def call(errors: dict[str, Exception] | None = None, **params: Any) -> list[dict[str, Any]]:
        def connect(address: Address) -> FakeMonitor:
            fake = FakeMonitor({**answers([Node("n0")], [device("n0", "drive0")]), "qom-list": []})
            error = (errors or {}).get(str(address))
            if error:
                fake.answers["query-name"] = error
            return fake

        monkeypatch.setattr(vm_info, "Monitor", connect)
        given = {"monitors": [], "sockets": [], "domains": [], "exclude_domains": [], "libvirt_uri": "", **params}
        module = SimpleNamespace(params=given, warn=warnings.append)
        result = asyncio.run(vm_info.main_task(module))  # type: ignore[arg-type]
        assert not result["changed"]
        vms: list[dict[str, Any]] = result["vms"]
        return vms

    return call


def test_each_monitor_is_asked_once_in_the_order_of_addresses(run: Any, tmp_path: Path) -> None:
    for name in ("b.qmp", "a.qmp", "c.sock"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / name))
    found = run(monitors=[f"unix:{tmp_path}/b.qmp", "tcp:127.0.0.1:1"], sockets=[f"{tmp_path}/*.qmp", "/nowhere/*"])
    assert [vm["monitor"] for vm in found] == [
        "tcp:127.0.0.1:1",
        f"unix:{tmp_path}/a.qmp",
        f"unix:{tmp_path}/b.qmp",
    ]


def test_what_is_told_of_a_vm(run: Any) -> None:
    (found,) = run(monitors=["/run/a.qmp"])
    assert (found["name"], found["error"], found["agent"]) == ("web01", "", None)
    assert [disk["name"] for disk in found["disks"]] == ["drive0"]


@pytest.mark.parametrize("error", [MonitorGone("nobody listens"), refusal("Command query-name not found")])
def test_vm_that_does_not_answer_hides_no_other(error: BackupError, run: Any) -> None:
    dead, alive = run({"unix:/run/a.qmp": error}, monitors=["/run/b.qmp", "/run/a.qmp"])
    assert dead == {"monitor": "unix:/run/a.qmp", "error": str(error), "excluded": False}
    assert (alive["monitor"], alive["error"]) == ("unix:/run/b.qmp", "")


def test_a_defect_that_shows_with_one_vm_hides_no_other(run: Any, warnings: list[str]) -> None:
    odd, alive = run({"unix:/run/a.qmp": KeyError("node-name")}, monitors=["/run/b.qmp", "/run/a.qmp"])
    said = "unix:/run/a.qmp: internal error: KeyError('node-name'); report it with the warning"
    assert odd == {"monitor": "unix:/run/a.qmp", "error": said, "excluded": False}
    assert (alive["monitor"], alive["error"], alive["name"]) == ("unix:/run/b.qmp", "", "web01")
    (warning,) = warnings
    assert warning.startswith("unix:/run/a.qmp: Traceback")
    assert "KeyError: 'node-name'" in warning


@pytest.mark.parametrize("option", ["monitors", "sockets"])
def test_bad_address_is_refused_under_its_option(
    option: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.qmp").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as refused:
        run(**{option: ["a.qmp"]})
    assert refused.value.option == option


def test_many_vms_are_not_asked_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = most = 0

    class Monitor(FakeMonitor):
        async def __aenter__(self) -> FakeMonitor:
            nonlocal asked, most
            asked += 1
            most = max(most, asked)
            await asyncio.sleep(0)
            return self

        async def __aexit__(self, *_error: object) -> None:
            nonlocal asked
            asked -= 1

    monkeypatch.setattr(vm_info, "Monitor", lambda _address: Monitor({**answers([], []), "qom-list": []}))
    nothing = dict.fromkeys(("sockets", "domains", "exclude_domains"), ())
    params = {"monitors": [f"/run/{number}.qmp" for number in range(100)], **nothing, "libvirt_uri": ""}
    result = asyncio.run(vm_info.main_task(SimpleNamespace(params=params)))  # type: ignore[arg-type]
    assert len(result["vms"]) == 100
    assert most == vm_info.AT_ONCE

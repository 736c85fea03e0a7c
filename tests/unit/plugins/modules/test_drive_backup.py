# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""drive_backup: its arguments, and what it returns."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from ansible.module_utils.common.arg_spec import ModuleArgumentSpecValidator

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._common.options import duration
from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.request import Drive, DriveBackupRequest
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.plugins.modules import drive_backup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ansible_collections.vmfleet.backup.plugins.module_utils._drive_backup.session import Session

ONE = {"monitor": "/run/qemu/web01.qmp", "device": "drive0", "target": "/b/x.qcow2"}
TWO: dict[str, Any] = {
    "monitor": "/run/qemu/web01.qmp",
    "drives": [{"device": "drive0", "target": "/b/0"}, {"device": "drive1", "target": "/b/1"}],
}


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Any]:
    """Check arguments as Ansible does, against what main() gives it."""
    captured: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def capture(**options: Any) -> None:
        captured.update(options)
        raise Stop

    monkeypatch.setattr(drive_backup, "AnsibleModule", capture)
    with pytest.raises(Stop):
        drive_backup.main()
    assert captured.pop("supports_check_mode")
    return ModuleArgumentSpecValidator(**captured).validate


class TestArguments:
    def test_defaults(self, validate: Callable[[dict[str, Any]], Any]) -> None:
        result = validate(ONE)
        assert not result.error_messages
        assert drive_backup.drives(result.validated_parameters) == (Drive("drive0", "/b/x.qcow2"),)
        given = result.validated_parameters
        request = DriveBackupRequest(address=Address(path="/s"), drives=())
        for name in ("state", "completion_mode", "overwrite", "on_timeout"):
            assert given[name] == getattr(request, name)
        for name in ("timeout", "stall_timeout"):
            assert duration(name, given[name]) == getattr(request, name)

    def test_drive_takes_what_it_leaves_open_from_the_module(self, validate: Callable[[dict[str, Any]], Any]) -> None:
        asked = {
            **TWO,
            "speed": "50M",
            "compress": True,
            "drives": [
                TWO["drives"][0],
                {**TWO["drives"][1], "speed": "0", "compress": False, "sync": "bitmap", "bitmap": "b"},
            ],
            "bitmap_mode": "never",
        }
        result = validate(asked)
        assert not result.error_messages
        assert drive_backup.drives(result.validated_parameters) == (
            Drive("drive0", "/b/0", speed=50 * 1024 * 1024, compress=True, bitmap_mode="never"),
            Drive("drive1", "/b/1", sync="bitmap", bitmap="b", bitmap_mode="never"),
        )

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            ({"monitor": "/s"}, "one of the following is required: device, drives"),
            ({"monitor": "/s", "device": "drive0"}, "parameters are required together: device, target"),
            ({**TWO, "job_id": "j"}, "parameters are mutually exclusive: drives|job_id"),
            ({**TWO, "receipt": "/r"}, "parameters are mutually exclusive: drives|receipt"),
            ({**TWO, "device": "drive0", "target": "/b/x"}, "parameters are mutually exclusive: drives|device"),
            ({**TWO, "drives": [{"device": "drive0"}]}, "missing required arguments: target found in drives"),
            ({**ONE, "on_timeout": "wait"}, "value of on_timeout must be one of: cancel, leave"),
        ],
    )
    def test_refused_by_ansible(
        self, asked: dict[str, Any], reason: str, validate: Callable[[dict[str, Any]], Any]
    ) -> None:
        assert reason in "; ".join(validate(asked).error_messages)


COMMANDS = [{"execute": "drive-backup", "arguments": {}}]
JOB = {"target": "/b/x", "state": "completed", "device": "drive0"}


class TestMainTask:
    @pytest.fixture
    def run(self, validate: Callable[[dict[str, Any]], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        self.warned: list[str] = []
        self.requests: list[DriveBackupRequest] = []

        def call(outcome: Any, check_mode: bool = False, **params: Any) -> Any:
            async def back_up(session: Session) -> Any:
                """Take the place of the work."""
                self.requests.append(session.request)
                session.commands += COMMANDS
                session.warnings.append("mind the gap")
                session.changed = True
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            monkeypatch.setattr(drive_backup, "back_up", back_up)
            asked = {**ONE, "target": str(tmp_path / "x"), **params}
            if "drives" in asked:
                asked = {name: value for name, value in asked.items() if name not in ("device", "target")}
            module = SimpleNamespace(
                params=validate(asked).validated_parameters, check_mode=check_mode, warn=self.warned.append
            )
            return asyncio.run(drive_backup.main_task(module))  # type: ignore[arg-type]

        return call

    def test_result(self, run: Any) -> None:
        assert run([JOB]) == {
            "changed": True,
            "jobs": [JOB],
            "qmp": COMMANDS,
            "diff": {"before": "/b/x: not this backup\n", "after": "/b/x: completed, copy of drive0\n"},
        }
        assert self.warned == ["mind the gap"]

    @pytest.mark.parametrize("check_mode", [False, True])
    def test_request(self, check_mode: bool, run: Any) -> None:
        run([], check_mode=check_mode, state="started", overwrite=True, timeout=5, on_timeout="leave")
        [request] = self.requests
        assert str(request.address) == "unix:/run/qemu/web01.qmp"
        assert (request.state, request.overwrite, request.timeout, request.on_timeout, request.check_mode) == (
            "started",
            True,
            5.0,
            "leave",
            check_mode,
        )

    @pytest.mark.parametrize(
        ("details", "jobs"), [({}, []), ({"jobs": [JOB]}, [JOB])], ids=["before the start", "afterwards"]
    )
    def test_failure_tells_what_was_done(self, details: dict[str, Any], jobs: list[Any], run: Any) -> None:
        with pytest.raises(BackupError, match=r"^it broke$") as failed:
            run(BackupError("it broke", **details))
        assert failed.value.details == {"jobs": jobs, "changed": True, "qmp": COMMANDS}
        assert self.warned == ["mind the gap"]

    @pytest.mark.parametrize(
        ("params", "option"),
        [
            ({"timeout": -1}, "timeout"),
            ({"stall_timeout": -0.5}, "stall_timeout"),
            ({"monitor": "libvirt:a/b"}, "monitor"),
            ({"target": "nbd://host/export"}, "target"),
        ],
    )
    def test_refused_before_anything_is_done(self, params: dict[str, Any], option: str, run: Any) -> None:
        with pytest.raises(Refused) as refused:
            run(AssertionError("nothing is to be done"), **params)
        assert refused.value.option == option


def test_nothing_differs_where_nothing_has_changed() -> None:
    assert drive_backup.diff([JOB], changed=False) == dict.fromkeys(
        ("before", "after"), "/b/x: completed, copy of drive0\n"
    )

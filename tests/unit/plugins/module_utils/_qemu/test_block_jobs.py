# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Backup jobs: what is sent to QEMU, in which order, and what is taken back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError, CommandError, JobFailed
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import NO_DESCRIPTOR
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import block_jobs, target_image
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.bitmaps import bitmap_add
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.block_jobs import (
    ABORTED,
    BackupStart,
    Way,
    cancel_jobs,
    dismiss_jobs,
    rehearse_backups,
    remove_fdsets,
    remove_nodes,
    resume,
    set_speed,
    start_backups,
    stop_jobs,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.target_image import Target
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, job, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import (
    FakeMonitor,
    block_job,
    jobs,
    monitor,
    refusal,
)


def start(directory: Path, number: int = 0, **values: Any) -> BackupStart:
    path = directory / f"{number}.qcow2"
    path.touch()
    target = Target(str(path), "qcow2", MIB, **values)
    return BackupStart(f"j{number}", f"n{number}", target, f"vmfleet:db:{number}", {"sync": "full", "speed": 5})


def target_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The file node of a drive-backup's json: target."""
    node: dict[str, Any] = json.loads(arguments["target"][len("json:") :])["file"]
    return node


def begin(fake: FakeMonitor, *starts: BackupStart, **options: Any) -> None:
    asyncio.run(start_backups(monitor(fake), starts, **options))


class TestStart:
    def test_one(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"drive-backup": {}})
        begin(fake, start(tmp_path))
        (command, arguments), removal = fake.sent
        assert command == "drive-backup"
        file = target_of(arguments)
        assert (file["filename"], file["cache"]["direct"]) == ("/dev/fdset/0", True)
        assert {name: value for name, value in arguments.items() if name != "target"} == {
            "job-id": "j0",
            "device": "n0",
            "format": "qcow2",
            "mode": "existing",
            "auto-dismiss": False,
            "sync": "full",
            "speed": 5,
        }
        assert removal == ("remove-fd", {"fdset-id": 0})

    @pytest.mark.parametrize("compress", [False, True])
    def test_files_to_read_and_to_write_are_handed_over(self, compress: bool, tmp_path: Path) -> None:
        fake = FakeMonitor({"drive-backup": {}})
        before = len(os.listdir("/proc/self/fd"))
        begin(fake, start(tmp_path, compress=compress))
        ((opaque, flags),) = fake.passed
        assert opaque == "vmfleet:db:0"
        assert [flag & os.O_ACCMODE for flag in flags] == [os.O_RDONLY, os.O_RDWR]
        assert [bool(flag & os.O_DIRECT) for flag in flags] == [not compress] * 2
        assert len(os.listdir("/proc/self/fd")) == before

    @pytest.mark.parametrize(("place", "named"), [("/srv/backup", "/srv/backup"), ("", "{}")])
    def test_target_that_qemu_was_not_given(
        self, place: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Confined(FakeMonitor):
            async def add_fdset(self, fds: tuple[int, ...], opaque: str) -> int:
                await super().add_fdset(fds, opaque)
                raise refusal(NO_DESCRIPTOR, "add-fd")

        asked = []
        monkeypatch.setattr(block_jobs, "not_given", lambda *asks: asked.append(asks) or "SELinux does not let it")
        fake = Confined({}, process=Process(7, 1))
        with pytest.raises(BackupError, match=r"^SELinux does not let it$") as failure:
            begin(fake, replace(start(tmp_path), place=place))
        assert not isinstance(failure.value, CommandError)
        # The page cache would not help.
        assert len(fake.passed) == 1
        [(process, path, _fd, found)] = asked
        assert (process, path, found) == (7, f"{tmp_path}/0.qcow2", named.format(tmp_path))

    def test_another_refusal_of_a_file_is_qemus(self, tmp_path: Path) -> None:
        class Odd(FakeMonitor):
            async def add_fdset(self, *_arguments: object) -> int:
                raise refusal("fdset-id 7 is taken", "add-fd")

        with pytest.raises(CommandError, match="fdset-id 7 is taken"):
            begin(Odd({}), start(tmp_path))

    def test_several_are_one_transaction(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": {}})
        addition = {"type": "block-dirty-bitmap-add", "data": {"node": "n0", "name": "b"}}
        begin(
            fake,
            start(tmp_path, 0),
            start(tmp_path, 1, compress=True),
            completion_mode="individual",
            bitmap_actions=[addition],
        )
        assert fake.names() == ["transaction", "remove-fd", "remove-fd"]
        arguments = fake.sent[0][1]
        assert arguments["properties"] == {"completion-mode": "individual"}
        first, *backups = arguments["actions"]
        assert first == addition
        assert [action["type"] for action in backups] == ["drive-backup", "drive-backup"]
        assert [action["data"]["device"] for action in backups] == ["n0", "n1"]
        files = [target_of(action["data"]) for action in backups]
        assert [file["filename"] for file in files] == ["/dev/fdset/0", "/dev/fdset/1"]
        assert [file["cache"]["direct"] for file in files] == [True, False]

    def test_one_with_its_bitmap_is_a_transaction(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": {}})
        begin(fake, start(tmp_path), bitmap_actions=[{"type": "block-dirty-bitmap-add", "data": {}}])
        assert [action["type"] for action in fake.sent[0][1]["actions"]] == ["block-dirty-bitmap-add", "drive-backup"]

    def test_paths_where_files_cannot_be_handed_over(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"drive-backup": {}}, address="127.0.0.1")
        begin(fake, start(tmp_path))
        assert fake.names() == ["drive-backup"]
        assert target_of(fake.sent[0][1])["filename"] == str(tmp_path / "0.qcow2")
        assert not fake.passed

    def test_page_cache_serves_where_direct_access_is_refused(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": iter([refusal("Cannot use direct"), {}])})
        begin(fake, start(tmp_path, 0), start(tmp_path, 1, compress=True))
        assert fake.names() == ["transaction", "remove-fd", "remove-fd"] * 2
        attempts = [arguments["actions"] for command, arguments in fake.sent if command == "transaction"]
        direct = [[target_of(action["data"])["cache"]["direct"] for action in actions] for actions in attempts]
        assert direct == [[True, False], [False, False]]
        assert [bool(flags[0] & os.O_DIRECT) for _opaque, flags in fake.passed] == [True, False, False, False]

    def test_page_cache_serves_where_the_file_system_has_no_direct_access(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        really = target_image.open_pair

        def refuse(target: Target, direct: bool) -> tuple[int, int]:
            if direct:
                raise OSError(22, "Invalid argument")
            return really(target, direct)

        monkeypatch.setattr(block_jobs, "open_pair", refuse)
        fake = FakeMonitor({"drive-backup": {}})
        begin(fake, start(tmp_path))
        assert target_of(fake.sent[0][1])["cache"]["direct"] is False

    @pytest.mark.parametrize(("compress", "attempts"), [(True, 1), (False, 2)])
    def test_nothing_is_left_in_qemu_by_a_refusal(self, compress: bool, attempts: int, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": refusal("Image is not in qcow2 format")})
        with pytest.raises(CommandError, match="not in qcow2 format"):
            begin(fake, *(start(tmp_path, number, compress=compress) for number in range(2)))
        assert fake.names().count("transaction") == attempts
        assert len(fake.passed) == 2 * attempts
        assert not fake.fdsets

    def test_nothing_is_left_in_qemu_when_a_later_file_cannot_be_opened(self, tmp_path: Path) -> None:
        missing = start(tmp_path, 1)
        Path(missing.target.path).unlink()
        fake = FakeMonitor()
        with pytest.raises(FileNotFoundError):
            begin(fake, start(tmp_path, 0), missing)
        assert fake.passed
        assert not fake.fdsets


POLICY = "Deprecated command drive-backup disabled by policy"


class TestByNode:
    @pytest.mark.parametrize("words", [POLICY, "The command drive-backup has not been found"])
    def test_where_drive_backup_is_refused(self, words: str, tmp_path: Path) -> None:
        fake = FakeMonitor({"drive-backup": refusal(words), "blockdev-add": {}, "blockdev-backup": {}})
        begin(fake, start(tmp_path))
        assert fake.names() == ["drive-backup", "remove-fd", "blockdev-add", "blockdev-backup", "remove-fd"]
        told = dict(fake.sent)
        assert told["blockdev-add"]["node-name"] == told["blockdev-backup"]["target"] == "vmf.db.0"
        assert told["blockdev-add"]["file"]["filename"] == "/dev/fdset/1"
        assert told["blockdev-backup"] == {
            "sync": "full",
            "speed": 5,
            "job-id": "j0",
            "device": "n0",
            "auto-dismiss": False,
            "target": "vmf.db.0",
        }

    def test_page_cache_serves_there_too(self, tmp_path: Path) -> None:
        adding = iter([refusal("Cannot use direct"), {}])
        fake = FakeMonitor({"drive-backup": refusal(POLICY), "blockdev-add": adding, "blockdev-backup": {}})
        begin(fake, start(tmp_path))
        assert [bool(flags[0] & os.O_DIRECT) for _opaque, flags in fake.passed] == [True, True, False]
        assert not fake.fdsets

    def test_what_does_not_start_leaves_no_node(self, tmp_path: Path) -> None:
        answers = {"blockdev-add": {}, "blockdev-backup": refusal("no"), "blockdev-del": {}}
        fake = FakeMonitor({"drive-backup": refusal(POLICY), **answers})
        with pytest.raises(CommandError, match="no"):
            begin(fake, start(tmp_path))
        assert fake.names().count("blockdev-add") == fake.names().count("blockdev-del") == 2
        assert not fake.fdsets

    def test_rehearsal_leaves_none_and_tells_the_way(self, tmp_path: Path) -> None:
        refused = refusal("Deprecated value drive-backup disabled by policy")
        fake = FakeMonitor({"transaction": iter([refused, refusal(ABORTED)]), "blockdev-add": {}, "blockdev-del": {}})
        assert TestRehearsal.rehearse(fake, start(tmp_path)) == Way((True,), by_node=True)
        assert fake.names()[-1] == "blockdev-del"

    def test_a_busy_node_is_asked_to_go_again(self) -> None:
        listed = [{"node-name": "vmf.db.0"}]
        fake = FakeMonitor({"blockdev-del": iter([refusal("busy"), {}]), "query-named-block-nodes": listed})
        asyncio.run(remove_nodes(monitor(fake), ["vmf.db.0"]))
        assert fake.names().count("blockdev-del") == 2

    def test_one_that_is_gone_is_none_to_close(self) -> None:
        fake = FakeMonitor({"blockdev-del": refusal("not found"), "query-named-block-nodes": []})
        asyncio.run(remove_nodes(monitor(fake), ["vmf.db.0"]))


class TestRehearsal:
    @staticmethod
    def rehearse(fake: FakeMonitor, *starts: BackupStart) -> Any:
        fake.answers.setdefault("query-status", {"running": True})
        return asyncio.run(rehearse_backups(monitor(fake), starts, [bitmap_add("n0", "b", True)]))

    def test_same_transaction_that_ends_with_an_abort(self, tmp_path: Path) -> None:
        starts = [start(tmp_path, 0), start(tmp_path, 1)]
        played, rehearsed = FakeMonitor({"transaction": {}}), FakeMonitor({"transaction": refusal(ABORTED)})
        begin(played, *starts, completion_mode="individual", bitmap_actions=[bitmap_add("n0", "b", True)])
        self.rehearse(rehearsed, *starts)
        status, transaction, *removals = rehearsed.sent
        assert status == ("query-status", {})
        assert removals == [("remove-fd", {"fdset-id": 0}), ("remove-fd", {"fdset-id": 1})]
        *actions, last = transaction[1].pop("actions")
        assert last == {"type": "abort", "data": {}}
        assert actions == played.sent[0][1].pop("actions")
        assert transaction[1] == played.sent[0][1] == {"properties": {"completion-mode": "individual"}}

    def test_page_cache_serves_where_direct_access_is_refused(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": iter([refusal("Cannot use direct"), refusal(ABORTED)])})
        assert self.rehearse(fake, start(tmp_path)) == Way((False,))
        assert [bool(flags[0] & os.O_DIRECT) for _opaque, flags in fake.passed] == [True, False]
        assert not fake.fdsets

    @pytest.mark.parametrize("direct", [True, False])
    def test_what_it_has_found_out_is_not_tried_again(self, direct: bool, tmp_path: Path) -> None:
        fake = FakeMonitor({"drive-backup": refusal("no")})
        with pytest.raises(CommandError):
            begin(fake, start(tmp_path), way=Way((direct,)))
        assert [bool(flags[0] & os.O_DIRECT) for _opaque, flags in fake.passed] == [direct]

    def test_refusal_is_told_and_nothing_is_left(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"transaction": refusal("Bitmap 'b' could not be found")})
        with pytest.raises(CommandError, match="could not be found"):
            self.rehearse(fake, start(tmp_path))
        assert not fake.fdsets

    def test_paused_vm_is_not_asked(self, tmp_path: Path) -> None:
        fake = FakeMonitor({"query-status": {"running": False}})
        self.rehearse(fake, start(tmp_path))
        assert fake.names() == ["query-status"]
        assert not fake.passed


@pytest.mark.parametrize("version", ["7.2.22", "10.0.13", "10.1.0", "11.1.3"])
def test_no_qemu_is_told_to_go_on_with_a_broken_image(version: str, tmp_path: Path) -> None:
    offered = [
        {"name": "30", "meta-type": "object", "members": [{"name": "on-cbw-error", "type": "279"}]},
        {"name": "drive-backup", "meta-type": "command", "arg-type": "30", "ret-type": "0"},
    ]
    fake = FakeMonitor({"drive-backup": {}, "query-qmp-schema": offered}, version=version)
    begin(fake, start(tmp_path))
    assert "on-cbw-error" not in dict(fake.sent)["drive-backup"]


class Qemu:
    """Jobs that end when they are cancelled, after some further looks at them."""

    def __init__(self, *ids: str, looks: int = 0, refuses: bool = False) -> None:
        self.running = dict.fromkeys(ids, looks)
        self.cancelled: set[str] = set()
        self.refuses = refuses
        self.monitor = FakeMonitor({"query-block-jobs": self.query, "query-jobs": [], "block-job-cancel": self.cancel})

    def query(self, _arguments: dict[str, Any]) -> list[dict[str, Any]]:
        for name in self.cancelled:
            self.running[name] -= 1
        return [
            block_job(name, status="concluded" if name in self.cancelled and looks < 0 else "running")
            for name, looks in self.running.items()
        ]

    def cancel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        assert arguments["force"] is True
        self.cancelled.add(arguments["device"])
        if self.refuses:
            raise refusal("Job not found", "block-job-cancel")
        return {}


class TestCancel:
    @pytest.mark.parametrize("refuses", [False, True], ids=["running", "ended meanwhile"])
    def test_named_jobs_are_cancelled_once_and_waited_for(self, refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_jobs, "SETTLE_INTERVAL", 0)
        qemu = Qemu("a", "b", "other", looks=3, refuses=refuses)
        assert asyncio.run(cancel_jobs(monitor(qemu.monitor), ["a", "b", "gone"])) == ()
        assert [entry["arguments"]["device"] for entry in qemu.monitor.commands] == ["a", "b"]

    def test_job_that_does_not_end_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(block_jobs, "SETTLE_TIMEOUT", 0.1)
        qemu = Qemu("a", "b")
        qemu.running["b"] = 10**9
        left = asyncio.run(cancel_jobs(monitor(qemu.monitor), ["a", "b"]))
        assert [entry.id for entry in left] == ["b"]
        with pytest.raises(JobFailed, match=r"^unix:/run/qemu/web01\.qmp: job b does not end .*: its target hangs"):
            asyncio.run(stop_jobs(monitor(qemu.monitor), ["a", "b"]))

    def test_ended_jobs_are_left_alone(self) -> None:
        fake = FakeMonitor(jobs(block_job("a", status="concluded")))
        assert asyncio.run(cancel_jobs(monitor(fake), ["a"])) == ()


def test_only_ended_jobs_of_ours_are_dismissed() -> None:
    entries = [block_job("a", status="concluded"), block_job("b"), block_job("other", status="concluded")]
    dismissed = []

    def dismiss(arguments: dict[str, Any]) -> None:
        if arguments["id"] in ("b", "gone"):
            raise refusal("no such job, or it runs", "job-dismiss")
        dismissed.append(arguments["id"])

    fake = FakeMonitor({**jobs(*entries), "job-dismiss": dismiss})
    asyncio.run(dismiss_jobs(monitor(fake), ["a", "b", "gone"]))
    assert dismissed == ["a"]


def test_ended_job_that_cannot_be_dismissed_is_told() -> None:
    fake = FakeMonitor({**jobs(block_job("a", status="concluded")), "job-dismiss": refusal("no", "job-dismiss")})
    with pytest.raises(CommandError, match="job-dismiss"):
        asyncio.run(dismiss_jobs(monitor(fake), ["a"]))


def test_only_fdsets_of_ours_are_removed() -> None:
    found = vm(
        jobs=(job(),),
        fdsets={1: ("vmfleet:db:aa:0", "vmfleet:db:aa:0"), 2: ("serial0-source",), 3: ("vmfleet:db:bb:0",), 4: ()},
    )
    fake = FakeMonitor()
    asyncio.run(remove_fdsets(monitor(fake), found, "vmfleet:db:aa:"))
    assert fake.sent == [("remove-fd", {"fdset-id": 1})]


@pytest.mark.parametrize("there", [False, True])
def test_an_fdset_that_has_gone_by_itself_is_none_to_remove(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_fdset: int) -> None:
        raise refusal("not found", "remove-fd")

    fake = FakeMonitor({"query-fdsets": [{"fdset-id": 1}] if there else []})
    monkeypatch.setattr(fake, "remove_fdset", refuse)
    found = vm(fdsets={1: ("vmfleet:db:aa:0",)})
    with pytest.raises(CommandError) if there else contextlib.nullcontext():
        asyncio.run(remove_fdsets(monitor(fake), found, "vmfleet:db:aa:"))


@pytest.mark.parametrize("status", ["running", "waiting", "pending", "concluded"])
def test_speed_of_a_job_that_ends_meanwhile(status: str) -> None:
    fake = FakeMonitor({"block-job-set-speed": refusal("cannot accept"), **jobs(block_job("j0", status=status))})
    with pytest.raises(CommandError) if status == "running" else contextlib.nullcontext():
        asyncio.run(set_speed(monitor(fake), "j0", 5))


@pytest.mark.parametrize(("status", "commands"), [("io-error", ["cont"]), ("running", []), ("paused", [])])
def test_only_a_guest_that_an_error_has_stopped_is_resumed(status: str, commands: list[str]) -> None:
    fake = FakeMonitor({"query-status": {"status": status}, "cont": {}})
    asyncio.run(resume(monitor(fake)))
    assert fake.names() == ["query-status", *commands]

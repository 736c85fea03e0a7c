# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the exceptions read, and what becomes of them at a module's end."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import (
    BackupError,
    CommandError,
    JobFailed,
    MonitorGone,
    Refused,
    RepositoryHangs,
    after,
    in_words,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module


class Ended(Exception):
    """What exit_json and fail_json end with."""


class Module:
    """The two ends of an AnsibleModule without options."""

    def __init__(self) -> None:
        self.argument_spec: dict[str, Any] = {}
        self.params: dict[str, Any] = {}

    def exit_json(self, **values: Any) -> None:
        raise Ended("exit", values)

    def fail_json(self, **values: Any) -> None:
        raise Ended("fail", values)


def end_of(outcome: dict[str, Any] | Exception) -> tuple[Any, ...]:
    async def main(_module: Any) -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(Ended) as ended:
        run_module(Module(), main)  # type: ignore[arg-type]
    return ended.value.args


@pytest.mark.parametrize(
    ("outcome", "end"),
    [
        ({"changed": True}, ("exit", {"changed": True})),
        (
            BackupError("it broke", jobs=[1], changed=False),
            ("fail", {"msg": "it broke", "jobs": [1], "changed": False}),
        ),
        (MonitorGone("VM is off"), ("fail", {"msg": "VM is off"})),
        (Refused("target", "is taken"), ("fail", {"msg": "target: is taken"})),
        (
            CommandError("unix:/s", "drive-backup", "GenericError", "Compression is not supported for this drive "),
            ("fail", {"msg": "unix:/s: QEMU refused drive-backup: Compression is not supported for this drive"}),
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "/b/x"),
            ("fail", {"msg": "/b/x: the operating system refused: Read-only file system"}),
        ),
        (
            OSError(errno.EIO, os.strerror(errno.EIO)),
            ("fail", {"msg": "I/O: the operating system refused: Input/output error"}),
        ),
        (OSError("odd"), ("fail", {"msg": "I/O: the operating system refused: odd"})),
    ],
)
def test_end_of_a_module(outcome: dict[str, Any] | Exception, end: tuple[str, dict[str, Any]]) -> None:
    assert end_of(outcome) == end


def test_mistakes_of_ours_are_not_hidden() -> None:
    async def main(_module: Any) -> dict[str, Any]:
        raise KeyError("status")

    with pytest.raises(KeyError):
        run_module(Module(), main)  # type: ignore[arg-type]


class TestAfter:
    def test_first_things_first(self) -> None:
        with (
            pytest.raises(BackupError, match=r"^the first; and then: /b/x: No space left on device$"),
            after("the first"),
        ):
            raise OSError(errno.ENOSPC, "No space left on device", "/b/x")

    @pytest.mark.parametrize("kind", [JobFailed, RepositoryHangs])
    def test_kind_and_details_stay(self, kind: type[BackupError]) -> None:
        with pytest.raises(kind, match=r"^first; and then: second$") as failed, after(BackupError("first")):
            raise kind("second", jobs=[1])
        assert failed.value.details == {"jobs": [1]}

    def test_a_monitor_that_is_gone_is_the_matter_of_others(self) -> None:
        with pytest.raises(MonitorGone, match=r"^gone$"), after("first"):
            raise MonitorGone("gone")


@pytest.mark.parametrize(
    ("user", "code", "said"),
    [
        (0, errno.EACCES, "/a: Permission denied"),
        (65534, errno.EACCES, "/a: Permission denied (the user is nobody; ansible_become: true makes it root)"),
        (4000000, errno.EACCES, "/a: Permission denied (the user is 4000000; ansible_become: true makes it root)"),
        (65534, errno.EPERM, "/a: Operation not permitted (the user is nobody; ansible_become: true makes it root)"),
        (65534, errno.ENOSPC, "/a: No space left on device"),
    ],
)
def test_who_was_refused(monkeypatch: pytest.MonkeyPatch, user: int, code: int, said: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert in_words(OSError(code, os.strerror(code), "/a")) == said

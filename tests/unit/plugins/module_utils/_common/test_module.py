# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a module ends, by what it prints for Ansible."""

from __future__ import annotations

import json
import os
import typing as t

import pytest
from ansible.module_utils import basic

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._common.module import run_module
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level

WORDS: dict[str, t.Any] = {"level": Level.FULL, "levels": [Level.FULL, {"is": Level.AUTO}], "by": {Level.FULL: 1}}
PLAIN: dict[str, t.Any] = {"level": "full", "levels": ["full", {"is": "auto"}], "by": {"full": 1}}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> basic.AnsibleModule:
    """A module as Ansible starts it."""
    monkeypatch.setattr(basic, "_ANSIBLE_ARGS", b'{"ANSIBLE_MODULE_ARGS": {"password": "secret"}}')
    monkeypatch.setattr(basic, "_ANSIBLE_PROFILE", "legacy", raising=False)
    return basic.AnsibleModule(argument_spec={"password": {"no_log": True}})


def run(module: basic.AnsibleModule, capsys: pytest.CaptureFixture[str], end: dict[str, t.Any] | Exception) -> t.Any:
    """Run a module that ends like this; returns its exit status, and what it says."""

    async def main(given: basic.AnsibleModule) -> dict[str, t.Any]:
        assert given is module
        if isinstance(end, Exception):
            raise end
        return end

    with pytest.raises(SystemExit) as ended:
        run_module(module, main)
    said = json.loads(capsys.readouterr().out)
    # ansible-core 2.21 says it only where it is asked to.
    said.pop("invocation", None)
    return ended.value.code, said


def test_words_are_told_as_strings(module: basic.AnsibleModule, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(module, capsys, WORDS) == (0, PLAIN)
    assert run(module, capsys, BackupError("no", **WORDS)) == (1, {**PLAIN, "failed": True, "msg": "no"})


def test_names_of_files_are_told_as_they_are(module: basic.AnsibleModule, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.fsdecode(b"/b/\xff")
    assert run(module, capsys, {"path": path, "paths": (path,)}) == (0, {"path": path, "paths": [path]})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/b"), "/b: the operating system refused: Permission denied"),
        (OSError(5, "Input/output error"), "I/O: the operating system refused: Input/output error"),
        (OSError("odd"), "I/O: the operating system refused: odd"),
    ],
)
def test_what_the_operating_system_refuses(
    module: basic.AnsibleModule, capsys: pytest.CaptureFixture[str], error: OSError, said: str
) -> None:
    assert run(module, capsys, error) == (1, {"failed": True, "msg": said})


def test_warnings_are_told_however_it_ends(
    module: basic.AnsibleModule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    # Ansible keeps its warnings until the process ends.
    monkeypatch.setattr(module, "warn", said.append)
    monkeypatch.setattr(errors, "_warnings", {})
    for _again in range(2):
        errors.warn_once("/b", "/b: its file system does not keep permissions")
    for number, end in enumerate(({}, BackupError("no"), OSError("no")), 1):
        run(module, capsys, end)
        assert len(said) == number
        assert said[-1] == "/b: its file system does not keep permissions"

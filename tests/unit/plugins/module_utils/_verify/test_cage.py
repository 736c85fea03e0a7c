# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a program finds that runs in the cage."""

from __future__ import annotations

import json
import os
import pwd
import select
import socket
import subprocess
import sys
import types
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._verify import cage
from ansible_collections.vmfleet.backup.plugins.module_utils._verify.cage import User, caged, find_user, may_use_kvm

if t.TYPE_CHECKING:
    from pathlib import Path

LOOK = """
import json, os, resource, socket, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5).close()
    reached = True
except OSError:
    reached = False
print(json.dumps({
    "ids": [*os.getresuid(), *os.getresgid()], "groups": os.getgroups(), "nice": os.nice(0),
    "privileges": [status["NoNewPrivs"].strip(), status["CapEff"].strip(), status["CapBnd"].strip()],
    "core": resource.getrlimit(resource.RLIMIT_CORE), "reached": reached, "words": sys.argv[2:],
}))
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")


def look(user: User | None, *words: str) -> dict[str, t.Any]:
    """What is there in the cage, beside a listener on this machine that must not be reached."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Everybody may start it, unlike an interpreter of one's own.
        command = ["/usr/bin/python3", "-I", "-S", "-c", LOOK, str(listener.getsockname()[1]), *words]
        done = subprocess.run(caged(command, user, 3), capture_output=True, text=True, check=True)
    found: dict[str, t.Any] = json.loads(done.stdout)
    return found


@as_root
def test_as_root_it_is_another_user_without_any_privilege() -> None:
    user = find_user("", 0)
    nobody = pwd.getpwnam("nobody")
    assert user is not None
    assert (user.uid, user.gid) == (nobody.pw_uid, nobody.pw_gid)
    found = look(User(user.uid, user.gid, (4242,)), "a b", "-c", "")
    assert found["ids"] == [nobody.pw_uid] * 3 + [nobody.pw_gid] * 3
    assert found["groups"] == [4242]
    assert found["privileges"][:2] == ["1", "0" * 16]
    assert found["core"] == [0, 0]
    assert found["words"] == ["a b", "-c", ""]
    assert found["nice"] == os.nice(0) + 3
    assert not found["reached"]


@as_root
def test_as_root_by_wish_it_has_no_network_either() -> None:
    assert find_user("root", 0) is None
    found = look(None)
    assert found["ids"] == [0] * 6
    assert not found["reached"]


def test_it_inherits_what_it_is_handed_only(tmp_path: Path) -> None:
    with (tmp_path / "handed").open("w") as handed, (tmp_path / "other").open("w") as other:
        command = caged(["/bin/sh", "-c", f"echo x >/proc/self/fd/{handed.fileno()}; ls /proc/self/fd"], None, 0)
        done = subprocess.run(command, pass_fds=(handed.fileno(),), capture_output=True, text=True, check=True)
        assert str(other.fileno()) not in done.stdout.split()
    assert (tmp_path / "handed").read_text() == "x\n"


def test_a_program_that_cannot_be_started_is_told_of(tmp_path: Path) -> None:
    done = subprocess.run(caged([str(tmp_path / "none")], None, 0), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    who = f"user {os.geteuid()} (boot_user)"
    assert done.stderr == f"{tmp_path}/none cannot be started as {who}: No such file or directory\n"


def test_it_ends_with_its_parent() -> None:
    """Also where its user has changed, which the kernel takes as a reason to forget about it."""
    user = find_user("", 0) if os.geteuid() == 0 else None
    # It is the child of a process that waits for a word, and then ends without one.
    code = (
        "import json, os, subprocess, sys; command = json.loads(sys.argv[1]); command[5] = str(os.getpid());"
        " subprocess.Popen(command); sys.stdin.readline(); os._exit(0)"
    )
    command = json.dumps(caged(["/bin/sh", "-c", "echo lives; exec sleep 3600"], user, 0))
    with subprocess.Popen(
        [sys.executable, "-c", code, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "lives\n"
        process.stdin.write("\n")
        process.stdin.flush()
        # The pipe ends when the last one that writes to it has.
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.read() == ""


def test_users() -> None:
    own = pwd.getpwuid(os.geteuid()).pw_name
    assert find_user("", 1000) is None
    assert find_user(own, os.geteuid()) is None
    with pytest.raises(Refused, match="boot_user: there is no user nosuchuser"):
        find_user("nosuchuser", 0)
    with pytest.raises(Refused, match="boot_user: only root can start a VM as nobody"):
        find_user("nobody", 1000)


@pytest.mark.parametrize(
    ("mode", "group", "groups", "works"),
    [
        (0o600, 0, (), False),
        (0o660, 0, (), False),
        (0o660, 108, (108,), True),
        (0o620, 108, (), False),
        (0o666, 0, (), True),
        (0o666, 108, (108,), True),
    ],
)
def test_kvm(mode: int, group: int, groups: tuple[int, ...], works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(st_mode=0o20000 | mode, st_gid=group)
    monkeypatch.setattr(cage.os, "stat", lambda path: device if path == cage.KVM else os.lstat(path))
    user = find_user("nobody", 0)
    assert user
    assert user.groups == groups
    assert may_use_kvm(user) == works

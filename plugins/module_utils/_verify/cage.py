# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a program that is not trusted: without a network, as a user that owns nothing, and no longer than this process.

What it reads and writes is handed to it as open files, so that it needs no right to open any.
"""

from __future__ import annotations

import os
import pwd
import sys
from typing import TYPE_CHECKING, NamedTuple

from .._common.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence


NOBODY = "nobody"
"""Owns no file of a VM, unlike the user that QEMU mostly has."""
KVM = "/dev/kvm"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""The value of C(-sandbox), as libvirt has it."""
# Where a name space of its own is not to be had, QEMU has no network device all the same. A change of the user clears
# the wish to be killed with the parent (PR_SET_PDEATHSIG), which may have ended by then.
LAUNCHER = """
import ctypes, os, resource, signal, sys
parent, niceness, user, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
libc = ctypes.CDLL(None)
os.nice(niceness)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
libc.unshare(0x40000000)
try:
    if user:
        uid, gid, *groups = map(int, user.split(","))
        os.setgroups(groups)
        os.setgid(gid)
        os.setuid(uid)
    libc.prctl(38, 1, 0, 0, 0)
    libc.prctl(1, signal.SIGKILL)
    if os.getppid() == parent:
        os.execv(program, sys.argv[4:])
except OSError as error:
    sys.exit(f"{program} cannot be started as user {user or os.geteuid()} (boot_user): {error.strerror}")
"""
"""CLONE_NEWNET, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG."""
NOT_STARTED = "(boot_user)"
"""Stands in what it says where that user cannot be had, or cannot start the program."""


class User(NamedTuple):
    """Whom a program runs as: numbers of a user and its groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def find_user(name: str, me: int) -> User | None:
    """Return the user to change to; None to stay C(me). Without a name, root changes to nobody."""
    if not name and me:
        return None
    try:
        found = pwd.getpwnam(name or NOBODY)
    except KeyError:
        raise Refused("boot_user", f"there is no user {name or NOBODY} on this machine") from None
    if found.pw_uid == me:
        return None
    if me:
        raise Refused("boot_user", f"only root can start a VM as {name}; leave it out, or use become")
    return User(found.pw_uid, found.pw_gid, _kvm_group())


def _kvm_group() -> tuple[int, ...]:
    """Return the group that may use KVM, where there is one that root has made for it."""
    try:
        device = os.stat(KVM)
    except OSError:
        return ()
    return (device.st_gid,) if device.st_gid and _may(device.st_mode, 3) else ()


def _may(mode: int, digit: int) -> bool:
    """Return whether a mode allows reading and writing to the owner (6), the group (3) or others (0)."""
    return mode >> digit & 0o6 == 0o6


def may_use_kvm(user: User) -> bool:
    """Return whether the permissions of /dev/kvm let a user in."""
    device = os.stat(KVM)
    return _may(device.st_mode, 0) or (device.st_gid in user.groups and _may(device.st_mode, 3))


def caged(command: Sequence[str], user: User | None, niceness: int) -> list[str]:
    """Return the command that runs this one. C(niceness) is added to this process's own (nice(2))."""
    numbers = ",".join(map(str, (user.uid, user.gid, *user.groups))) if user else ""
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(niceness), numbers, *command]

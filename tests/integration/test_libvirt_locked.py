# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A domain that libvirt itself holds locked: it then lists none at all, and every other domain is backed up."""

from __future__ import annotations

import contextlib
import subprocess
import typing as t

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import domain_list, libvirt_domain
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

# libvirt waits for it with the domain locked, as for a file system when it looks at the disks of a domain.
HOOK = """#!/bin/sh
cat > /dev/null
if [ "$1 $2" = "hung prepare" ]; then
  : > /run/hook-waits
  while [ -e /run/hook-waits ]; do sleep 0.2; done
fi
"""


@contextlib.contextmanager
def locked(libvirt: Libvirt) -> t.Iterator[None]:
    """Have a hook hang that the start of the domain `hung` waits for."""
    hook, waits = libvirt.seen_here("/etc/libvirt/hooks/qemu"), libvirt.seen_here("/run/hook-waits")
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK)
    hook.chmod(0o755)
    # It looks for hooks when it is started.
    libvirt.restart_daemon()
    with libvirt.inside.for_children():
        start = subprocess.Popen(libvirt.inside.command("virsh", "start", "hung"))
    try:
        wait_until(waits.exists, "the hook")
        yield
    finally:
        waits.unlink()
        start.wait()
        hook.unlink()


def test_the_others_go_on(libvirt: Libvirt, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = {name: patterned(directory / f"{name}.qcow2", size=MIB) for name in ("hung", "on", "off")}
    for name, disk in disks.items():
        libvirt.define(name, DomainDisk(disk))
    libvirt.virsh("start", "on", "--paused")
    sets = Sets(directory / "repository", libvirt.inside)
    # Long enough for a machine under load, and short enough for a test.
    monkeypatch.setattr(domain_list, "CALL_TIMEOUT", 5)
    monkeypatch.setattr(libvirt_domain, "CALL_TIMEOUT", 10)
    with locked(libvirt):
        plan = sets.plan(vms=[], domains=["*"], id="s1")["plan"]
        assert {vm["name"]: vm["action"] for vm in plan["vms"]} == {"hung": "fail", "off": "start", "on": "start"}
        [reason] = [vm["reason"] for vm in plan["vms"] if vm["name"] == "hung"]
        assert "because another operation of libvirt on this domain hangs" in reason
        sets.back_up(vms=[], domains=["*"], exclude_domains=["hung"], id="s1")
    for name in ("on", "off"):
        assert identical(disks[name], sets.images(name, "s1")["vda"])
    assert libvirt.virsh("domstate", "hung") == "running"

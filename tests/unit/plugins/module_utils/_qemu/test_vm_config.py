# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a description of a VM says, and what it does not say."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import MonitorGone
from ansible_collections.vmfleet.backup.plugins.module_utils._common.formats import COLLECTION_VERSION
from ansible_collections.vmfleet.backup.plugins.module_utils._common.redaction import REMOVED
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.vm_config import describe_vm
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import SIZE, UUID, dead_process, disk, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor, refusal

Q35: dict[str, Any] = {
    "query-kvm": {"enabled": True, "present": True},
    "query-memory-size-summary": {"base-memory": 1 << 30, "plugged-memory": 1 << 20},
    "query-cpus-fast": [{"qom-path": "/machine/unattached/device[0]"}, {"qom-path": "/machine/unattached/device[2]"}],
    "query-chardev": [
        {"label": "agent", "filename": "unix:/run/web01.qga,server=on", "frontend-open": True},
        {"label": "odd", "filename": "ws://me:hunter2@host/", "frontend-open": True},
    ],
    "qom-get": lambda arguments: {
        ("/machine", "type"): "pc-q35-7.2-machine",
        ("/machine", "firmware"): "bios-256k.bin",
        ("/machine/unattached/device[0]", "type"): "host-x86_64-cpu",
    }[arguments["path"], arguments["property"]],
    "qom-list": lambda arguments: {
        "/machine/peripheral": [{"name": "type", "type": "string"}, {"name": "vd0", "type": "child<virtio-blk-pci>"}],
        "/machine/peripheral-anon": [{"name": "device[0]", "type": "child<virtio-rng-pci>"}],
    }[arguments["path"]],
    "query-tpm": [],
}


OVMF = disk("pflash0", "#block1", qdev="/machine/system.flash0", driver="raw", filename="/usr/share/OVMF.fd")
REMOTE = disk(
    filename='json:{"driver":"https","password":"hunter2"}', backing_file="ftp://me:hunter2@host/base", removable=True
)


def describe(fake: FakeMonitor, **values: Any) -> dict[str, Any]:
    return asyncio.run(describe_vm(monitor(fake), vm(**values)))


def test_description() -> None:
    found = asyncio.run(describe_vm(monitor(FakeMonitor(Q35)), vm(OVMF, REMOTE, process=None)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.pop("taken"))
    assert found == {
        "schema": 1,
        "collection": COLLECTION_VERSION,
        "name": "web01",
        "uuid": UUID,
        "qemu": "7.2.22",
        "machine": "pc-q35-7.2",
        "accelerator": "kvm",
        "memory": (1 << 30) + (1 << 20),
        "cpus": {"count": 2, "type": "host-x86_64-cpu"},
        "firmware": {"bios": "bios-256k.bin", "flash": ["pflash0"]},
        "command_line": None,
        "disks": [
            {
                "name": "pflash0",
                "node": "#block1",
                "qdev": "/machine/system.flash0",
                "device": "pflash0",
                "driver": "raw",
                "file": "/usr/share/OVMF.fd",
                "backing_file": "",
                "layers": [],
                "virtual_size": SIZE,
                "read_only": False,
                "removable": False,
            },
            {
                "name": "drive0",
                "node": "n0",
                "qdev": "",
                "device": "drive0",
                "driver": "qcow2",
                "file": f'json:{{"driver": "https", "password": "{REMOVED}"}}',
                "backing_file": f"ftp://me:{REMOVED}@host/base",
                "layers": [],
                "virtual_size": SIZE,
                "read_only": False,
                "removable": True,
            },
        ],
        "devices": [{"id": "vd0", "type": "virtio-blk-pci"}, {"id": "", "type": "virtio-rng-pci"}],
        "chardevs": [
            {"label": "agent", "filename": "unix:/run/web01.qga,server=on"},
            {"label": "odd", "filename": f"ws://me:{REMOVED}@host/"},
        ],
        "domain": None,
        "tpm": None,
        "removed": ["disk drive0: file.password", "disk drive0: backing_file", "chardev odd: filename"],
    }


def test_description_asks_little() -> None:
    fake = FakeMonitor(Q35)
    describe(fake)
    assert len(fake.sent) <= 11
    # Queries are no part of what a module reports to have sent.
    assert not fake.commands


def test_what_qemu_refuses_is_left_open() -> None:
    found = describe(FakeMonitor(dict.fromkeys(Q35, refusal())), process=None)
    for name in ("machine", "accelerator", "memory", "command_line"):
        assert found[name] is None
    assert found["cpus"] == {"count": 0, "type": None}
    assert found["firmware"] == {"bios": None, "flash": []}
    assert found["devices"] == found["chardevs"] == found["removed"] == []


@pytest.mark.parametrize("command", sorted(Q35))
def test_lost_connection_is_no_refusal(command: str) -> None:
    with pytest.raises(MonitorGone):
        describe(FakeMonitor({**Q35, command: MonitorGone("gone")}))


def test_without_kvm_the_accelerator_is_unknown() -> None:
    kvm = {"query-kvm": {"enabled": False, "present": True}}
    assert describe(FakeMonitor({**Q35, **kvm}))["accelerator"] is None


def test_command_line_of_the_process() -> None:
    # The last argument is empty, the one before it is no UTF-8.
    command = ["/bin/cat", "-", os.fsdecode(b"\xff"), ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as cat:
        # For a moment after exec(3) the kernel does not tell it yet.
        wait_until(Path(f"/proc/{cat.pid}/cmdline").read_bytes, "the command line of cat")
        found = describe(FakeMonitor(Q35), process=Process.of(cat.pid))
    assert found["command_line"] == command
    assert json.loads(json.dumps(found)) == found


def test_command_line_of_another_process_is_not_taken() -> None:
    assert describe(FakeMonitor(Q35), process=dead_process())["command_line"] is None

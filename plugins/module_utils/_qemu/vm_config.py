# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe how a VM is built, so that it can be built again from its backup: the content of C(vm.json).

Secrets are taken out: a backup is read by more people than a hypervisor's process list.

Reference: QEMU 7.2, qemu-options.hx for the command line, docs/system/secrets.rst for what is secret in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._common.errors import CommandError
from .._common.formats import COLLECTION_VERSION, SCHEMA, utc_now
from .command_line import FLASH, ITEM

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .._host.process import Process
    from .model import Disk, Vm
    from .monitor import Monitor


MACHINE = "-machine"
CHILD = re.compile(r"child<(.+)>")
REMOVED = "<removed>"
"""What stands where a secret stood."""
STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'((?:[^'\\]|\\.)*)'")
"""A string in QEMU's JSON, which may stand in single quotes."""
IMPLIED = {"-object": "qom-type", "-fw_cfg": "name"}
"""The key that an option's first item may come without."""
NAMES = ("id", "node-name", "name")
"""The keys that tell the objects of one option from each other."""
PLAIN = frozenset(
    {
        *("", "-hda", "-hdb", "-hdc", "-hdd", "-cdrom", "-fda", "-fdb", "-sd", "-pflash", "-mtdblock"),
        *("-kernel", "-initrd", "-dtb", "-bios", "-append", "-incoming"),
    }
)
"""Options whose value is one name or text, though it may look like keys and values; an image's name needs no option."""
PAYLOADS = {("-object", "secret"): "data", ("-fw_cfg", None): "string"}
"""The key that is a secret in one kind of option (and object) only."""
SECRET_KEY = re.compile(r"(?:.*[-_])?(?:password|passphrase|passwd)|secret|auth|cookie|token")
"""Keys with a secret for a value. Others, as C(password-secret) and C(passwordid), name an object that holds it."""
HARMLESS = frozenset({"", "on", "off", "true", "false"})
"""Values of such keys that are no secret: C(-vnc :1,password=on) says only that there is one."""
EMBEDDED = (
    # user:password@ of a URL; iSCSI has % for the colon.
    re.compile(r"(://[^/\s:%@]*[:%])[^/\s]+(?=@)"),
    # The signature of a URL that lets everybody in who knows it.
    re.compile(
        r"(?i)([?&](?:[\w.-]*[-_])?(?:sig|signature|token|password|passwd|secret|auth|credential|key)=)[^&#\s]+"
    ),
    re.compile(r"(\Arbd:.*?:key=)(?:[^:\\]|\\.)+"),
    re.compile(r"(\Aio\.systemd\.credential(?:\.binary)?:[^=]*=)(?s:.+)"),
)
"""Secrets within values that are none; the group is what comes before them."""


async def describe_vm(monitor: Monitor, vm: Vm) -> dict[str, Any]:
    """Describe how C(vm) is built. What a VM does not have, or its QEMU does not tell, is null or empty.

    C(removed) lists what has been taken out, and so has to be set again by whoever builds the VM again.
    C(command_line) is what QEMU was started with, C(devices) what there is now; null where the process is unknown.
    """
    machine, bios, kvm, memory, cpus, named, unnamed, chardevs = await monitor.within(
        asyncio.gather(
            _ask(monitor, "qom-get", path="/machine", property="type"),
            _ask(monitor, "qom-get", path="/machine", property="firmware"),
            _ask(monitor, "query-kvm"),
            _ask(monitor, "query-memory-size-summary"),
            _cpus(monitor),
            _devices(monitor, "/machine/peripheral"),
            _devices(monitor, "/machine/peripheral-anon"),
            _ask(monitor, "query-chardev"),
        )
    )
    arguments = _command_line(vm.process)
    command_line, removed = redact(arguments or [])
    return {
        "schema": SCHEMA,
        "collection": COLLECTION_VERSION,
        "taken": utc_now(),
        "name": vm.name,
        "uuid": vm.uuid,
        "qemu": vm.version,
        "machine": machine[: -len(MACHINE)] if machine and machine.endswith(MACHINE) else machine,
        # Without KVM it may be TCG or Xen.
        "accelerator": "kvm" if kvm and kvm["enabled"] else None,
        "memory": memory["base-memory"] + memory.get("plugged-memory", 0) if memory else None,
        "cpus": cpus,
        "firmware": {"bios": bios or None, "flash": [disk.name for disk in vm.disks if FLASH.match(disk.qdev)]},
        "command_line": command_line if arguments else None,
        "disks": [_disk(disk, removed) for disk in vm.disks],
        "devices": named + [{**device, "id": ""} for device in unnamed],
        "chardevs": [_chardev(entry, removed) for entry in chardevs or []],
        "removed": removed,
    }


async def _ask(monitor: Monitor, command: str, **arguments: str) -> Any:
    """Return QEMU's answer; None where this VM has no such thing."""
    try:
        return await monitor.execute(command, arguments)
    except CommandError:
        return None


async def _cpus(monitor: Monitor) -> dict[str, Any]:
    found = await _ask(monitor, "query-cpus-fast") or []
    kind = await _ask(monitor, "qom-get", path=found[0]["qom-path"], property="type") if found else None
    return {"count": len(found), "type": kind}


async def _devices(monitor: Monitor, container: str) -> list[dict[str, str]]:
    entries = await _ask(monitor, "qom-list", path=container) or []
    children = ((entry["name"], CHILD.fullmatch(entry["type"])) for entry in entries)
    return [{"id": name, "type": child[1]} for name, child in children if child]


def _command_line(process: Process | None) -> list[str] | None:
    """Return what QEMU was started with; None where nobody knows (over TCP), or the process may not be seen."""
    if process is None:
        return None
    try:
        with open(f"/proc/{process.pid}/cmdline", "rb") as source:
            content = source.read()
    except OSError:
        return None
    # The process lives after the reading, so the pid was its own all the time.
    if not process.alive or not content:
        return None
    return [os.fsdecode(argument) for argument in content.split(b"\0")[:-1]]


def _disk(disk: Disk, removed: list[str]) -> dict[str, Any]:
    redaction = Redaction(f"disk {disk.name}", removed)
    return {
        "name": disk.name,
        "node": disk.node,
        "qdev": disk.qdev,
        "device": disk.device,
        "driver": disk.driver,
        "file": redaction.text("file", disk.filename),
        "backing_file": redaction.text("backing_file", disk.backing_file),
        "virtual_size": disk.virtual_size,
        "read_only": disk.read_only,
        "removable": disk.removable,
    }


def _chardev(entry: dict[str, Any], removed: list[str]) -> dict[str, str]:
    redaction = Redaction("chardev {}".format(entry["label"]), removed)
    return {"label": entry["label"], "filename": redaction.text("filename", entry["filename"])}


def redact(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a QEMU command line without its secrets, and the names of what has been removed."""
    removed: list[str] = []
    cleaned = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            # QEMU takes --object for -object.
            option = "-" + argument.lstrip("-")
            cleaned.append(Redaction(option, removed).text("", argument))
        else:
            cleaned.append(_redact_value(option, argument, removed))
            option = ""
    return cleaned, removed


def _redact_value(option: str, argument: str, removed: list[str]) -> str:
    """Return the value of an option without its secrets. C(option) is empty for the name of an image."""
    if option in PLAIN:
        return Redaction(option or "image", removed).text("", argument)
    is_json = argument.startswith("{")
    fields = _read_json(argument) or {} if is_json else _fields(option, argument)
    name = next((fields[key] for key in NAMES if key in fields), "")
    payload = PAYLOADS.get((option, fields.get("qom-type")), "")
    redaction = Redaction(f"{option} {name}".rstrip(), removed, payload)
    return redaction.json("", argument) if is_json else redaction.items(argument)


def _fields(option: str, argument: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in ITEM.findall(argument):
        key, equals, value = item.partition("=")
        if equals:
            found[key] = value
        elif not found and option in IMPLIED:
            found[IMPLIED[option]] = key
    return found


def _read_json(text: str) -> Any:
    """Return what QEMU reads in its JSON; None where that cannot be told."""

    def in_double_quotes(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        return '"{}"'.format(match[1].replace("\\'", "'").replace('"', '\\"'))

    try:
        return json.loads(STRING.sub(in_double_quotes, text))
    except ValueError:
        return None


@dataclass(frozen=True)
class Redaction:
    """Takes the secrets out of what belongs to C(owner), and notes them in C(removed).

    C(payload) is a key that is secret here besides those that always are.
    """

    owner: str
    removed: list[str]
    payload: str = ""

    def items(self, argument: str) -> str:
        """Return C(key=value,...) of a command line without its secrets."""

        def cleaned(match: re.Match[str]) -> str:
            key, equals, value = match[0].partition("=")
            if not equals:
                key, value = "", key
            return key + equals + self.text(key, value.replace(",,", ",")).replace(",", ",,")

        return ITEM.sub(cleaned, argument)

    def json(self, key: str, text: str) -> str:
        """Return a JSON text without its secrets; unchanged where there is none in it."""
        tree = _read_json(text)
        if tree is None:
            # Nobody knows what it holds.
            return self._remove(key)
        known = len(self.removed)
        cleaned = self._tree(key, tree)
        return text if len(self.removed) == known else json.dumps(cleaned)

    def text(self, key: str, value: str) -> str:
        """Return the value of a key, or a value without one, without its secrets."""
        if self._secret(key):
            return value if value in HARMLESS else self._remove(key)
        if value.startswith("json:"):
            return "json:" + self.json(key, value[len("json:") :])
        cleaned = value
        for pattern in EMBEDDED:
            cleaned = pattern.sub(rf"\1{REMOVED}", cleaned)
        if cleaned != value:
            self._remove(key)
        return cleaned

    def _tree(self, key: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(key, value)
        if value is None or isinstance(value, bool):
            return value
        if self._secret(key):
            return self._remove(key)
        prefix = f"{key}." if key else ""
        if isinstance(value, dict):
            return {name: self._tree(prefix + name, below) for name, below in value.items()}
        if isinstance(value, list):
            return [self._tree(f"{prefix}{number}", below) for number, below in enumerate(value)]
        return value

    def _secret(self, key: str) -> bool:
        last = key.rpartition(".")[2]
        return last != "" and (last == self.payload or SECRET_KEY.fullmatch(last) is not None)

    def _remove(self, key: str) -> str:
        self.removed.append(f"{self.owner}: {key}" if key else self.owner)
        return REMOVED

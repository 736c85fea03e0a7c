# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stand-ins for a VM: a monitor that answers from a script, and QEMU's answers with the fields that QEMU gives them."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import CommandError, MonitorError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.query import inspect_vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import MIB, SIZE, UUID

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.monitor import Monitor

T = TypeVar("T")


class FakeMonitor:
    """A conversation in which each command has its answer.

    An answer is a value, an exception to raise, a function of the arguments, or an iterator of such answers.
    C(sent) lists all commands, C(passed) the open files that came as fdsets: their opaque and the flags of each.
    """

    def __init__(
        self,
        answers: dict[str, Any] | None = None,
        *,
        version: str = "7.2.22",
        address: str = "/run/qemu/web01.qmp",
        process: Process | None = None,
    ) -> None:
        self.answers = answers or {}
        self.version = version
        self.address = Address(path=address) if address.startswith("/") else Address(host=address, port=4444)
        self.process = process
        self.commands: list[dict[str, Any]] = []
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.passed: list[tuple[str, list[int]]] = []
        self.fdsets: set[int] = set()

    async def __aenter__(self) -> FakeMonitor:
        return self

    async def __aexit__(self, *_error: object) -> None:
        return None

    libvirt = None

    @property
    def passes_fds(self) -> bool:
        return bool(self.address.path)

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        self.sent.append((command, arguments or {}))
        if not command.startswith(("query-", "qom-")):
            self.commands.append({"execute": command, "arguments": arguments or {}})
        if command not in self.answers:
            raise AssertionError(f"no answer to {command} {arguments}")
        return self._answer(self.answers[command], arguments or {})

    def _answer(self, answer: Any, arguments: dict[str, Any]) -> Any:
        if isinstance(answer, Iterator):
            return self._answer(next(answer), arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer(arguments) if callable(answer) else answer

    async def within(self, looking: Awaitable[T]) -> T:
        return await looking

    def senseless(self, command: str, why: object) -> MonitorError:
        return MonitorError(f"{self.address}: the answer to {command} makes no sense: {why}")

    async def add_fdset(self, fds: tuple[int, ...], opaque: str) -> int:
        self.passed.append((opaque, [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds]))
        fdset = len(self.passed) - 1
        self.fdsets.add(fdset)
        return fdset

    async def remove_fdset(self, fdset: int) -> None:
        self.sent.append(("remove-fd", {"fdset-id": fdset}))
        self.fdsets.discard(fdset)

    def names(self) -> list[str]:
        """The commands that were sent, without their arguments."""
        return [command for command, _arguments in self.sent]


def monitor(fake: FakeMonitor) -> Monitor:
    """The fake under the type of what it stands for."""
    return cast("Monitor", fake)


def refusal(description: str = "no", command: str = "drive-backup") -> CommandError:
    """What Monitor.execute raises when QEMU refuses a command."""
    return CommandError("unix:/run/qemu/web01.qmp", command, "GenericError", description)


@dataclass
class Node:
    """A node of the block graph; C(below) is the node it reads from, C(backing) its backing file's."""

    name: str
    driver: str = "qcow2"
    filename: str = "/images/web01.qcow2"
    below: str = ""
    backing: Node | None = None
    actual: int | None = 200704
    size: int = SIZE
    read_only: bool = False
    bitmaps: list[dict[str, Any]] = field(default_factory=list)
    specific: dict[str, Any] = field(default_factory=lambda: {"compat": "1.1", "refcount-bits": 16, "corrupt": False})

    def image(self) -> dict[str, Any]:
        image: dict[str, Any] = {
            "virtual-size": self.size,
            "filename": self.filename,
            "cluster-size": 65536,
            "format": self.driver,
            "dirty-flag": False,
        }
        if self.driver == "qcow2":
            image["format-specific"] = {"type": "qcow2", "data": self.specific}
        if self.actual is not None:
            image["actual-size"] = self.actual
        if self.backing:
            image["backing-image"] = self.backing.image()
            image["backing-filename"] = os.path.basename(self.backing.filename)
            image["full-backing-filename"] = self.backing.filename
            image["backing-filename-format"] = self.backing.driver
        return image

    def query(self, version: tuple[int, ...] = (7, 2)) -> dict[str, Any]:
        """Its entry in query-named-block-nodes with flat."""
        image = self.image()
        image.pop("backing-image", None)
        entry: dict[str, Any] = {
            "node-name": self.name,
            "drv": self.driver,
            "file": self.filename,
            "ro": self.read_only,
            "image": image,
            "backing_file_depth": 1 if self.backing else 0,
            "encrypted": False,
            "cache": {"no-flush": False, "direct": False, "writeback": True},
        }
        children = {"file": self.below, "backing": self.backing.name if self.backing else ""}
        if version >= (10, 1):
            entry["children"] = [{"child": child, "node-name": name} for child, name in children.items() if name]
        if self.backing:
            entry["backing_file"] = self.backing.filename
        if self.bitmaps:
            entry["dirty-bitmaps"] = self.bitmaps
        return entry

    def stats(self, nested: bool = False) -> dict[str, Any]:
        """Its entry in query-blockstats with query-nodes; C(nested) tells of backing files, as for a device."""
        entry: dict[str, Any] = {"node-name": self.name, "stats": {}}
        if self.below:
            entry["parent"] = {"node-name": self.below, "stats": {}}
        if nested and self.backing:
            entry["backing"] = self.backing.stats(nested)
        return entry


def device(node: str = "", backend: str = "", qdev: str = "", removable: bool = False) -> dict[str, Any]:
    """An entry of query-block; without C(node) it is a drive without a medium."""
    entry: dict[str, Any] = {"device": backend, "locked": False, "removable": removable, "type": "unknown"}
    if qdev:
        entry["qdev"] = qdev
    if node:
        entry["inserted"] = {"node-name": node, "drv": "qcow2", "ro": False, "file": "/images/web01.qcow2"}
    return entry


def bitmap_entry(name: str = "b0", **values: Any) -> dict[str, Any]:
    """A dirty bitmap as query-named-block-nodes tells it."""
    entry = {"recording": True, "persistent": True, "busy": False, "granularity": 65536, "count": 131072, **values}
    return {"name": name, **entry} if name else entry


def block_job(job_id: str = "j0", **values: Any) -> dict[str, Any]:
    """An entry of query-block-jobs."""
    return {
        "device": job_id,
        "type": "backup",
        "status": "running",
        "len": SIZE,
        "offset": MIB,
        "speed": 0,
        "paused": False,
        "busy": False,
        "ready": False,
        "io-status": "ok",
        "auto-finalize": True,
        "auto-dismiss": False,
        **values,
    }


def general_job(job_id: str = "j0", **values: Any) -> dict[str, Any]:
    """An entry of query-jobs."""
    return {
        "id": job_id,
        "type": "backup",
        "status": "running",
        "current-progress": MIB,
        "total-progress": SIZE,
        **values,
    }


def jobs(*entries: dict[str, Any]) -> dict[str, Any]:
    """The answers to both job queries, from entries of query-block-jobs."""
    general = [
        general_job(entry["device"], status=entry["status"], **({"error": entry["error"]} if "error" in entry else {}))
        for entry in entries
    ]
    return {"query-block-jobs": list(entries), "query-jobs": general}


def answers(nodes: list[Node], devices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """The answers of a VM with this block graph to everything that inspect_vm asks."""
    return {
        "query-name": {"name": "web01"},
        "query-uuid": {"UUID": UUID},
        "query-status": {"status": "running", "singlestep": False, "running": True},
        "query-block": devices,
        "query-named-block-nodes": [node.query() for node in nodes],
        "query-blockstats": [node.stats() for node in nodes],
        "query-block-jobs": [],
        "query-jobs": [],
        "query-fdsets": [],
        **{name.replace("_", "-"): answer for name, answer in others.items()},
    }


def inspect(nodes: list[Node], devices: list[dict[str, Any]], name: str = "", **others: Any) -> Vm:
    """Return the read model that these answers of QEMU make."""
    return asyncio.run(inspect_vm(monitor(FakeMonitor(answers(nodes, devices, **others))), name))

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stand in for the QEMUs of one hypervisor: `stand_in.py DIRECTORY NAME COUNT DISK`.

NAME-vm000 and so on are processes of their own, each with a monitor, DIRECTORY/NAME-vm000.qmp, and one disk, a copy of
the image DISK. They answer as QEMU 7.2.22 has answered to a plan, a full set and an increment, and copy nothing: DISK
has to be empty, so that a target is a whole copy of it as it was made. A job is concluded as soon as it is started.

This is for benchmarks with more VMs than a machine can run. No test may believe it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import sys
import typing as t
from pathlib import Path

Object = dict[str, t.Any]

GREETING = {
    "QMP": {
        "version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7+deb12u18+b3"},
        "capabilities": ["oob"],
    }
}
CPU = "/machine/unattached/device[0]"
TYPE = {"name": "type", "type": "string"}
FIXED: dict[tuple[str, ...], object] = {
    ("qmp_capabilities",): {},
    ("query-uuid",): {"UUID": "00000000-0000-0000-0000-000000000000"},
    ("query-status",): {"status": "running", "singlestep": False, "running": True},
    ("query-kvm",): {"enabled": False, "present": True},
    ("query-memory-size-summary",): {"base-memory": 67108864, "plugged-memory": 0},
    ("query-tpm",): [],
    ("qom-get", "/machine", "type"): "pc-q35-7.2-machine",
    ("qom-get", "/machine", "firmware"): "bios-256k.bin",
    ("qom-get", CPU, "type"): "qemu64-x86_64-cpu",
    ("qom-list", "/machine/peripheral"): [TYPE, {"name": "vd0", "type": "child<virtio-blk-pci>"}],
    ("qom-list", "/machine/peripheral-anon"): [TYPE],
}
"""Answers that are the same for each VM, by command, path and property."""
NODE = {
    **dict.fromkeys(("iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr", "backing_file_depth"), 0),
    **dict.fromkeys(("ro", "encrypted"), False),
    "detect_zeroes": "off",
    "write_threshold": 0,
    "cache": {"no-flush": False, "direct": False, "writeback": True},
}
DETAILS = {
    "compat": "1.1",
    "compression-type": "zlib",
    "refcount-bits": 16,
    **dict.fromkeys(("lazy-refcounts", "corrupt", "extended-l2"), False),
}
JOB = {
    "type": "backup",
    "status": "concluded",
    "io-status": "ok",
    "auto-finalize": True,
    **dict.fromkeys(("auto-dismiss", "busy", "paused", "ready"), False),
    **dict.fromkeys(("len", "offset", "speed"), 0),
}


class Refusal(Exception):
    """What QEMU says in place of an answer: class, and description."""


class StandIn:
    """One VM: what it has been told, and what it answers."""

    def __init__(self, monitor: Path, disk: Path) -> None:
        self._monitor = monitor
        self._disk = str(disk)
        self._size = int.from_bytes(disk.read_bytes()[24:32], "big")
        self._bitmaps: dict[str, Object] = {}
        self._jobs: dict[str, Object] = {}
        self._fdsets: dict[int, list[Object]] = {}
        self._received: list[int] = []

    def serve(self) -> None:
        """Serve one client after the other, as QEMU does."""
        early = f"{self._monitor}~"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(early)
            listener.listen(1)
            # Whoever finds the socket under its own name is served.
            os.rename(early, self._monitor)
            while True:
                client, _address = listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    self._converse(client)
                for fdset in list(self._fdsets):
                    self.remove_fd({"fdset-id": fdset})

    def _converse(self, client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\r\n")
        text = ""
        while True:
            data, fds, _flags, _address = socket.recv_fds(client, 1 << 16, 16)
            if not data:
                return
            self._received += fds
            text = (text + data.decode()).lstrip()
            # Nothing stands between two commands, and the last one may still be on its way.
            with contextlib.suppress(json.JSONDecodeError):
                while text:
                    command, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:].lstrip()
                    client.sendall(json.dumps(self._reply(command)).encode() + b"\r\n")

    def _reply(self, command: Object) -> Object:
        mark = {"id": command["id"]} if "id" in command else {}
        try:
            return {"return": self._do(command["execute"], command.get("arguments", {})), **mark}
        except Refusal as refusal:
            kind, description = refusal.args
            return {"error": {"class": kind, "desc": description}, **mark}

    def _do(self, command: str, given: Object) -> object:
        fixed = command, *(given[key] for key in ("path", "property") if key in given)
        if fixed in FIXED:
            return FIXED[fixed]
        method = None if command.startswith("_") else getattr(self, command.replace("-", "_"), None)
        if method is None or command == "serve":
            raise Refusal("CommandNotFound", f"The command {command} has not been found")
        return method(given)

    # The commands, by their names

    def query_name(self, _given: Object) -> object:
        return {"name": self._monitor.stem}

    def query_cpus_fast(self, _given: Object) -> object:
        place = {"core-id": 0, "thread-id": 0, "socket-id": 0}
        return [{"thread-id": os.getpid(), "props": place, "qom-path": CPU, "cpu-index": 0, "target": "x86_64"}]

    def query_chardev(self, _given: Object) -> object:
        return [{"frontend-open": True, "filename": f"unix:{self._monitor},server=on", "label": "compat_monitor0"}]

    def query_block(self, given: Object) -> object:
        device = {"device": "drive0", "qdev": "/machine/peripheral/vd0/virtio-backend", "type": "unknown"}
        image, _file = self.query_named_block_nodes(given)
        return [{**device, "io-status": "ok", "locked": False, "removable": False, "inserted": image}]

    def query_named_block_nodes(self, _given: Object) -> tuple[Object, Object]:
        status = os.stat(self._disk)
        both = {"filename": self._disk, "actual-size": status.st_blocks * 512, "dirty-flag": False}
        file = {**both, "virtual-size": status.st_size, "format": "file"}
        image = {**both, "virtual-size": self._size, "format": "qcow2", "cluster-size": 65536}
        image["format-specific"] = {"type": "qcow2", "data": DETAILS}
        bitmaps = {"dirty-bitmaps": list(self._bitmaps.values())} if self._bitmaps else {}
        return (
            {**NODE, "image": image, "node-name": "n0", "drv": "qcow2", "file": self._disk, **bitmaps},
            {**NODE, "image": file, "node-name": "#block126", "drv": "file", "file": self._disk},
        )

    def query_block_jobs(self, _given: Object) -> object:
        return list(self._jobs.values())

    def query_jobs(self, _given: Object) -> object:
        ended = {"type": "backup", "status": "concluded", "current-progress": 0, "total-progress": 0}
        return [{**ended, "id": job} for job in self._jobs]

    def query_fdsets(self, _given: Object) -> object:
        return [{"fdset-id": number, "fds": fds} for number, fds in self._fdsets.items()]

    def add_fd(self, given: Object) -> object:
        if not self._received:
            raise Refusal("GenericError", "No file descriptor supplied via SCM_RIGHTS")
        number = given.get("fdset-id", max(self._fdsets, default=-1) + 1)
        fd = self._received.pop(0)
        self._fdsets.setdefault(number, []).append({"fd": fd, "opaque": given["opaque"]})
        return {"fd": fd, "fdset-id": number}

    def remove_fd(self, given: Object) -> object:
        for entry in _take(self._fdsets, given["fdset-id"]):
            os.close(entry["fd"])
        return {}

    def transaction(self, given: Object) -> object:
        for action in given["actions"]:
            self._do(action["type"], action["data"])
        return {}

    def block_dirty_bitmap_add(self, given: Object) -> object:
        state = {"recording": True, "persistent": given["persistent"], "busy": False, "granularity": 65536, "count": 0}
        self._bitmaps[given["name"]] = {"name": given["name"], **state}
        return {}

    def block_dirty_bitmap_remove(self, given: Object) -> object:
        _take(self._bitmaps, given["name"])
        return {}

    def drive_backup(self, given: Object) -> object:
        target = json.loads(given["target"].removeprefix("json:"))["file"]["filename"]
        fds = self._fdsets.get(int(target.removeprefix("/dev/fdset/")), [])
        # One to read and one to write, of a target that was made before.
        if len(fds) != 2 or not all(os.fstat(entry["fd"]).st_size for entry in fds):
            raise Refusal("GenericError", f"Could not open '{target}'")
        self._jobs[given["job-id"]] = {"device": given["job-id"], **JOB}
        return {}

    def job_dismiss(self, given: Object) -> object:
        _take(self._jobs, given["id"])
        return {}


def _take(table: dict[t.Any, t.Any], name: object) -> t.Any:
    if name not in table:
        raise Refusal("GenericError", f"'{name}' not found")
    return table.pop(name)


def main() -> None:
    directory, name, count, template = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    # So that what all of them have is in memory only once.
    gc.disable()
    gc.freeze()
    for number in range(count):
        monitor = directory / f"{name}-vm{number:03}.qmp"
        disk = shutil.copyfile(template, monitor.with_suffix(".qcow2"))
        if os.fork() == 0:
            StandIn(monitor, disk).serve()
    signal.pause()


if __name__ == "__main__":
    main()

# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the state of a VM's TPM: what the guest has sealed with it cannot be opened without.

It belongs to swtpm, a process of its own that QEMU talks to over a socket. Its directory is on the command line of
that process; else it is taken to be that of the socket. swtpm replaces a file of its state by a rename: whoever reads
it reads a whole one.
Reference: swtpm(8).
"""

from __future__ import annotations

import base64
import os
import re
from typing import TYPE_CHECKING

from .._common.errors import CommandError
from .._host.directory import Directory, WrongEntry
from .._host.process import Process

if TYPE_CHECKING:
    from typing import Any

    from .model import Vm
    from .monitor import Monitor


STATE = re.compile(r"tpm2?-00\.permall")
"""The files that hold the state of a TPM 2.0 and of a TPM 1.2."""
LARGEST = 1 << 18
"""Bytes of the largest state: 6 KiB are the rule, and swtpm has no more than some 128 KiB."""
STORE = "/var/lib/libvirt/swtpm/{}/{}"
"""Where libvirt of the system has the state of a domain's TPM, by the uuid of the domain and the kind of TPM."""
EMULATOR = "emulator"
"""The backend that is swtpm; with others, the state is not in a file."""
CHIP = "it is in a chip of the hypervisor, which keeps it"
LOST = "TPM state: "
"""What an entry of C(removed) begins with where the state could not be read."""


async def describe_tpm(monitor: Monitor, vm: Vm, removed: list[str]) -> dict[str, Any] | None:
    """Return the TPM of a VM, and its state; None where it has none. Why there is no state is added to C(removed)."""
    try:
        found = await monitor.execute("query-tpm")
    except CommandError:
        # This QEMU knows of no TPM.
        return None
    if not found:
        return None
    model, backend = found[0]["model"], found[0]["options"]
    if backend["type"] != EMULATOR:
        return _described(model, backend["type"], "", removed)
    directory = _directory(vm.process.arguments if vm.process else [], backend["data"].get("chardev", ""))
    return _described(model, EMULATOR, directory, removed)


def describe_stored(vm: Vm, last: dict[str, Any] | None, removed: list[str]) -> dict[str, Any] | None:
    """Return the TPM of a domain that is shut off, and its state; None where it has none.

    Its swtpm does not run, but C(last) may say where the state is: what a set has of it, if it was found there.
    """
    tpm = vm.domain.xml.tpm if vm.domain else None
    if tpm is None:
        return None
    if tpm.backend != EMULATOR:
        return _described(tpm.model, tpm.backend, "", removed)
    known = last or {}
    directory = known.get("directory", "") if known.get("state") else ""
    directory = directory or STORE.format(vm.uuid, "tpm1.2" if tpm.version == "1.2" else "tpm2")
    return _described(tpm.model, EMULATOR, directory, removed)


def _described(model: str, backend: str, directory: str, removed: list[str]) -> dict[str, Any]:
    """Return what C(vm.json) says of a TPM, with its state where that can be read."""
    state, reason = read_state(directory) if backend == EMULATOR else ({}, CHIP)
    if not state:
        removed.append(LOST + reason)
    return {"model": model, "backend": backend, "directory": directory, "state": state}


def read_state(directory: str) -> tuple[dict[str, str], str]:
    """Return the files of a TPM's state in Base64 by their names, or why there are none."""
    if not directory:
        return {}, "the socket of its swtpm is not on the command line of QEMU"
    try:
        with Directory.at(directory) as place:
            names = [name for name in place.names() if STATE.fullmatch(name)]
            found = {name: base64.b64encode(place.read(name, LARGEST)).decode() for name in names}
    except (OSError, WrongEntry) as error:
        return {}, f"{directory} cannot be read: {error}"
    return found, f"there is none in {directory}"


def losses(description: dict[str, Any]) -> list[str]:
    """Return what is to be told of a set whose VM has a TPM, and which does not have its state."""
    found = (entry[len(LOST) :] for entry in description.get("removed", ()) if entry.startswith(LOST))
    return [f"the state of the TPM is not in the set: {reason}" for reason in found]


def renewed(description: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description of a VM with the state that its TPM has now; None where that is still the same."""
    # An earlier release may have written it, of a VM that is off since.
    tpm = description.get("tpm")
    if not tpm or not tpm["state"]:
        return None
    state = read_state(tpm["directory"])[0]
    return {**description, "tpm": {**tpm, "state": state}} if state not in ({}, tpm["state"]) else None


def _directory(arguments: list[str], chardev: str) -> str:
    """Return the directory of the state of a TPM whose swtpm is at the other end of a character device."""
    values = [value for option, value in zip(arguments, arguments[1:]) if option.lstrip("-") == "chardev"]
    found = (_properties(value) for value in values)
    socket = next((one["path"] for one in found if one.get("id") == chardev and one.get("path")), "")
    return _told_by_swtpm(socket) or os.path.dirname(socket)


def _told_by_swtpm(socket: str) -> str:
    """Return the directory that the process at a socket was started with; empty where it is not seen.

    Anybody can start a process that says this. Where several do, none of them is believed.
    """
    found = set()
    for entry in os.listdir("/proc") if socket else ():
        if entry.isdigit() and _name(entry) == "swtpm":
            process = Process.of(int(entry))
            words = process.arguments if process else []
            options = {option: _properties(value) for option, value in zip(words, words[1:])}
            if options.get("--ctrl", {}).get("path") == socket:
                state = options.get("--tpmstate", {})
                uri = state.get("backend-uri", "")
                found.add(uri[len("dir://") :] if uri.startswith("dir://") else state.get("dir", ""))
    return found.pop() if len(found) == 1 else ""


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as source:
            return source.read().strip()
    except OSError:
        # It has ended.
        return ""


def _properties(value: str) -> dict[str, str]:
    """Return C(key=value,...) as a dict."""
    return {key: text for key, _equals, text in (item.partition("=") for item in value.split(","))}

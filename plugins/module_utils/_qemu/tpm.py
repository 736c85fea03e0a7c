# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the state of a VM's TPM: what the guest has sealed with it cannot be opened without.

It belongs to swtpm, a process of its own that QEMU talks to over a socket. Its directory is on the command line of
that process; else it is taken to be that of the socket. swtpm replaces a file of its state by a rename: whoever reads
it reads a whole one. Where it has its state in one file (C(file://)), that is written in place, and is not read.
Reference: swtpm(8).
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
from typing import TYPE_CHECKING

from .._common.errors import CommandError
from .._host.directory import Directory, WrongEntry
from .._host.process import Process
from .._host.threads import within
from .address import SYSTEM

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .model import Vm
    from .monitor import Monitor


STATE = re.compile(r"tpm2?-00\.permall")
"""The files that hold the state of a TPM 2.0 and of a TPM 1.2."""
LARGEST = 1 << 20
"""Bytes of the largest state: 6 KiB are the rule, and swtpm has no more than some 128 KiB."""
TIMEOUT = 5.0
"""Seconds for reading it, which takes far less than a millisecond: the guest may be frozen meanwhile."""
STORE = "/var/lib/libvirt/swtpm/{}/{}"
"""Where libvirt of the system has the state of a domain's TPM, by the uuid of the domain and the kind of TPM."""
EMULATOR, EXTERNAL = "emulator", "external"
"""The backends that are swtpm, started by libvirt or by somebody else; with others, the state is not in a file."""
CHIP = "it is in a chip of the hypervisor, which keeps it"
UNKNOWN = (
    "another program than libvirt starts its swtpm, so the place is known only while the domain runs; start the domain"
)
FILE = "file://"
"""What begins the place of a state that is one file."""
IN_FILE = "swtpm has it in one file, {}, and not in a directory; back that up by other means, while the VM is off"
NO_SOCKET = "the socket of its swtpm is not on the command line of QEMU"
TWO = (
    "the state of the TPM in the set is that in {own}, where libvirt has it by itself. There is another one in"
    " {before}, where an earlier set has found it. Remove the wrong one, or start the domain: while it runs, the place"
    " is known"
)
OLD = (
    "the state of the TPM in the set is that in {before}, where an earlier set has found it, and it may be an old one:"
    " {reason}. Start the domain: while it runs, the place is known"
)
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
        return await _described(model, backend["type"], "", removed)
    directory = _directory(vm.process.arguments if vm.process else [], backend["data"].get("chardev", ""))
    return await _described(model, EMULATOR, directory, removed)


async def describe_stored(
    vm: Vm, uri: str, last: dict[str, Any] | None, removed: list[str], doubts: list[str]
) -> dict[str, Any] | None:
    """Return the TPM of a domain that is shut off, and its state; None where it has none.

    Its swtpm does not run. The state is where the definition says, or where libvirt has it by itself. Where neither is
    known, or there is none, C(last) may say where it is: what a set has of it, if it was found there. Why it may be
    another one is added to C(doubts).
    """
    tpm = vm.domain.xml.tpm if vm.domain else None
    if tpm is None:
        return None
    own = tpm.place or store(uri, vm.uuid, "tpm1.2" if tpm.version == "1.2" else "tpm2")
    reasons: list[str] = []
    found = await _described(tpm.model, tpm.backend, own, reasons, f"the libvirt at {uri} keeps it elsewhere")
    known = last or {}
    before = known.get("directory", "") if known.get("state") else ""
    if tpm.place or tpm.backend != EMULATOR or before in ("", own):
        removed += reasons
        return found
    # The definition may have named that place then, or a restore has put a newer state into libvirt's own.
    other = await _described(tpm.model, tpm.backend, before, [] if own else removed)
    if not own:
        return other
    if found["state"]:
        if other["state"] not in ({}, found["state"]):
            doubts.append(TWO.format(own=own, before=before))
        return found
    if other["state"]:
        # libvirt may have been built with another place; else a domain is backed up with the last state that it had.
        doubts.append(OLD.format(before=before, reason=reasons[0][len(LOST) :]))
        return other
    removed += reasons
    return found


def store(uri: str, uuid: str, kind: str) -> str:
    """Return where a libvirt has the state of a domain's TPM; empty where it is not that of the system."""
    # For root, there is no libvirt of the session.
    is_system = uri.startswith(SYSTEM) or (os.geteuid() == 0 and uri == "qemu:///session")
    return STORE.format(uuid, kind) if is_system else ""


def tpm_warnings(vm: Vm, uri: str) -> list[str]:
    """Return what is to be known of the TPM of a domain, before a set of it is made: its state may not be in there."""
    tpm = vm.domain.xml.tpm if vm.domain else None
    if tpm is None:
        return []
    if tpm.place.startswith(FILE):
        return [f"the state of the TPM is not in the set: {IN_FILE.format(tpm.place[len(FILE) :])}"]
    if not vm.is_off:
        return []
    if tpm.backend == EXTERNAL:
        return [f"the state of the TPM is not in the set: {UNKNOWN}"]
    if tpm.backend == EMULATOR and not (tpm.place or store(uri, vm.uuid, "")):
        told = (
            f"the libvirt at {uri} keeps the state of the TPM elsewhere, and the place is known only after a set"
            " that was made while the domain"
        )
        return [f"{told} ran"]
    return []


async def _described(
    model: str, backend: str, directory: str, removed: list[str], nowhere: str = NO_SOCKET
) -> dict[str, Any]:
    """Return what C(vm.json) says of a TPM, with its state where that can be read."""
    state: dict[str, str] = {}
    if backend == EMULATOR:
        state, reason = await _read(directory) if directory else (state, nowhere)
    else:
        reason = UNKNOWN if backend == EXTERNAL else CHIP
    if not state:
        removed.append(LOST + reason)
    return {"model": model, "backend": backend, "directory": directory, "state": state}


async def _read(directory: str) -> tuple[dict[str, str], str]:
    try:
        return await within(TIMEOUT, read_state, directory)
    except asyncio.TimeoutError:
        return {}, f"{directory} cannot be read: its file system has not answered within {TIMEOUT:g} s"


def read_state(directory: str) -> tuple[dict[str, str], str]:
    """Return the files of a TPM's state in Base64 by their names, or why there are none."""
    if directory.startswith(FILE):
        return {}, IN_FILE.format(directory[len(FILE) :])
    try:
        with Directory.at(directory) as place:
            names = [name for name in place.names() if STATE.fullmatch(name)]
            found = {name: base64.b64encode(place.read(name, LARGEST)).decode() for name in names}
    except (OSError, WrongEntry) as error:
        return {}, f"{directory} cannot be read: {error}"
    return found, f"there is none in {directory}"


def losses(description: Mapping[str, Any]) -> list[str]:
    """Return what is to be told of a set whose VM has a TPM, and which does not have its state."""
    found = (entry[len(LOST) :] for entry in description.get("removed", ()) if entry.startswith(LOST))
    return [f"the state of the TPM is not in the set: {reason}" for reason in found]


async def renewed(description: dict[str, Any]) -> dict[str, Any] | None:
    """Return the description of a VM with the state that its TPM has now; None where that is still the same."""
    # An earlier release may have written it, of a VM that is off since.
    tpm = description.get("tpm")
    if not tpm or not tpm["state"]:
        return None
    state = (await _read(tpm["directory"]))[0]
    return {**description, "tpm": {**tpm, "state": state}} if state not in ({}, tpm["state"]) else None


def _directory(arguments: list[str], chardev: str) -> str:
    """Return the directory of the state of a TPM whose swtpm is at the other end of a character device."""
    values = [value for option, value in zip(arguments, arguments[1:]) if option.lstrip("-") == "chardev"]
    found = (_properties(value) for value in values)
    socket = next((one["path"] for one in found if one.get("id") == chardev and one.get("path")), "")
    return _told_by_swtpm(socket) or os.path.dirname(socket)


def _told_by_swtpm(socket: str) -> str:
    """Return the directory that the process at a socket was started with, or C(file://); empty where it is not seen.

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
                place = uri[len("dir://") :] if uri.startswith("dir://") else state.get("dir", "")
                found.add(uri if uri.startswith(FILE) else place)
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

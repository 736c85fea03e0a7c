# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write the status of backups in the text format of Prometheus: a pure function of what is known of the VMs."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from .._backup.outcome import BAD, UNFINISHED, VmState
from .._common.formats import parse_time
from .._common.printable import printable_lines
from .._repository.documents import Level
from .status import ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any


DAMAGED = "vmfleet_backup_damaged"
HELP = {
    "vmfleet_backup_last_run_timestamp_seconds": "When the last run of the hypervisor ended.",
    "vmfleet_backup_last_run_vms": "VMs of the last run by their result.",
    "vmfleet_backup_last_success_timestamp_seconds": "Start of the VM's newest good set; 0 if there is none.",
    "vmfleet_backup_duration_seconds": "How long the newest good set took.",
    "vmfleet_backup_size_bytes": "Size of the images of the newest good set.",
    "vmfleet_backup_level": "Level of the newest good set: 1 for the one it has.",
    "vmfleet_backup_chain_length": "Images that the newest good set needs of the disk that needs most.",
    "vmfleet_backup_verified": "1 if the newest good set has been verified.",
    "vmfleet_backup_last_verified_timestamp_seconds": "When a set of the VM was last found to be good; 0 if never.",
    DAMAGED: "1 if the newest set of all is incomplete, cannot be read, or has failed its verification.",
    "vmfleet_backup_failed": "1 if the VM got no set in the last run.",
}


def metrics(repository: str, vms: Iterable[dict[str, Any]], now: int) -> str:
    """Return the text of a file for node_exporter's textfile collector."""
    samples: dict[str, list[str]] = {name: [] for name in HELP}
    for name, labels, value in _samples(list(vms), now):
        pairs = (f'{label}="{_escape(text)}"' for label, text in {"repository": repository, **labels}.items())
        samples[name].append(f"{name}{{{','.join(pairs)}}} {value}")
    lines: list[str] = []
    for name, found in samples.items():
        if found:
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} gauge", *found]
    return "\n".join(lines) + "\n"


def _samples(vms: list[dict[str, Any]], now: int) -> Iterator[tuple[str, dict[str, str], float]]:
    yield "vmfleet_backup_last_run_timestamp_seconds", {}, now
    for state in (VmState.PUBLISHED, VmState.FAILED, VmState.CANCELLED, VmState.SKIPPED):
        yield "vmfleet_backup_last_run_vms", {"state": state}, sum(vm["state"] == state for vm in vms)
    for vm in vms:
        of_vm, last = {"vm": vm["name"]}, vm["last"]
        yield DAMAGED, of_vm, int(bool(vm["damage"]))
        # Where sets cannot be read, there may still be good ones.
        if last or not vm["damage"]:
            yield "vmfleet_backup_last_success_timestamp_seconds", of_vm, _seconds(last["started"] if last else "")
            yield "vmfleet_backup_last_verified_timestamp_seconds", of_vm, _seconds(vm["verified_at"])
        # A worker may go on with those that are not at their end, and tells nobody here.
        if vm["state"] not in (ABSENT, *UNFINISHED):
            yield "vmfleet_backup_failed", of_vm, int(vm["state"] in BAD)
        if last:
            yield "vmfleet_backup_duration_seconds", of_vm, last["duration"]
            yield "vmfleet_backup_size_bytes", of_vm, last["bytes"]
            yield "vmfleet_backup_chain_length", of_vm, last["chain"]
            yield "vmfleet_backup_verified", of_vm, int(bool(last["verified"]))
            for level in (Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL):
                yield "vmfleet_backup_level", {**of_vm, "level": level}, int(last["level"] == level)


def _seconds(when: str) -> int:
    return int(parse_time(when).timestamp()) if when else 0


def _escape(text: str) -> str:
    return printable_lines(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], text)


def vms_in(text: str) -> list[str]:
    """Return the VMs that a file has metrics of."""
    pattern = DAMAGED + r'\{repository="(?:[^"\\]|\\.)*",vm="((?:[^"\\]|\\.)*)"\} '
    found = (re.match(pattern, line) for line in text.split("\n"))
    return [_unescape(one[1]) for one in found if one]


def file_name(repository: str) -> str:
    """Return the name of the file for a repository. Each has its own, so that runs into several do not mix."""
    readable = re.sub(r"[^A-Za-z0-9]+", "_", repository).strip("_")[:48]
    return "vmfleet_backup_{}_{}.prom".format(
        readable, hashlib.sha256(repository.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    )

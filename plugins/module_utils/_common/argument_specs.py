# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Give options to several modules: argument specs, each with a documentation fragment of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


def libvirt_argument_spec() -> dict[str, Any]:
    """Return the option that says which libvirt is meant. Its documentation is in C(doc_fragments/libvirt.py)."""
    return {"libvirt_uri": {"type": "str", "default": "qemu:///system"}}


def monitor_argument_spec() -> dict[str, Any]:
    """Return the options of modules that work on one VM. Their documentation is in C(doc_fragments/monitor.py)."""
    return {"monitor": {"type": "str", "required": True}, **libvirt_argument_spec()}


def drive_argument_spec(required: bool = False, defaults: bool = False) -> dict[str, Any]:
    """Return the options of one drive of drive_backup: on its own (C(defaults)), or in C(drives) (C(required))."""
    on_error = ["report", "ignore", "enospc", "stop"]
    spec: dict[str, Any] = {
        "device": {"type": "str", "required": required},
        "target": {"type": "str", "required": required},
        "format": {"type": "str"},
        "mode": {"type": "str", "choices": ["absolute-paths", "existing"], "default": "absolute-paths"},
        "speed": {"type": "bytes", "default": "0"},
        "on_source_error": {"type": "str", "choices": on_error, "default": "report"},
        "on_target_error": {"type": "str", "choices": on_error, "default": "report"},
        "sync": {"type": "str", "choices": ["full", "top", "incremental", "bitmap"], "default": "full"},
        "bitmap": {"type": "str"},
        "bitmap_mode": {"type": "str", "choices": ["on-success", "never", "always"]},
        "compress": {"type": "bool", "default": False},
        "job_id": {"type": "str"},
        "receipt": {"type": "path"},
    }
    if not defaults:
        for option in spec.values():
            option.pop("default", None)
    return spec

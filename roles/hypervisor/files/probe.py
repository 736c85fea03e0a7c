# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Print, as JSON, what the interpreter that runs this has to do with qemu.qmp, and with libvirt."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import site
import sys

try:
    import qemu.qmp

    path = qemu.qmp.__file__
    # Python 3.8 does not find the distribution by a name with a dot.
    version = next(
        known for known in importlib.metadata.distributions() if known.metadata["Name"] == "qemu.qmp"
    ).version
except (ImportError, StopIteration):
    path, version = "", "0"

print(
    json.dumps(
        {
            "qmp": version,
            "path": path,
            "pip": importlib.util.find_spec("pip") is not None,
            "distribution": sys.prefix == "/usr",
            "libvirt": importlib.util.find_spec("libvirt_qemu") is not None,
            "has_libvirt": os.path.isdir("/run/libvirt"),
            "site": site.getsitepackages()[0],
        },
    ),
)

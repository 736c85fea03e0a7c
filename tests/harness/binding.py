# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Debian's Python binding of libvirt, for the Python that runs the tests.

Debian builds it for its own Python; another Python of the same version takes it as well.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

# Everything else that Debian has there would hide what the tests have installed.
FILES = ("libvirt.py", "libvirt_qemu.py", "libvirtmod.*.so", "libvirtmod_qemu.*.so")
DEBIAN = Path("/usr/lib/python3/dist-packages")


@functools.cache
def directory() -> Path:
    """Return a directory with links to the binding's files; it is empty where there is no binding."""
    # Beside ansible_collections, in the tree that is removed after the tests.
    links = Path(__file__).parents[5] / "libvirt-binding"
    links.mkdir(exist_ok=True)
    for pattern in FILES:
        for file in DEBIAN.glob(pattern):
            # Another process of the tests may be as far.
            with contextlib.suppress(FileExistsError):
                (links / file.name).symlink_to(file)
    return links

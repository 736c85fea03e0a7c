# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell the flash chips of a VM's firmware from its disks."""

from __future__ import annotations

import re

FLASH = re.compile(r"/machine/[^/]*\bflash\d+")
"""The qdev path of the firmware's flash chips, such as C(/machine/system.flash0)."""

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures of the system tests."""

from __future__ import annotations

import pytest

# Before their import: a failed assertion in there is to tell what it saw.
pytest.register_assert_rewrite("ansible_collections.vmfleet.backup.tests.harness")

from ansible_collections.vmfleet.backup.tests.harness.fixtures import (
    clean,
    directory,
    libvirt,
    libvirt_bed,
    start_module,
    storage,
    target,
    vm,
    vms,
)

__all__ = ["clean", "directory", "libvirt", "libvirt_bed", "start_module", "storage", "target", "vm", "vms"]

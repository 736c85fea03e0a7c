# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name the version of the collection, and that of the documents that it writes."""

from __future__ import annotations

SCHEMA = 1
COLLECTION_VERSION = "0.1.0"
"""The version in galaxy.yml, which does not travel to the hypervisors."""

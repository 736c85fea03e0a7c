# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""backup_prune: what its options ask for."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._prune.retention import Rules
from ansible_collections.vmfleet.backup.plugins.modules.backup_prune import rules, seconds


class TestOptions:
    """The module's options."""

    def given(self, **options: Any) -> dict[str, Any]:
        counts = {f"keep_{name}": 0 for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly")}
        others: dict[str, Any] = {"keep_within": None, "names": None, "forget": False, "protect": [], "unprotect": []}
        return {**counts, **others, **options}

    def test_rules(self) -> None:
        assert rules(self.given(keep_last=3, keep_weekly=2, keep_within="36h")) == Rules(
            last=3, weekly=2, within=129600
        )

    def test_marks_alone_keep_everything(self) -> None:
        assert rules(self.given(protect=["s1"])).last > 1 << 30
        # Not so where the VM is to be forgotten.
        assert rules(self.given(protect=["s1"], forget=True, names=["web01"])).empty

    @pytest.mark.parametrize(("text", "days"), [("24h", 1), ("14d", 14), ("2w", 14), ("1y", 365)])
    def test_spans(self, text: str, days: int) -> None:
        assert seconds(text) == 86400 * days

    @pytest.mark.parametrize("text", ["", "14", "d", "-1d", "1.5d", "14 d", "14D", "14m", "14d "])
    def test_no_spans(self, text: str) -> None:
        with pytest.raises(Refused, match=r"^keep_within: "):
            seconds(text)

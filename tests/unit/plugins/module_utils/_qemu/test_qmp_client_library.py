# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The library qemu.qmp is there, or Ansible tells that it is missing."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import qmp_client


class TestLibrary:
    class Failed(Exception):
        """What fail_json ends with."""

    def module(self) -> Any:
        test = self

        class Module:
            def fail_json(self, **values: Any) -> None:
                raise test.Failed(values)

        return Module()

    def test_present(self) -> None:
        qmp_client.require_qmp(self.module())

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(qmp_client, "QMP_IMPORT_ERROR", "Traceback: no module named qemu")
        with pytest.raises(self.Failed) as failed:
            qmp_client.require_qmp(self.module())
        assert failed.value.args[0]["exception"] == "Traceback: no module named qemu"
        assert "qemu.qmp" in failed.value.args[0]["msg"]

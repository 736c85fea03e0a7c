# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How images that were labelled for a confined QEMU get their labels back, without QEMU."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup import finish
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import file_label, set_file_label
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation
from ansible_collections.vmfleet.backup.plugins.module_utils._repository import staging
from ansible_collections.vmfleet.backup.tests.unit.plugins.runs import in_run, locked, put_intent
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import intent

if TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.plugins.module_utils._backup.run import BackupRun
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import Repository


@pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")
@pytest.mark.parametrize("kept", [False, True])
def test_images_that_were_labelled_for_qemu_get_their_labels_back(
    kept: bool, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that cannot be done, the set is good all the same."""
    of, qemus, before = intent(), "system_u:object_r:svirt_image_t:s0:c1,c2", "system_u:object_r:var_t:s0"
    of = replace(of, disks=tuple(replace(disk, label=before) for disk in of.disks))
    paths = put_intent(repository, of)
    for path in paths:
        set_file_label(path, qemus)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EACCES, "Permission denied", paths[0])

    async def restore(run: BackupRun) -> list[str]:
        held = await locked(run, Observation(), None)
        await finish._restore_labels(held)
        return held.task.warnings

    if kept:
        monkeypatch.setattr(staging, "set_file_label", refuse)
    warnings = in_run(repository, restore)
    assert {file_label(path) for path in paths} == {qemus if kept else before}
    assert bool(warnings) == kept
    for warning in warnings:
        assert f"{paths[0]}: Permission denied; `restorecon -R {repository.path}`" in warning

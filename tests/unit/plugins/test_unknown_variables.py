# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Variables that a role would not hear."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError

from ansible_collections.vmfleet.backup.plugins.filter.unknown_variables import unknown_variables

ROLE = str(Path(__file__).parents[3] / "roles" / "vm_backup")


def test_what_the_role_documents_is_known() -> None:
    names = ["vm_backup_repository", "vm_backup_hosts", "vm_backup_serial", "vm_backup_keep", "vm_backup_restore_vm"]
    assert unknown_variables(names, ROLE) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vm_backup_exlude_disks", "did you mean vm_backup_exclude_disks?"),
        ("vm_backup_repo", "did you mean vm_backup_report_dir or vm_backup_repository or vm_backup_repository_create?"),
        ("vm_backup_Quiesce", "did you mean vm_backup_quiesce?"),
        ("vm_backup_favourite_colour", "remove it, or give it another name."),
    ],
)
def test_what_may_have_been_meant(name: str, said: str) -> None:
    assert unknown_variables([name, "vm_backup_id"], ROLE) == f"{name} is not a variable of this role: {said}"


def test_each_is_told() -> None:
    told = unknown_variables(["vm_backup_nmaes", "vm_backup_levle"], ROLE)
    assert told.index("vm_backup_levle is not") < told.index("vm_backup_nmaes is not")


def test_a_role_that_documents_nothing(tmp_path: Path) -> None:
    with pytest.raises(AnsibleFilterError, match="does not say what variables the role has"):
        unknown_variables([], str(tmp_path))

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the role hypervisor says of a machine that lacks something."""

from __future__ import annotations

import json
import typing as t

import yaml

from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play


def prepare(directory: Path, **variables: t.Any) -> Play:
    """Run the role with these variables."""
    play = {"hosts": "hypervisors", "gather_facts": False, "roles": ["vmfleet.backup.hypervisor"]}
    (directory / "prepare.yml").write_text(yaml.safe_dump([play]))
    return Hypervisor(directory).play("prepare.yml", "-e", json.dumps(variables))


def test_nothing_is_missing(directory: Path) -> None:
    play = prepare(directory)
    assert play.rc == 0, play.output
    assert play.recap()["changed"] == 0


def test_all_that_is_wrong_is_told_at_once_in_sentences(directory: Path) -> None:
    play = prepare(
        directory,
        hypervisor_qmp_source="wheel",
        # Whatever is installed here is too old.
        __hypervisor_qmp_minimum="99",
        hypervisor_selinux_repository="backup",
    )
    assert play.rc == 2, play.output
    said = " ".join(play.output.split())
    first = "hv1: hypervisor_qmp_source is 'wheel', but hypervisor_qmp_wheel is empty. Set it to the path of a wheel"
    assert first in said, play.output
    assert "hypervisor_selinux_repository is 'backup', and has to be the absolute path of a directory" in said
    assert "ssertion" not in said
    assert "tasks/preflight.yml" not in said
    assert play.recap()["changed"] == 0

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Places inside of repositories are refused, by whatever path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import find_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import refuse_inside

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    (path / "web01").mkdir(parents=True)
    (path / "vmfleet.json").write_text("{}")
    return path


@pytest.mark.parametrize("place", ["", "web01", "web01/x.qcow2", "no/such/x", "vmfleet.json/x", "web01/.."])
def test_inside(repository: Path, place: str) -> None:
    with pytest.raises(Refused, match=f"^target: .* is inside of the repository {repository}; "):
        refuse_inside("target", os.path.join(repository, place))


def test_by_a_link(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(repository / "web01")
    with pytest.raises(Refused):
        refuse_inside("target", str(tmp_path / "link" / "x"))
    # What the marker is does not matter.
    (repository / "vmfleet.json").unlink()
    (repository / "vmfleet.json").symlink_to("nowhere")
    with pytest.raises(Refused):
        refuse_inside("target", str(repository / "x"))


@pytest.mark.parametrize("place", ["/", "/x", "{tmp}/x", "{tmp}/repository2", "{tmp}/repository/../x"])
def test_outside(repository: Path, tmp_path: Path, place: str) -> None:
    assert repository.exists()
    refuse_inside("target", place.format(tmp=tmp_path))


def test_no_repository_is_made_in_another_one(repository: Path, tmp_path: Path) -> None:
    for path in (repository / "web01", repository / "new", repository / "no" / "such"):
        with pytest.raises(Refused, match=r"^repository: "):
            find_repository(str(path), create=True)
    assert find_repository(str(tmp_path / "repository2"), create=True).uuid == ""
    assert sorted(path.name for path in repository.iterdir()) == ["vmfleet.json", "web01"]

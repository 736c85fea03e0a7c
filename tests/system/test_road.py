# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The road of a newcomer: all commands, playbooks and inventories of README and guides, in the order of the text.

They are run as they stand, on machines of the names that the text uses. harness/road_tables.py has the exceptions,
and what the text leaves to its reader.
"""

from __future__ import annotations

import fcntl
import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness import road_tables as tables
from ansible_collections.vmfleet.backup.tests.harness.documented import walked
from ansible_collections.vmfleet.backup.tests.harness.road import Road, build_tarball, fetch_wheel, install_ansible
from ansible_collections.vmfleet.backup.tests.harness.road_walk import Walk
from ansible_collections.vmfleet.backup.tests.harness.road_world import make_new

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="machines of its own need root"),
]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what is had from elsewhere once, for all processes of the tests."""
    mine = tmp_path_factory.getbasetemp()
    shelf = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "road"
    shelf.mkdir(exist_ok=True)
    with (shelf / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shelf / "complete").exists():
            install_ansible(shelf / "ansible")
            build_tarball(shelf)
            fetch_wheel(shelf)
            (shelf / "complete").touch()
    return shelf


@pytest.fixture(scope="module")
def road(shelf: Path) -> t.Iterator[Road]:
    """Machines on which the collection, and what it needs, is installed."""
    with Road(shelf / "ansible" / "bin") as road:
        road.settle(tarball(shelf), wheel(shelf))
        yield road


def tarball(shelf: Path) -> Path:
    [found] = shelf.glob("vmfleet-backup-*.tar.gz")
    return found


def wheel(shelf: Path) -> Path:
    [found] = shelf.glob("files/*.whl")
    return found


def walk(road: Road, shelf: Path, page: str, **variables: str) -> None:
    make_new(road, guest=page == tables.README, tpm=page == tables.guide("guide_worst_day"))
    way = Walk(road, page, tarball(shelf), {"hypervisor_qmp_wheel": str(wheel(shelf)), **variables})
    way.go()
    assert not way.problems, "\n\n".join(way.problems)


def test_from_nothing(shelf: Path) -> None:
    with Road(shelf / "ansible" / "bin") as road:
        walk(road, shelf, tables.README)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.thorough] if page in tables.THOROUGH else [])
        for page in walked()
        if page != tables.README
    ],
)
def test_a_page_is_as_it_says(road: Road, shelf: Path, page: str) -> None:
    # It is found anyway, with a warning at each run.
    walk(road, shelf, page, ansible_python_interpreter="/usr/bin/python3")

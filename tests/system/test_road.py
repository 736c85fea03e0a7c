# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The road of a newcomer: all commands, playbooks and inventories of README and guides, in the order of the text.

They are run as they stand there, on machines of the names that the text uses. What the text leaves to its reader, what is
run somewhere else than on the controller, and what cannot be run here, is in harness/road_tables.py.
"""

from __future__ import annotations

import fcntl
import os
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.documented import PAGES, blocks
from ansible_collections.vmfleet.backup.tests.harness import road_tables as tables
from ansible_collections.vmfleet.backup.tests.harness.road import Road, build_tarball, fetch_wheel, install_ansible
from ansible_collections.vmfleet.backup.tests.harness.road_walk import Walk
from ansible_collections.vmfleet.backup.tests.harness.road_world import make_new

if t.TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="machines of its own need root"),
]

WALKED = [
    name
    for name, page in PAGES.items()
    if any(block.language in ("console", "yaml", "yaml+jinja") for block in blocks(page))
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
    with Road(shelf / "ansible" / "bin") as road:
        yield road


@pytest.mark.parametrize("page", WALKED)
def test_a_page_is_as_it_says(road: Road, shelf: Path, page: str) -> None:
    make_new(road, guest=page == tables.README)
    [tarball], [wheel] = shelf.glob("*.tar.gz"), shelf.glob("files/*.whl")
    walk = Walk(road, page, tarball, {"hypervisor_qmp_wheel": str(wheel)})
    walk.go()

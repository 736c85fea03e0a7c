# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Something else stands in a repository than its name says: a link, a pipe, a device, a directory, a file."""

from __future__ import annotations

import contextlib
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.hostile import Canary, Pair


@pytest.fixture(scope="module")
def made() -> t.Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        yield Pair.made(Vms(Path(path), stack), Path(path))


@pytest.fixture
def canary(directory: Path) -> t.Iterator[Canary]:
    found = Canary(directory / "outside")
    yield found
    found.assert_untouched()


@pytest.fixture
def pair(made: Pair, directory: Path) -> Pair:
    return made.copied(directory)


@pytest.mark.usefixtures("canary")
def test_a_healthy_repository_is_served(pair: Pair) -> None:
    pair.assert_neighbour_served()

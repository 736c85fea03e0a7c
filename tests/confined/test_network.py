# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Repositories on NFS 4.2 and on SMB, mounted as the guides say (`make confined`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.directory import Directory
from ansible_collections.vmfleet.backup.tests.harness.history import SIZE, History
from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Library
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="session")
def _servers() -> None:
    done = subprocess.run(
        [Path(__file__).parent / "servers"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["nfs", "smb"])
def library(request: pytest.FixtureRequest, _servers: None) -> t.Iterator[Library]:
    """A repository on such a file system, that is still to be made."""
    path = Path(tempfile.mkdtemp(prefix="vmfleet-test-", dir=f"/run/{request.param}"))
    library = Library(path / "repository")
    yield library
    shutil.rmtree(path)


@pytest.fixture
def history(vms: Vms, library: Library, directory: Path) -> History:
    """The sets of a VM."""
    return History(vms.start(vms.disk(size=SIZE), name=NAME), library, directory, NAME)


def go_on(history: History, number: int, **options: t.Any) -> str:
    history.vm.write("drive0", 0xA0 + number, number * MIB, 65536)
    return history.back_up(f"s{number}", **options)


@pytest.mark.parametrize("library", ["nfs"], indirect=True)
def test_a_whole_life(history: History, library: Library, directory: Path) -> None:
    assert go_on(history, 1) == "full"
    assert go_on(history, 2) == "incremental"

    said = library.prune(keep_last=1, consolidate=True)
    assert ([one["id"] for one in said["removed"]], said["warnings"]) == (["s1"], [])
    assert [one["id"] for one in said["kept"] if one["consolidated"]] == ["s2"]
    history.forget("s1")
    assert history.note("s2") == {"drive0": "full"}

    assert go_on(history, 3, compression="zstd") == "incremental"
    history.check()
    verified = succeed("backup_verify", {"repository": str(library.path), "depth": "image"})
    assert ([one["ok"] for one in verified["results"]], verified["warnings"]) == ([True], [])
    (directory / "restored").mkdir()
    library.restore(directory=str(directory / "restored"))
    assert identical(history.copies("s3")["drive0"], directory / "restored" / "drive0.qcow2")

    library.prune(names=[NAME], forget=True)
    assert library.listed() == []


@pytest.mark.parametrize("mode", [0o600, 0o440])
def test_a_document_that_somebody_reads_is_replaced(mode: int, library: Library) -> None:
    """A server of SMB refuses that while they have it open."""
    with Directory.at(str(library.path.parent)) as place:
        place.write("document", b"old", mode)
        reader = os.open(library.path.parent / "document", os.O_RDONLY)
        ended = threading.Timer(0.5, os.close, [reader])
        ended.start()
        place.write("document", b"new", mode)
        ended.join()
        assert (place.names(), place.read("document", 100)) == (["document"], b"new")


@pytest.mark.parametrize("library", ["smb"], indirect=True)
def test_set_of_a_vm_that_runs_is_refused(history: History, library: Library) -> None:
    """Before anything is begun: it could not be published, as it is renamed while QEMU has its images open."""
    [planned] = library.plan(history.vm)["plan"]["vms"]
    assert planned["action"] == "fail"
    assert planned["reason"].startswith(f"{library.path} is on SMB: ")
    assert result_of(library.fail(history.vm), NAME)["error"] == planned["reason"]
    library.assert_absent(NAME)

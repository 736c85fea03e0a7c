# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who has a file open: real processes, each with it in another way."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common import errors
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host import open_files
from ansible_collections.vmfleet.backup.plugins.module_utils._host.open_files import refuse_used, users_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPENED = "file = open(sys.argv[1], 'rb')"
WRITTEN = "file = open(sys.argv[1], 'r+b')"
MAPPED = f"{OPENED}; mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); file.close()"
READY = "print(flush=True); sys.stdin.read()"


@contextmanager
def process(does: str, *arguments: Path) -> Iterator[int]:
    """A process that has done this, and is there until the end of the context."""
    command = [sys.executable, "-c", f"import mmap, os, sys\n{does}\n{READY}", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline()
        yield child.pid
        child.stdin.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk one.qcow2"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize("does", [OPENED, WRITTEN, MAPPED])
def test_a_process_is_found_by_what_it_has_open(image: Path, does: str) -> None:
    assert users_of(str(image)).names == ()
    with process(does, image) as pid:
        [name] = users_of(str(image)).names
        assert name.endswith(f" (process {pid})")
        with pytest.raises(Refused, match=rf"^target: {image} is in use by \S+ \(process {pid}\); end that first$"):
            refuse_used("target", str(image))
    assert users_of(str(image)).names == ()


def test_names_do_not_matter(image: Path, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(image)
    os.link(image, other := tmp_path / "other")
    with process(OPENED, other):
        image.rename(moved := tmp_path / "moved")
        link.unlink()
        link.symlink_to(moved)
        assert len(users_of(str(link)).names) == 1


def test_another_file_of_the_same_name_or_number_is_not_it(image: Path, tmp_path: Path) -> None:
    with process(OPENED, image):
        image.unlink()
        image.write_bytes(b"content")
        assert users_of(str(image)).names == ()
    assert users_of(str(tmp_path)).names == ()


def test_this_process_does_not_count(image: Path) -> None:
    with image.open():
        assert users_of(str(image)).names == ()


def test_kernels_that_do_not_tell_numbers(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_may_be", lambda *_args: True)
    with process(OPENED, image) as pid:
        assert users_of(str(image)).names[0].endswith(f"(process {pid})")


def test_what_cannot_be_seen_is_told(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}
    monkeypatch.setattr(errors, "_warnings", said)
    monkeypatch.setattr(open_files, "INITIAL_PID_NAMESPACE", 1)
    assert not users_of(str(image)).complete
    refuse_used("target", str(image))
    assert "cannot see here whether a process" in said[str(image)]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_another_user_sees_little(image: Path) -> None:
    image.parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os._exit(users_of("/proc/self/exe").complete)
    assert os.waitpid(child, 0)[1] == 0

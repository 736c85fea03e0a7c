# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets of a VM that says a word when it starts, and throwaway VMs that are started from them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, qemu_img
from ansible_collections.vmfleet.backup.tests.harness.qemu import Disk

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu
    from ansible_collections.vmfleet.backup.tests.harness.sets import Sets

SIZE = 8 * MIB
NAME = "web01"

# A boot sector that sends the text which follows it to the first serial port, and then does one of these.
SPEAK = bytes.fromhex("fa 31c0 8ed8 baf803 be1c7c ac 84c0 7403 ee ebf8")
WAIT = bytes.fromhex("f4 ebfd 909090909090")
RESTART = bytes.fromhex("b0fe e664 f4 ebfd 9090")


def speaking(path: Path, words: str, then: bytes = WAIT) -> Path:
    """An image whose boot sector says these words on the serial console."""
    code = SPEAK + then + words.encode() + b"\r\n\0"
    sector = code.ljust(510, b"\0") + b"\x55\xaa"
    raw = path.with_suffix(".raw")
    raw.write_bytes(sector.ljust(SIZE, b"\0"))
    qemu_img("convert", "-O", "qcow2", raw, path)
    raw.unlink()
    return path


def bootable(vms: Vms, sets: Sets, directory: Path, words: str = "HELLO", then: bytes = WAIT, **options: t.Any) -> Qemu:
    """A VM whose newest set is an increment, which has the boot sector; in the full one it is empty."""
    empty = directory / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", empty, str(SIZE))
    device = options.pop("device", "ide-hd,bus=ide.0")
    machine = {"machine": "q35,accel=tcg", "paused": True, "extra": ["-m", "64"], **options}
    vm = vms.start(Disk(empty, device=device), name=NAME, **machine)
    sets.back_up(vm, id="s1")
    sector = speaking(directory / "sector.qcow2", words, then)
    with tempfile.NamedTemporaryFile() as raw:
        qemu_img("convert", "-O", "raw", sector, raw.name)
        said = vm.io("drive0", f"write -s {raw.name} 0 512")
        assert "wrote 512/512" in said
    sets.back_up(vm, id="s2")
    assert sets.levels(NAME, "s2") == {"drive0": "incremental"}
    return vm


def boot(place: Path, **options: t.Any) -> dict[str, t.Any]:
    given = {"depth": "boot", "boot_pattern": "^HELLO$", "boot_agent": False, "tmpdir": str(place)}
    return {**given, **user(), **options}


def user() -> dict[str, str]:
    """Who starts throwaway VMs: the default, unless the QEMU of these tests stands where only root gets at it."""
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu
    is_open = all(path.stat().st_mode & 0o001 for path in (Path(qemu), *Path(qemu).parents))
    return {} if is_open else {"boot_user": "root"}


def throwaway(place: Path) -> list[int]:
    """The QEMUs that were started in a work directory below this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # It may end at this moment.
        with contextlib.suppress(OSError):
            inside = place in (entry / "cwd").readlink().parents
            if inside and b"qemu-system" in (entry / "cmdline").read_bytes().split(b"\0")[0]:
                found.append(int(entry.name))
    return found

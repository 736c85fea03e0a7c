# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Disk images: made, compared and looked at with qemu-img and qemu-io."""

from __future__ import annotations

import itertools
import json
import subprocess
import typing as t

if t.TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def qemu_img(*args: str | Path) -> str:
    """Run qemu-img and return what it prints."""
    done = _run("qemu-img", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def create(path: Path, size: int = 64 * MIB, fmt: str = "qcow2", backing: Path | None = None) -> Path:
    """Make an empty image."""
    base = ("-b", backing, "-F", "qcow2") if backing else ()
    qemu_img("create", "-q", "-f", fmt, *base, path, str(size))
    return path


def write(path: Path, *commands: str, fmt: str = "qcow2") -> None:
    """Run qemu-io commands on an image that no VM has open."""
    done = _run("qemu-io", "-f", fmt, *(word for command in commands for word in ("-c", command)), path)
    assert done.returncode == 0, done.stdout + done.stderr


def patterned(path: Path, fmt: str = "qcow2", size: int = 64 * MIB, seed: int = 0) -> Path:
    """An image half full: eight pieces, each with a pattern of its own and a hole behind it."""
    create(path, size, fmt)
    pieces = ((seed + number) % 255 + 1 for number in range(8))
    write(path, *(f"write -P {piece} {at * size // 8} {size // 16}" for at, piece in enumerate(pieces)), fmt=fmt)
    return path


def layered(directory: Path, name: str, layers: int, size: int = 64 * MIB, seed: int = 0) -> list[Path]:
    """So many images, each on top of the one before; the first one is half full, and the others are empty."""
    images = [directory / f"{name}{layer:03}" for layer in range(layers)]
    patterned(images[0], size=size, seed=seed)
    if layers > 1:
        # qemu-img needs a while for hundreds of them. They are all the same, but for a name of one length.
        empty = create(images[1], size, backing=images[0]).read_bytes()
        assert empty.count(bytes(images[0])) == 1
        for lower, image in itertools.pairwise(images[1:]):
            image.write_bytes(empty.replace(bytes(images[0]), bytes(lower)))
    return images


def info(path: Path) -> dict[str, t.Any]:
    """What qemu-img says of an image."""
    told: dict[str, t.Any] = json.loads(qemu_img("info", "-U", "--output=json", path))
    return told


def identical(one: Path, other: Path, one_format: str = "qcow2", other_format: str = "qcow2") -> bool:
    """Whether two images show a guest the same content."""
    done = _run("qemu-img", "compare", "-U", "-f", one_format, "-F", other_format, one, other)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def unlocked(path: Path, fmt: str = "qcow2") -> bool:
    """Whether an image can be opened for writing, that is: nobody else has it open."""
    return _run("qemu-io", "-f", fmt, "-c", "quit", path).returncode == 0


def sound(path: Path, fmt: str = "qcow2") -> bool:
    """Whether qemu-img check finds neither errors nor leaked clusters."""
    return _run("qemu-img", "check", "-f", fmt, path).returncode == 0


def assert_pattern(path: Path, fmt: str, pattern: int, offset: int, length: int) -> None:
    """An image holds a pattern there, also one that a VM has open and has flushed."""
    done = _run("qemu-io", "-r", "-U", "-f", fmt, "-c", f"read -P {pattern} {offset} {length}", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout, done.stdout

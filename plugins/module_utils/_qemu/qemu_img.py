# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run qemu-img: its commands as argument lists, and their answers.

Reference: QEMU 7.2, docs/tools/qemu-img.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from typing import TYPE_CHECKING

from .._common.errors import ToolError
from .._common.redaction import redact_text
from .._host.process import die_with_parent
from .._host.progress import Patience

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .._host.pace import Pace


class NotInstalled(ToolError):
    """There is no qemu-img here."""


TIMEOUT = 60.0
"""Seconds for one qemu-img command that looks at metadata only; a hung file system is what comes near it."""
LOOK_INTERVAL = 10.0
"""Seconds between two looks whether a long command goes on."""
PIECE = 1 << 16
"""Bytes of output that are handed on at a time."""
MAX_LINES = 3
"""Lines of an error that are told; C(qemu-img check) may have one for each cluster."""
CLUSTER = 65536
"""qcow2's default cluster size, in bytes; a table of this size tells of half a GiB."""
ALIGNMENT = 4096
"""Bytes of the largest blocks that storage has: O_DIRECT reads and writes whole ones."""


def create_command(
    path: str,
    image_format: str,
    size: int,
    options: dict[str, str] | None = None,
    backing: tuple[str, str] | None = None,
) -> list[str]:
    """Return C(qemu-img create). C(backing) is a file name and its format: written down, not opened (C(-u))."""
    command = ["qemu-img", "create", "-q", "-f", image_format]
    if options:
        command += ["-o", ",".join("{}={}".format(*item) for item in sorted(options.items()))]
    if backing:
        command += ["-u", "-b", backing[0], "-F", backing[1]]
    return [*command, "--", path, str(size)]


def measure_command(path: str, image_format: str, target_format: str) -> list[str]:
    """Return C(qemu-img measure) of an image that a VM may have open. Without a format, the name has to tell it."""
    return ["qemu-img", "measure", "-U", "--output=json", *_format("-f", image_format), "-O", target_format, "--", path]


def is_aligned(image_format: str, size: int) -> bool:
    """Return whether O_DIRECT can write an image to its end, which is that of the disk in a raw one."""
    return image_format != "raw" or size % ALIGNMENT == 0


def _format(option: str, image_format: str) -> list[str]:
    return [option, image_format] if image_format else []


async def run(command: list[str], timeout: float = TIMEOUT, pass_fds: tuple[int, ...] = ()) -> str:
    """Run a command and return what it printed; raises ToolError with the command's own words.

    C(pass_fds) are inherited: the images of a chain, or a lock, which lasts until a command that writes has ended, even
    where its parent is killed before.
    """
    return await _run(command, timeout, pass_fds)


async def run_reading(command: list[str], take: Callable[[bytes], None], timeout: float = TIMEOUT) -> None:
    """Do as run() does, and have C(take) called with what the command prints, as it comes: it may be a lot.

    What C(take) raises ends the command.
    """
    await _run(command, timeout, (), take=take)


async def run_long(command: list[str], pass_fds: tuple[int, ...] = (), pace: Pace | None = None) -> str:
    """Do as run() does with a command that reads or writes whole images, for as long as it goes on.

    It ends with this process: nobody needs what it would go on to write. C(pace) is for those who read the same files.
    """
    try:
        return await _run(command, None, pass_fds, pace)
    finally:
        if pace:
            pace.end()


async def _run(
    command: list[str],
    timeout: float | None,
    pass_fds: tuple[int, ...],
    pace: Pace | None = None,
    take: Callable[[bytes], None] | None = None,
) -> str:
    """Run a command; without a C(timeout) a long one."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(command if timeout else die_with_parent(command)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=pass_fds,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise _not_installed(command) from None
    if pace:
        pace.begin(process.pid)
    said = asyncio.ensure_future(_hear(process, take) if take else process.communicate())
    reason = "it is not waited for"
    try:
        reason = await _wait(said, process.pid, timeout)
    finally:
        if reason:
            said.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            # What it writes to may be written by others next. A process that hangs in the kernel does not end.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), 1)
    if reason:
        text = "{}: {}; does its file system hang?".format(" ".join(command), reason)
        raise ToolError(_readable(command, text, pass_fds))
    output, errors = await said
    if process.returncode != 0:
        raise ToolError(
            _readable(command, "{}: {}".format(" ".join(command), errors.decode("utf-8", "replace").strip()), pass_fds)
        )
    return output.decode("utf-8", "replace")


async def _hear(process: asyncio.subprocess.Process, take: Callable[[bytes], None]) -> tuple[bytes, bytes]:
    """Do as communicate() does, and hand on what the process prints instead of returning it."""
    errors: list[bytes] = []
    try:
        await asyncio.gather(_pass_on(process.stdout, take), _pass_on(process.stderr, errors.append))
    except Exception:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    await process.wait()
    return b"", b"".join(errors)


async def _pass_on(source: asyncio.StreamReader | None, take: Callable[[bytes], None]) -> None:
    while source and not source.at_eof():
        take(await source.read(PIECE))


async def _wait(said: asyncio.Future[Any], pid: int, timeout: float | None) -> str:
    """Wait for the end of a process; return why it will not come, or is not waited for any longer."""
    if timeout:
        return "" if (await asyncio.wait([said], timeout=timeout))[0] else f"no end within {timeout:g} s"
    patience = Patience(pid)
    reason = ""
    while not reason and not (await asyncio.wait([said], timeout=LOOK_INTERVAL))[0]:
        reason = patience.ends()
    return reason


def _not_installed(command: list[str]) -> NotInstalled:
    return NotInstalled(
        f"{command[0]} is not installed on this hypervisor (Debian: qemu-utils, Red Hat and SUSE: qemu-img)"
    )


def by_descriptor(fd: int) -> str:
    """Return the name by which a command opens the file of a descriptor that it inherits."""
    return f"/proc/self/fd/{fd}"


def _readable(command: list[str], text: str, fds: tuple[int, ...]) -> str:
    """Return a text with paths in place of the C(json:) names and descriptors that a command was given."""
    for word in command:
        if word.startswith("json:"):
            text = text.replace(word, _path(word))
    # The name of the first descriptor may be the beginning of another's.
    for fd in sorted(fds, reverse=True):
        text = text.replace(by_descriptor(fd), os.readlink(by_descriptor(fd)))
    return shorten(redact_text(text))


def shorten(text: str) -> str:
    """Return the first lines of a text as one, and how many more there are. An error has no ends of lines any more."""
    lines = [line for line in text.splitlines() if line]
    more = len(lines) - MAX_LINES
    return " / ".join(lines[:MAX_LINES]) + (f" and {more} more lines" if more > 0 else "")


def _path(name: str) -> str:
    """Return the path in a C(json:) name. One that has none stays as it is: RBD, NBD, quorum, cut short by QEMU."""
    try:
        return str(json.loads(name[len("json:") :])["file"]["filename"])
    except (ValueError, LookupError, TypeError):
        return name


async def run_json(command: list[str], timeout: float = TIMEOUT, pass_fds: tuple[int, ...] = ()) -> Any:
    """Run a command that prints JSON."""
    return json.loads(await run(command, timeout, pass_fds))


def require_qemu_img() -> None:
    """Raise ToolError where there is no qemu-img: better now than after the first VM."""
    if shutil.which("qemu-img") is None:
        raise _not_installed(["qemu-img"])

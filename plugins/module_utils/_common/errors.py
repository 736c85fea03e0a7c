# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Name what can go wrong, and put errors into words."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
from typing import TYPE_CHECKING

from .printable import printable, printable_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule


SHORTAGES = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
"""What the operating system says where it has no processes, memory or files left: nobody was asked."""
_warnings: dict[str, str] = {}


class BackupError(Exception):
    """What happened, to which VM and disk, and what to do. C(details) become return values of the failing module."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(printable(message))
        self.details = details


class Refused(BackupError):
    """Bad input, found before anything was changed. The message begins with the option's name."""

    def __init__(self, option: str, reason: str, **details: Any) -> None:
        super().__init__(f"{option}: {reason}", **details)
        self.option = option


class MonitorError(BackupError):
    """The monitor cannot be reached, or the conversation with it broke off."""


class MonitorGone(MonitorError):
    """Nobody serves the monitor's address: the VM is off, or its QEMU has ended."""


class MonitorLost(MonitorError):
    """The way to the monitor has broken off, or is not there. That tells nothing of QEMU."""


class MonitorTimeout(MonitorError):
    """The monitor did not answer in time."""


class CommandError(BackupError):
    """QEMU refused a QMP command. C(description) is what it said, without secrets (C(_common/redaction.py))."""

    def __init__(self, monitor: str, command: str, error_class: str, description: str) -> None:
        self.command = command
        self.error_class = error_class
        self.description = description.strip()
        super().__init__(f"{monitor}: QEMU refused {command}: {self.description}")


class AgentError(BackupError):
    """The guest agent cannot be asked, or does not do what it was asked for."""


class ToolError(BackupError):
    """qemu-img is missing, failed, or took too long."""


class RepositoryHangs(BackupError):
    """The repository's file system does not answer any more. The last call may still be done later, or never."""


class Unasked(BackupError):
    """Nobody could be sent to ask a file system, or has come back. That tells nothing of the file system."""


class JobFailed(BackupError):
    """A backup did not end well; everything of that attempt has been cleaned up, or the message says what was not."""


def is_unasked(error: BaseException | None) -> bool:
    """Tell whether an error says only that somebody could not ask, and nothing of what was to be asked."""
    while error is not None:
        if isinstance(error, Unasked) or (isinstance(error, OSError) and error.errno in SHORTAGES):
            return True
        error = error.__cause__
    return False


def internal(error: Exception) -> str:
    """Return what is told of a defect of ours that shows with one VM. Its traceback has to be told as a warning."""
    return f"internal error: {error!r}; report it with the warning"


@contextlib.contextmanager
def after(first: BaseException | str) -> Iterator[None]:
    """Tell what goes wrong while something is ended after the reason why it is ended, which matters more."""
    try:
        yield
    except MonitorError:
        # The caller decides what it means that QEMU cannot be asked.
        raise
    except (BackupError, OSError) as error:
        kind = type(error) if isinstance(error, (RepositoryHangs, JobFailed)) else BackupError
        details = error.details if isinstance(error, BackupError) else {}
        cause = first if isinstance(first, str) else in_words(first)
        raise kind(f"{cause}; and then: {in_words(error)}", **details) from error


def in_words(error: BaseException) -> str:
    """Return what an error says, in words: an OSError with the file first, and without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return printable(str(error))
    return printable(f"{os.fsdecode(error.filename)}: {why(error)}" if error.filename else why(error))


def why(error: OSError) -> str:
    """Return what the operating system says, and whom it has refused: mostly somebody has forgotten to become root."""
    text = error.strerror or str(error)
    if error.errno not in (errno.EACCES, errno.EPERM) or os.geteuid() == 0:
        return text
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = str(os.geteuid())
    return f"{text} (the user is {user}; ansible_become: true makes it root)"


def warn_once(subject: str, text: str) -> None:
    """Keep a warning for the result of the module, one for each subject."""
    _warnings.setdefault(subject, text)


def kept_warnings() -> list[str]:
    """Return the warnings so far."""
    return list(_warnings.values())


def warn(module: AnsibleModule, text: str) -> None:
    """Show a warning, which may name what others have named."""
    module.warn(printable_lines(text))

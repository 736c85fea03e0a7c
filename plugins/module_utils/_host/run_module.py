# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a module to its end: show its warnings, and turn an error into its failure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .._common.errors import BackupError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule


_warnings: dict[str, str] = {}


def warn_once(subject: str, text: str) -> None:
    """Keep a warning for the result of the module, one for each subject."""
    _warnings.setdefault(subject, text)


def kept_warnings() -> list[str]:
    """Return the warnings so far."""
    return list(_warnings.values())


def run_module(module: AnsibleModule, main: Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]]) -> None:
    """Run the coroutine C(main) and end the module with its result, or with what its BackupError says."""
    try:
        result = asyncio.run(main(module))
    except BackupError as error:
        _warn(module)
        module.fail_json(msg=str(error), **error.details)
    except OSError as error:
        _warn(module)
        module.fail_json(
            msg="{}: the operating system refused: {}".format(error.filename or "I/O", error.strerror or error)
        )
    _warn(module)
    module.exit_json(**result)


def _warn(module: AnsibleModule) -> None:
    # Ansible shows a warning once, however many modules of a run have the same.
    for warning in kept_warnings():
        module.warn(warning)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a module, and tell its errors."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from .._common.errors import BackupError
from .files import unkept

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from ansible.module_utils.basic import AnsibleModule


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
    # Ansible takes plain strings only, not the words of closed lists.
    module.exit_json(**json.loads(json.dumps(result)))


def _warn(module: AnsibleModule) -> None:
    """Ansible shows a warning once, however many modules of a run have the same."""
    for warning in unkept():
        module.warn(warning)

# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a module to its end: options that cannot be meant, and errors, are its failure."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

from ansible.module_utils.basic import AnsibleModule

from .errors import BackupError, kept_warnings, warn, why
from .options import check_options
from .printable import printable, printable_result

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any


def make_module(**options: Any) -> AnsibleModule:
    """Return the module with its arguments, or end it where Ansible cannot take them."""
    try:
        return AnsibleModule(**options)
    except OverflowError:
        # ansible-core 2.18 to 2.21 do not expect that int() refuses an infinite number.
        names = ", ".join(name for name, option in options["argument_spec"].items() if option.get("type") == "int")
        sys.stdout.write(json.dumps({"failed": True, "msg": f"{names}: a number cannot be infinite"}) + "\n")
        raise SystemExit(1) from None


def run_module(module: AnsibleModule, main: Callable[[AnsibleModule], Coroutine[Any, Any, dict[str, Any]]]) -> None:
    """Run the coroutine C(main) and end the module with its result, or with what its BackupError says."""
    try:
        check_options(module.argument_spec, module.params)
        result = asyncio.run(main(module))
    except BackupError as error:
        _warn(module)
        module.fail_json(msg=str(error), **printable_result(error.details))
    except OSError as error:
        _warn(module)
        said = "{}: the operating system refused: {}".format(error.filename or "I/O", why(error))
        module.fail_json(msg=printable(said))
    _warn(module)
    module.exit_json(**printable_result(result))


def _warn(module: AnsibleModule) -> None:
    # Ansible shows a warning once, however many modules of a run have the same.
    for warning in kept_warnings():
        warn(module, warning)

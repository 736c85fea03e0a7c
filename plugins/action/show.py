# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Show lines as people read them, and fail with one sentence."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.color import stringc

from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable
from ansible_collections.vmfleet.backup.plugins.plugin_utils._layout import lay_out

if TYPE_CHECKING:
    from typing import Any

ON_TERMINAL = sys.stdout is not None and sys.stdout.isatty()
# Both are read before Ansible gives its workers other files, which are no terminals. What goes to a file or a pipe is
# not wrapped: people search in it.
WIDTH = shutil.get_terminal_size().columns if ON_TERMINAL or os.environ.get("COLUMNS", "").isdigit() else 0
PROGRAMS = ("json", "jsonl", "ndjson")
"""The last part of the names of stdout callbacks whose output is read by programs."""


class ActionModule(ActionBase):
    """Nothing is executed on the host: the lines are those that a module has returned before."""

    TRANSFERS_FILES = False
    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Show C(text), then fail with C(error) where there is one."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _given, options = self.validate_argument_spec(  # type: ignore[no-untyped-call]
            {
                "text": {"type": "list", "elements": "str", "default": []},
                "error": {"type": "str", "default": ""},
            }
        )
        if options["text"] and not self._task.no_log:
            self._show(options["text"])
        if options["error"]:
            # ansible-core 2.19 and newer would add the lines of this role that lead here: they explain nothing.
            task: Any = self._task
            task._ds = None  # noqa: SLF001
            raise AnsibleActionFail(printable(options["error"]))
        return {**result, "changed": False, "text": options["text"]}

    def _show(self, text: list[str]) -> None:
        if str(_setting("DEFAULT_STDOUT_CALLBACK")).rpartition(".")[2] in PROGRAMS:
            # They find the lines in the result.
            return
        tones = {"bad": _setting("COLOR_ERROR"), "warning": _setting("COLOR_WARN")}
        lines = list(lay_out([part for line in text for part in printable(line).splitlines()], WIDTH))
        shown = [stringc(line.text, tones[line.tone]) if line.tone else line.text for line in lines]
        # In one piece: nothing of another hypervisor gets in between, and it is one event of ansible-runner.
        self._display.display("\n".join(shown), screen_only=True)
        self._display.display("\n".join(line.text for line in lines), log_only=True)


def _setting(name: str) -> Any:
    return constants.config.get_config_value(name)

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Use the library qemu.qmp, which no other file imports."""

from __future__ import annotations

import json
import logging
import traceback
from typing import TYPE_CHECKING

from ansible.module_utils.basic import missing_required_lib

QMP_IMPORT_ERROR: str | None = None
try:
    from qemu.qmp import (
        ConnectError,
        ExecInterruptedError,
        ExecuteError,
        QMPClient,
        QMPError,
        Runstate,
        StateError,
    )

    class Client(QMPClient):
        """A client that knows which of its questions are open. C(unanswered) are their commands by id, oldest first.

        It leaves out the library's debug log: to format each message for it takes as long as all else.
        """

        def __init__(self) -> None:
            super().__init__("vmfleet")
            self.unanswered: dict[object, str] = {}

        async def _do_recv(self) -> Message:
            """Receive the next message. Until the conversation has begun, the library is ready for no event.

            QEMU sends them then: before the greeting, while it still counts the client before, and before the answer
            to qmp_capabilities. A client that comes while QEMU starts can be greeted twice.
            """
            while True:
                message = await super()._do_recv()
                is_early = "event" in message or ("QMP" in message and self.greeting is not None)
                if not is_early or self.runstate == Runstate.RUNNING:
                    return message

        def _cb_outbound(self, msg: Message) -> Message:
            # Only what opens the conversation goes without an id.
            if "id" in msg:
                self.unanswered[msg["id"]] = str(msg["execute"])
            return msg

        def _cb_inbound(self, msg: Message) -> Message:
            if self.unanswered and "event" not in msg and "QMP" not in msg:
                if "id" not in msg:
                    # The library would drop it, and whoever has asked would wait until the time-out.
                    raise QMPError(f"it does not tell which question it answers: {json.dumps(dict(msg))}")
                self.unanswered.pop(msg["id"], None)
            return msg

except ImportError:
    QMP_IMPORT_ERROR = traceback.format_exc()

if TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule
    from qemu.qmp import Message

__all__ = [
    "Client",
    "ConnectError",
    "ExecInterruptedError",
    "ExecuteError",
    "QMPError",
    "StateError",
    "quoted",
    "require_qmp",
]

QUOTE_LIMIT = 200
"""Characters of what cannot be read that a message quotes."""
# qemu.qmp logs each failure that it also raises; the exception is enough.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
logging.getLogger("qemu.qmp").propagate = False


def require_qmp(module: AnsibleModule) -> None:
    """Fail with Ansible's own words for a missing library unless qemu.qmp can be imported."""
    if QMP_IMPORT_ERROR is not None:
        module.fail_json(
            msg=missing_required_lib("qemu.qmp", url="https://gitlab.com/qemu-project/python-qemu-qmp"),
            exception=QMP_IMPORT_ERROR,
        )


def quoted(what: object) -> str:
    """Return what was said, in one line of a length that can be printed: it may be anything, and megabytes of it."""
    kind = f"{type(what).__name__}: " if isinstance(what, Exception) and not isinstance(what, QMPError) else ""
    text = kind + " ".join(str(what).split())
    return text if len(text) <= QUOTE_LIMIT else text[:QUOTE_LIMIT] + "..."

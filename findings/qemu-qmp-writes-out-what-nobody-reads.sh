#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# The Python library qemu.qmp 0.0.6 writes each message out for its debug log, with indents, before logging is asked whether
# anybody reads that. So one answer with the schema (QEMU 11.1.3) is written out as 459,000 characters, to be thrown away.
# A client that overrides _cb_outbound and _cb_inbound, which are made for that, is spared it.
#   100 commands: 200 messages written out, 0 lines logged
#   query-qmp-schema: more than 400000 characters written out: True
#   100 commands, the two methods overridden: 0 messages written out

. "$(dirname "$(readlink -f "$0")")/lib.sh"
python3 -m venv "$work/library" && "$work/library/bin/python" -m pip install -qq --disable-pip-version-check qemu.qmp==0.0.6 >&2 ||
  cannot_tell "qemu.qmp 0.0.6 cannot be installed"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
"$work/library/bin/python" - <<'END'
import asyncio, logging
from vm import VM
from qemu.qmp import QMPClient
from qemu.qmp.message import Message

written, logged = [], []
original = Message.__str__


def counted(self):
    text = original(self)
    written.append(len(text))
    return text


Message.__str__ = counted


class Log(logging.Handler):
    def emit(self, record):
        logged.append(record)


# As a program has it that does not set up logging: warnings are told, and nothing below.
logging.getLogger().addHandler(Log())


class Spared(QMPClient):
    def _cb_outbound(self, msg):
        return msg

    def _cb_inbound(self, msg):
        return msg


async def ask(client):
    await client.connect("second")
    written.clear()
    for _ in range(100):
        await client.execute("query-status")
    messages = len(written)
    written.clear()
    await client.execute("query-qmp-schema")
    await client.disconnect()
    return messages, sum(written)


vm = VM("-qmp", "unix:second,server=on,wait=off")
messages, characters = asyncio.run(ask(QMPClient("plain")))
print(f"100 commands: {messages} messages written out, {len(logged)} lines logged")
print(f"query-qmp-schema: more than 400000 characters written out: {characters > 400000}")
spared, _ = asyncio.run(ask(Spared("spared")))
print(f"100 commands, the two methods overridden: {spared} messages written out")
vm.end()
raise SystemExit(messages != 200 or logged != [] or characters <= 400000 or spared != 0)
END

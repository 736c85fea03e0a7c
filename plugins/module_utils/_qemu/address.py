# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read the address of a monitor."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .._common.errors import Refused


@dataclass(frozen=True)
class Address:
    """Where a monitor listens: a UNIX socket's path, or a TCP host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return ("tcp:[%s]:%d" if ":" in self.host else "tcp:%s:%d") % (self.host, self.port)


def parse_address(text: str, option: str = "monitor") -> Address:
    """Read C(unix:/path), C(/path) or C(tcp:host:port); anything else is Refused under the name of C(option)."""
    if text.startswith("libvirt:"):
        raise Refused(
            option,
            f"{text!r}: libvirt addresses are not supported yet; give the domain a monitor of its own"
            " (qemu:commandline with -qmp) and name its socket. Where AppArmor is on, it needs a rule for that socket,"
            " or the domain does not start any more: see 'Domains of libvirt' in the guide 'Getting started'",
        )
    if text.startswith("tcp:"):
        match = re.fullmatch(r"tcp:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", text)
        if not match or not 0 < int(match.group("port")) < 65536:
            raise Refused(option, f"{text!r} is not of the form tcp:HOST:PORT")
        return Address(host=match.group("v6") or match.group("host"), port=int(match.group("port")))
    path = text[len("unix:") :] if text.startswith("unix:") else text
    if not path.startswith("/"):
        raise Refused(option, f"{text!r} is neither unix:/PATH (or an absolute path) nor tcp:HOST:PORT")
    return Address(path=path)

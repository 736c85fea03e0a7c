# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the kernel tells of a socket; connections themselves are in the tests of the monitor."""

from __future__ import annotations

import io

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import connection

TABLE = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 5001 /run/web01.qmp
0000000000000000: 00000003 00000000 00000000 0001 03 5002 /run/web01.qmp
0000000000000000: 00000002 00000000 00000000 0001 02     0 /run/web01.qmp
0000000000000000: 00000002 00000000 00000000 0001 02     0 /run/web01.qmp
0000000000000000: 00000003 00000000 00000000 0001 03 5003
0000000000000000: 00000003 00000000 00000000 0001 03 5004 /run/web01.qmp2
0000000000000000: 00000003 00000000 00000000 0001 03 5005 /run/db 01.qmp
"""


@pytest.mark.parametrize(
    ("path", "clients"),
    [
        ("/run/web01.qmp", (1, 2)),
        ("/run/db 01.qmp", (1, 0)),
        ("/run/db", (None, 0)),
        ("/run/web01.qmp2", (1, 0)),
    ],
)
def test_clients_of_a_socket(path: str, clients: tuple[int | None, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "open", lambda *_args, **_options: io.StringIO(TABLE), raising=False)
    assert connection._clients(path) == clients

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: qmp.py SOCKET COMMAND [ARGUMENTS]: run one QMP command with arguments in JSON, and print what it returns."""

import json
import socket
import sys


def main() -> None:
    path, command, *arguments = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw", encoding="utf-8")
        stream.readline()
        for message in (
            {"execute": "qmp_capabilities"},
            {"execute": command, "arguments": json.loads(arguments[0]) if arguments else {}},
        ):
            stream.write(json.dumps(message) + "\n")
            stream.flush()
            reply = {"event": ""}
            while "event" in reply:
                reply = json.loads(stream.readline())
            if "error" in reply:
                sys.exit(reply["error"]["desc"])
    print(json.dumps(reply["return"]))


if __name__ == "__main__":
    main()

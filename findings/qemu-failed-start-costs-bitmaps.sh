#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): a VM that cannot start, because another process has its second disk open, leaves the
# bitmaps of its first disk in use, as a power cut would: it was opened to write, and is not closed. No increment can be
# made from them again. A start that comes to its end, with `quit`, leaves them as they were.
#   after a start and an end: flags auto
#   after a start that failed: flags auto, in-use
#   the next start: recording False, inconsistent True

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import json
import os
import subprocess
from vm import VM, image


def disk(name):
    return "-drive", f"file={name}.qcow2,format=qcow2,if=none,id={name},node-name=n-{name}"


def flags():
    told = json.loads(subprocess.check_output([os.environ["IMG"], "info", "--output=json", "first.qcow2"]))
    return sorted(told["format-specific"]["data"]["bitmaps"][0]["flags"])


image("first.qcow2", "16M")
image("second.qcow2", "16M")
subprocess.check_call([os.environ["IMG"], "bitmap", "--add", "first.qcow2", "b"])
VM(*disk("first"), *disk("second")).end()
ended = flags()
print("after a start and an end: flags", ", ".join(ended))
holder = VM(*disk("second"))
command = [os.environ["QEMU"], "-nodefaults", "-display", "none", "-machine", "none", *disk("first"), *disk("second")]
start = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
holder.end()
assert start.returncode and "lock" in start.stderr, start.stderr
failed = flags()
print("after a start that failed: flags", ", ".join(failed))
vm = VM(*disk("first"))
bitmap = next(node for node in vm.run("query-named-block-nodes", flat=True) if node["node-name"] == "n-first")["dirty-bitmaps"][0]
vm.end()
looks = bitmap["recording"], bitmap.get("inconsistent", False)
print(f"the next start: recording {looks[0]}, inconsistent {looks[1]}")
raise SystemExit((ended, failed, looks) != (["auto"], ["auto", "in-use"], (False, True)))
END

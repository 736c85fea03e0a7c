#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 and 10.0.13 do the same): the answer of query-named-block-nodes, and the time that QEMU's main loop
# takes for it, grow with the square of the number of layers of a disk, since each node tells of all below it. Asked with
# flat=true, it grows with the number of layers. A client that reads lines of at most 10 MiB, as qemu.qmp does, breaks off.
#   layers  flat=false bytes  flat=true bytes
#       30            308426            49861
#       60           1159581           100031
#      120           4490840           200668

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import json
import os
import subprocess
from vm import VM, image

found = []
print("layers  flat=false bytes  flat=true bytes")
image("0.qcow2", "1M")
for number in range(1, 121):
    subprocess.run([os.environ["IMG"], "create", "-q", "-f", "qcow2", "-u", "-b", f"{number - 1}.qcow2", "-F", "qcow2",
                    f"{number}.qcow2", "1M"], check=True)
for layers in (30, 60, 120):
    vm = VM("-drive", f"file={layers - 1}.qcow2,format=qcow2,if=none,id=d0")
    sizes = [len(json.dumps(vm.run("query-named-block-nodes", flat=flat))) for flat in (False, True)]
    vm.end()
    print(f"{layers:6} {sizes[0]:17} {sizes[1]:16}")
    found.append(sizes)
squares = all(3.3 < many[0] / few[0] < 4.7 for few, many in zip(found, found[1:]))
lines = all(1.7 < many[1] / few[1] < 2.3 for few, many in zip(found, found[1:]))
raise SystemExit(not (squares and lines))
END

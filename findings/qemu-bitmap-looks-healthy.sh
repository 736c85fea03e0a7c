#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): a dirty bitmap that was disabled for a while, and one of a disk that was made smaller
# and larger again, look like any other: recording, consistent, not busy. The increments made from them miss writes, and no
# job fails.
#   untouched: recording True, inconsistent False, increment right: True
#   disabled and enabled: recording True, inconsistent False, increment right: False
#   shrunk and grown: recording True, inconsistent False, increment right: False

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import os
import subprocess
from vm import VM, image, same


def disable(vm):
    vm.run("block-dirty-bitmap-disable", node="n0", name="b")
    vm.io("d0", "write -P 2 15M 64k")
    vm.run("block-dirty-bitmap-enable", node="n0", name="b")


def shrink(vm):
    vm.run("block_resize", node_name="n0", size=8 << 20)
    vm.run("block_resize", node_name="n0", size=16 << 20)


def increment(name, meddle):
    image("disk.qcow2", "16M")
    vm = VM("-drive", "file=disk.qcow2,format=qcow2,if=none,id=d0,node-name=n0,discard=unmap")
    vm.io("d0", "write -P 1 0 16M")
    image("full.qcow2", "16M")
    image("increment.qcow2", "16M", "-b", "full.qcow2", "-F", "qcow2")
    actions = [
        {"type": "block-dirty-bitmap-add", "data": {"node": "n0", "name": "b", "persistent": True}},
        {"type": "drive-backup", "data": {"job-id": "j", "device": "n0", "target": os.path.abspath("full.qcow2"),
         "format": "qcow2", "mode": "existing", "sync": "full", "auto-dismiss": False}},
    ]
    vm.run("transaction", actions=actions)
    assert vm.wait("j") == ""
    meddle(vm)
    vm.io("d0", "write -P 3 1M 64k")
    bitmap = next(each for each in vm.run("query-named-block-nodes", flat=True) if each["node-name"] == "n0")["dirty-bitmaps"][0]
    vm.run("drive-backup", job_id="j", device="n0", target=os.path.abspath("increment.qcow2"), format="qcow2",
           mode="existing", sync="bitmap", bitmap="b", bitmap_mode="never", auto_dismiss=False)
    assert vm.wait("j") == ""
    vm.end()
    looks = bitmap["recording"], bitmap.get("inconsistent", False)
    right = same("disk.qcow2", "increment.qcow2")
    print(f"{name}: recording {looks[0]}, inconsistent {looks[1]}, increment right: {right}")
    return looks == (True, False), right


results = [increment("untouched", lambda vm: None), increment("disabled and enabled", disable), increment("shrunk and grown", shrink)]
raise SystemExit(results != [(True, True), (True, False), (True, False)])
END

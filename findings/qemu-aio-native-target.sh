#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 and 10.0.13 do the same): drive-backup hands the flags of the disk on to its target. A disk with
# cache=none,aio=native, which many guests have, cannot be copied to a target that is not opened with O_DIRECT, such as
# one that is compressed: the start is refused. To say aio=threads of the target cures it.
#   nothing said of aio: aio=native was specified, but it requires cache.direct=on, which was not specified.
#   aio=threads: started

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import json
import os
from vm import VM, image

image("disk.qcow2", "16M")
vm = VM("-drive", "file=disk.qcow2,format=qcow2,if=none,id=d0,node-name=n0,cache=none,aio=native")


def start(**more):
    image("target.qcow2", "16M")
    file = {"driver": "file", "filename": os.path.abspath("target.qcow2"), "cache": {"direct": False, "no-flush": False}}
    target = {"driver": "qcow2", "backing": None, "file": {**file, **more}}
    answer = vm.ask("drive-backup", job_id="j", device="n0", target="json:" + json.dumps(target), format="qcow2",
                    mode="existing", sync="full", compress=True, auto_dismiss=False)
    if "error" in answer:
        return answer["error"]["desc"]
    assert vm.wait("j") == ""
    return "started"


refused = start()
print("nothing said of aio:", refused)
cured = start(aio="threads")
print("aio=threads:", cured)
vm.end()
raise SystemExit(not ("aio=native was specified" in refused and cured == "started"))
END

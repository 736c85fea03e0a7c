#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 7.2.22, of Debian 12 (10.0.13 and 11.1.3 do not): when block-stream has ended, the backing file is out of the overlay's
# header, but where in the overlay the pulled data stands is in QEMU's memory, as with all that is written, until somebody
# flushes. If QEMU is killed before that, the overlay builds on nothing, and what it held through its backing file reads as
# zeroes. qemu-img check finds nothing wrong. A guest that flushes, or stop and cont, bring it all to the disk.
#   killed at once: backing file none, check found 0 errors, the disk holds what it held: False
#   killed after stop and cont: backing file none, check found 0 errors, the disk holds what it held: True

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:7.2+dfsg-7+deb12u18*" /bookworm
python3 - <<'END'
import json, os, subprocess
from vm import VM, image, same


def pulled(*flush):
    """A disk of 4 MiB in an overlay's backing file; the overlay is made independent, and QEMU is killed."""
    for path in ("base.qcow2", "overlay.qcow2"):
        if os.path.exists(path):
            os.unlink(path)
    image("base.qcow2", "16M")
    vm = VM("-drive", "file=base.qcow2,format=qcow2,if=none,id=d0")
    vm.io("d0", "write -P 7 0 4M")
    vm.end()
    image("overlay.qcow2", "16M", "-b", "base.qcow2", "-F", "qcow2")
    assert same("base.qcow2", "overlay.qcow2")
    vm = VM("-drive", "file=overlay.qcow2,format=qcow2,if=none,id=d0,node-name=overlay")
    vm.run("block-stream", job_id="s", device="overlay", auto_dismiss=False)
    assert vm.wait("s") == ""
    for command in flush:
        vm.run(command)
    vm.process.kill()
    vm.process.wait()
    info = json.loads(subprocess.check_output([os.environ["IMG"], "info", "--output=json", "overlay.qcow2"]))
    check = subprocess.run([os.environ["IMG"], "check", "--output=json", "overlay.qcow2"], stdout=-1)
    found = info.get("backing-filename", "none"), json.loads(check.stdout)["check-errors"], same("base.qcow2", "overlay.qcow2")
    print(f"killed {'after ' + ' and '.join(flush) if flush else 'at once'}: backing file {found[0]}, check found {found[1]} errors, "
          f"the disk holds what it held: {found[2]}")
    return found


raise SystemExit((pulled(), pulled("stop", "cont")) != (("none", 0, False), ("none", 0, True)))
END

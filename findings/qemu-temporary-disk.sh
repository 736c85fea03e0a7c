#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): a disk with snapshot=on hands "temporary" on to all that QEMU opens for it by name.
# drive-backup ends without an error, and the image that it has written is gone: QEMU has unlinked it, also one that was
# there before the backup (mode=existing). So is the overlay of an external snapshot, with the VM writing into it.
#   drive-backup of an ordinary disk: error '', image there: True
#   drive-backup of a temporary disk: error '', image there: False
#   the same onto an image that was there: error '', image there: False
#   blockdev-snapshot-sync of a temporary disk: answer {}, overlay there: False

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import os
from vm import VM, image

image("base.qcow2", "16M")
image("plain.qcow2", "16M")
drive = "file={}.qcow2,format=qcow2,if=none,id={}"
vm = VM("-drive", drive.format("plain", "plain"), "-drive", drive.format("base", "temporary") + ",snapshot=on")
nodes = {each["device"]: each["inserted"]["node-name"] for each in vm.run("query-block")}


def there(name, target, mode="absolute-paths"):
    vm.run("drive-backup", job_id="j", device=nodes[name], sync="full", format="qcow2", mode=mode, auto_dismiss=False,
           target=os.path.abspath(target))
    error = vm.wait("j")
    print(f"error {error!r}, image there: {os.path.exists(target)}")
    return not error and os.path.exists(target)


print("drive-backup of an ordinary disk: ", end="")
ordinary = there("plain", "one.qcow2")
print("drive-backup of a temporary disk: ", end="")
temporary = there("temporary", "two.qcow2")
print("the same onto an image that was there: ", end="")
image("three.qcow2", "16M")
existing = there("temporary", "three.qcow2", "existing")
print("blockdev-snapshot-sync of a temporary disk: ", end="")
answer = vm.run("blockdev-snapshot-sync", device="temporary", snapshot_file=os.path.abspath("four.qcow2"), format="qcow2")
overlay = os.path.exists("four.qcow2")
print(f"answer {answer}, overlay there: {overlay}")
vm.end()
raise SystemExit(not ordinary or temporary or existing or overlay)
END

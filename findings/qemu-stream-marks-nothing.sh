#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): block-stream pulls what the layers below hold into the overlay, and marks nothing of it
# in the overlay's bitmap, though the overlay is the whole disk afterwards. block-commit marks what it writes into the base
# in the base's bitmap. So after a stream the bitmap looks as healthy as after a commit, and an increment made from it misses
# what the guest wrote into the layer below since the full backup.
#   block-stream: bitmap counted 65536 bytes before and 65536 after, recording True, inconsistent False, increment right: False
#   block-commit: bitmap counted 65536 bytes before and 131072 after, recording True, inconsistent False, increment right: True

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import os
from vm import VM, image, same


def layers(vm, node):
    found = next(each for each in vm.run("query-named-block-nodes", flat=True) if each["node-name"] == node)
    [bitmap] = found["dirty-bitmaps"]
    return bitmap["count"], bitmap["recording"], bitmap.get("inconsistent", False)


def backup(vm, node, target, **more):
    vm.run("drive-backup", job_id="j", device=node, target=os.path.abspath(target), format="qcow2", mode="existing",
           auto_dismiss=False, **more)
    assert vm.wait("j") == ""


def increment(name, flatten):
    """A full backup; 64 KiB; an overlay with a bitmap of its own; 64 KiB; one layer again; an increment from its bitmap."""
    for path in ("base.qcow2", "overlay.qcow2"):
        if os.path.exists(path):
            os.unlink(path)
    image("base.qcow2", "16M")
    image("full.qcow2", "16M")
    image("increment.qcow2", "16M", "-b", "full.qcow2", "-F", "qcow2")
    vm = VM("-drive", "file=base.qcow2,format=qcow2,if=none,id=d0,node-name=base")
    vm.io("d0", "write -P 1 0 1M")
    vm.run("block-dirty-bitmap-add", node="base", name="b", persistent=True)
    backup(vm, "base", "full.qcow2", sync="full")
    vm.io("d0", "write -P 2 4M 64k")
    vm.run("blockdev-snapshot-sync", node_name="base", snapshot_node_name="overlay", format="qcow2",
           snapshot_file=os.path.abspath("overlay.qcow2"))
    vm.run("block-dirty-bitmap-add", node="overlay", name="b", persistent=True)
    vm.io("d0", "write -P 3 8M 64k")
    top, before = flatten(vm)
    after = layers(vm, top)
    backup(vm, top, "increment.qcow2", sync="bitmap", bitmap="b", bitmap_mode="never")
    vm.end()
    right = same(f"{top}.qcow2", "increment.qcow2")
    print(f"{name}: bitmap counted {before} bytes before and {after[0]} after, recording {after[1]}, "
          f"inconsistent {after[2]}, increment right: {right}")
    return before, *after, right


def stream(vm):
    before = layers(vm, "overlay")[0]
    vm.run("block-stream", job_id="s", device="overlay", auto_dismiss=False)
    assert vm.wait("s") == ""
    return "overlay", before


def commit(vm):
    before = layers(vm, "base")[0]
    vm.run("block-commit", job_id="c", device="overlay", auto_dismiss=False)
    vm.reach("c", "ready", "concluded")
    vm.run("job-complete", id="c")
    assert vm.wait("c") == ""
    return "base", before


streamed = increment("block-stream", stream)
committed = increment("block-commit", commit)
unit = 64 << 10
raise SystemExit(streamed != (unit, unit, True, False, False) or committed != (unit, 2 * unit, True, False, True))
END

#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): block-commit changes what the guest reads, without an error. A disk of three layers
# was shrunk in its middle one, and grown again in its top one: its end reads as zeroes, as it should. After the middle
# layer was committed into the longer base, the end shows what the base held there before the disk was shrunk. No dirty
# bitmap of the top layer tells of it.
#   before the commit, at 12 MiB: zeroes
#   after the commit, at 12 MiB: the base's old data; dirty bytes told by the bitmap of the top layer: 0

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
from vm import VM, image

MIB = 1 << 20

image("base.qcow2", "16M")
vm = VM("-drive", "file=base.qcow2,format=qcow2,if=none,id=d0,node-name=base")


def reads(pattern):
    """Whether the guest would read this byte at 12 MiB; qemu-io tells it in QEMU's own output only."""
    before = open("log").read().count("Pattern verification failed")
    vm.io("d0", f"read -P {pattern} 12M 64k")
    return open("log").read().count("Pattern verification failed") == before


vm.io("d0", "write -P 0x11 12M 64k")
assert reads("0x11") and not reads("0")
vm.run("blockdev-snapshot-sync", device="d0", snapshot_file="middle.qcow2", snapshot_node_name="middle")
vm.run("block_resize", node_name="middle", size=8 * MIB)
vm.run("blockdev-snapshot-sync", device="d0", snapshot_file="top.qcow2", snapshot_node_name="top")
vm.run("block_resize", node_name="top", size=16 * MIB)
vm.run("block-dirty-bitmap-add", node="top", name="changes")
zeroes = reads("0")
print("before the commit, at 12 MiB:", "zeroes" if zeroes else "something else")

vm.run("block-commit", job_id="j", device="d0", top_node="middle", base_node="base", auto_dismiss=False)
assert vm.wait("j") == ""
old = reads("0x11")
nodes = vm.run("query-named-block-nodes", flat=True)
[dirty] = [bitmap["count"] for node in nodes if node["node-name"] == "top" for bitmap in node["dirty-bitmaps"]]
print("after the commit, at 12 MiB:", "the base's old data;" if old else "something else;", end=" ")
print("dirty bytes told by the bitmap of the top layer:", dirty)
vm.end()
raise SystemExit(not (zeroes and old and dirty == 0))
END

#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# libvirt 12.9.0 with QEMU 11.1.3 (9.0.0 with 7.2.22 does the same): after an external snapshot, an internal one, and a
# virsh blockpull of all layers, virsh snapshot-revert to the internal snapshot gives the domain the images of that time by a
# <backingStore> in its definition. The header of the overlay names no backing file any more, and stays so. Whoever reads the
# file of the shut off domain by its header, as qemu-img does, sees zeroes where the domain sees the data of the layer below.
#   the definition builds on base.qcow2, the header on nothing, what qemu-img reads is what the domain reads: False

. "$(dirname "$(readlink -f "$0")")/lib.sh"
libvirt "12.9.0-*" "1:11.1.3+ds-*" /trixie-backports /trixie
inside python3 - <<'END'
import json, os, subprocess
from xml.etree import ElementTree
from domain import Domain
from vm import image

os.chdir("/lab")
image("base.qcow2", "16M")
vm = Domain("base.qcow2")
vm.io("write -P 7 0 4M")
vm.virsh("snapshot-create-as", "D", "outside", "--no-metadata", "--disk-only", "--diskspec", "vda,file=/lab/overlay.qcow2")
vm.virsh("snapshot-create-as", "D", "inside")
vm.virsh("blockpull", "D", "vda", "--wait")
vm.virsh("snapshot-revert", "D", "inside")
guest = "pattern" not in vm.io("read -P 7 0 4M").lower()
vm.virsh("destroy", "D")
disk = ElementTree.fromstring(vm.virsh("dumpxml", "D", "--inactive")).find("devices/disk")
below = disk.find("backingStore/source")
defined = "nothing" if below is None else os.path.basename(below.get("file"))
info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", "overlay.qcow2"]))
said = info.get("backing-filename", "nothing")
read = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read -P 7 0 4M", "overlay.qcow2"], stdout=-1, text=True).stdout
same = "failed" not in read
vm.virsh("undefine", "D", "--snapshots-metadata")
print(f"the definition builds on {defined}, the header on {said}, what qemu-img reads is what the domain reads: {same}")
raise SystemExit((guest, defined, said, same) != (True, "base.qcow2", "nothing", False))
END

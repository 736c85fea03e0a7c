#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# libvirt 12.9.0 with QEMU 11.1.3 (9.0.0 with 7.2.22 does the same): an external snapshot of a running domain by libvirt puts
# an empty bitmap onto the overlay for each persistent one of the disk, with the same name. QEMU's own blockdev-snapshot-sync
# does not. Whoever looks for the bitmap on the node that the guest writes to finds it, recording, and an increment made from
# it misses all that was written before the snapshot, without an error.
#   snapshot by libvirt: bitmaps on the overlay [('b', 65536, True)], increment: error '', right: False
#   snapshot by QEMU: bitmaps on the overlay [], increment: error "Bitmap 'b' could not be found", right: False

. "$(dirname "$(readlink -f "$0")")/lib.sh"
libvirt "12.9.0-*" "1:11.1.3+ds-*" /trixie-backports /trixie
inside sh -c 'cd /lab && python3 -' <<'END'
import os
from domain import Domain
from vm import image, same


def backup(domain, target, **more):
    image(target, "16M", *(["-b", "full.qcow2", "-F", "qcow2"] if more else []))
    os.chmod(target, 0o666)
    answer = domain.ask("drive-backup", job_id="j", device=domain.node()["node-name"], target=os.path.abspath(target),
                        format="qcow2", mode="existing", auto_dismiss=False, **more or {"sync": "full"})
    return answer["error"]["desc"] if "error" in answer else domain.wait("j")


def increment(name, snapshot):
    """A full backup; 64 KiB; an external snapshot; 64 KiB; an increment from the bitmap on the overlay."""
    for path in ("disk.qcow2", "overlay.qcow2"):
        if os.path.exists(path):
            os.unlink(path)
    image("disk.qcow2", "16M")
    domain = Domain("disk.qcow2")
    domain.io("write -P 1 0 1M")
    domain.run("block-dirty-bitmap-add", node=domain.node()["node-name"], name="b", persistent=True)
    assert backup(domain, "full.qcow2") == ""
    domain.io("write -P 2 4M 64k")
    snapshot(domain)
    domain.io("write -P 3 8M 64k")
    domain.io("flush")
    bitmaps = [(each["name"], each["count"], each["recording"]) for each in domain.node().get("dirty-bitmaps", [])]
    error = backup(domain, "increment.qcow2", sync="bitmap", bitmap="b", bitmap_mode="never")
    right = same("overlay.qcow2", "increment.qcow2")
    domain.end()
    print(f"{name}: bitmaps on the overlay {bitmaps}, increment: error {error!r}, right: {right}")
    return bitmaps, error, right


def by_libvirt(domain):
    domain.virsh("snapshot-create-as", "D", "s", "--disk-only", "--no-metadata", "--diskspec", "vda,file=/lab/overlay.qcow2")


def by_qemu(domain):
    domain.run("blockdev-snapshot-sync", node_name=domain.node()["node-name"], snapshot_file="/lab/overlay.qcow2",
               snapshot_node_name="overlay", format="qcow2")


libvirts = increment("snapshot by libvirt", by_libvirt)
qemus = increment("snapshot by QEMU", by_qemu)
raise SystemExit(libvirts != ([("b", 64 << 10, True)], "", False) or qemus[0] != [] or "b" not in qemus[1])
END

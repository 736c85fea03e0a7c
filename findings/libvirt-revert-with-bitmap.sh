#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# libvirt 12.9.0 with QEMU 11.1.3 (9.0.0 with 7.2.22 does the same): one persistent bitmap on a disk makes the revert to an
# internal snapshot fail, and the domain, which ran, is off afterwards. Nothing warns when the snapshot is taken.
#   bitmap False: snapshot-revert ends with 0, the domain is then: running (from snapshot)
#   bitmap True: snapshot-revert ends with 1, the domain is then: shut off (failed)
#     error: Failed to revert snapshot s
#     error: operation failed: load of internal snapshot 's' job failed: Could not load snapshot 's' on 'libvirt-1-format': Device has active dirty bitmaps

. "$(dirname "$(readlink -f "$0")")/lib.sh"
libvirt "12.9.0-*" "1:11.1.3+ds-*" /trixie-backports /trixie
inside sh -c 'cd /lab && python3 -' <<'END'
import subprocess
from domain import Domain
from vm import image


def revert(with_bitmap):
    image("disk.qcow2", "16M")
    domain = Domain("disk.qcow2")
    if with_bitmap:
        domain.run("block-dirty-bitmap-add", node=domain.node()["node-name"], name="b", persistent=True)
    domain.virsh("snapshot-create-as", "D", "s")
    done = subprocess.run(["virsh", "-q", "snapshot-revert", "D", "s"], stdout=-1, stderr=-2, text=True, timeout=60)
    state = domain.virsh("domstate", "D", "--reason").strip()
    print(f"bitmap {with_bitmap}: snapshot-revert ends with {done.returncode}, the domain is then: {state}")
    for line in filter(None, done.stdout.splitlines()):
        print(f"  {line}")
    if state.startswith("running"):
        domain.virsh("destroy", "D")
    domain.virsh("undefine", "D", "--snapshots-metadata")
    return done.returncode == 0, state.split()[0]


raise SystemExit([revert(False), revert(True)] != [(True, "running"), (False, "shut")])
END

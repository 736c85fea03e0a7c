#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# libvirt 12.9.0 with QEMU 11.1.3 (9.0.0 with 7.2.22 says the same of a file that is gone): whether a domain that is off has a
# managed save is what libvirt remembers, not what is there. Somebody removes the file, and libvirt goes on saying "yes", while
# it says of the very same thing that there is none when it is asked for its XML. The start boots the guest anew, without a
# word; libvirt still says "yes", and refuses to undefine the domain for the sake of a state that does not exist.
#   saved: the file is there: True, libvirt says that there is one: yes, and reads the XML of its domain
#   the file removed: the file is there: False, libvirt says that there is one: yes, and reads error: Requested operation is not valid: domain does not have managed save image
#   started: running (booted)
#   while it runs: the file is there: False, libvirt says that there is one: yes, and reads error: Requested operation is not valid: domain does not have managed save image
#   virsh undefine D: ends with 1 error: Refusing to undefine while domain managed save image exists
#   virsh undefine D --managed-save: ends with 0

. "$(dirname "$(readlink -f "$0")")/lib.sh"
libvirt "12.9.0-*" "1:11.1.3+ds-*" /trixie-backports /trixie
inside sh -c 'cd /lab && python3 -' <<'END'
import os
import subprocess
from domain import Domain
from vm import image

SAVED = "/var/lib/libvirt/qemu/save/D.save"
image("disk.qcow2", "16M")
domain = Domain("disk.qcow2")


def look(when):
    [says] = [line.split()[-1] for line in domain.virsh("dominfo", "D").splitlines() if line.startswith("Managed save")]
    done = subprocess.run(["virsh", "-q", "managedsave-dumpxml", "D"], stdout=-1, stderr=-2, text=True, timeout=60)
    reads = "the XML of its domain" if done.returncode == 0 else " / ".join(done.stdout.split("\n")).strip(" /")
    print(f"{when}: the file is there: {os.path.exists(SAVED)}, libvirt says that there is one: {says}, and reads {reads}")
    return says, done.returncode == 0


def ends(*words):
    done = subprocess.run(["virsh", "-q", *words], stdout=-1, stderr=-2, text=True, timeout=60)
    print(f"virsh {' '.join(words)}: ends with {done.returncode} {' / '.join(filter(None, done.stdout.splitlines()))}")
    return done.returncode


domain.virsh("managedsave", "D")
before = look("saved")
os.unlink(SAVED)
after = look("the file removed")
domain.virsh("start", "D")
state = domain.virsh("domstate", "D", "--reason").strip()
print(f"started: {state}")
started = look("while it runs")
domain.virsh("destroy", "D")
undefined = [ends("undefine", "D"), ends("undefine", "D", "--managed-save")]
found = before, after, started, state.split()[0], undefined
raise SystemExit(found != (("yes", True), ("yes", False), ("yes", False), "running", [1, 0]))
END

#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# libvirt 12.9.0 with QEMU 11.1.3: a file of UEFI variables whose format is not named gets the format of the firmware, not raw,
# whatever stands in it. With a firmware in qcow2, as Fedora has it, a domain on a raw file is defined without a word, and
# cannot be started. With the format named, it can: the two need not be the same.
#   <nvram>: virsh define ends with 0, the domain has <nvram format='qcow2'>, virsh start ends with 1
#     ... Image is not in qcow2 format
#   <nvram format='raw'>: virsh define ends with 0, the domain has <nvram format='raw'>, virsh start ends with 0

. "$(dirname "$(readlink -f "$0")")/lib.sh"
libvirt "12.9.0-*" "1:11.1.3+ds-*" /trixie-backports /trixie
inside sh -c 'cd /lab && python3 -' <<'END'
import os
import subprocess
from vm import image

# What is in the firmware does not matter to a guest that never runs.
XML = """<domain type='qemu'><name>D</name><memory unit='MiB'>32</memory><os><type arch='x86_64' machine='q35'>hvm</type>
<loader readonly='yes' type='pflash' format='qcow2'>/lab/code.qcow2</loader>{}/lab/variables</nvram></os>
<features><acpi/></features><devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model='none'/></devices></domain>"""
NOT_QCOW2 = "Image is not in qcow2 format"


def virsh(*words):
    return subprocess.run(["virsh", "-q", *words], stdout=-1, stderr=-2, text=True, timeout=60)


def start(nvram):
    with open("D.xml", "w") as file:
        file.write(XML.format(nvram))
    defined = virsh("define", "D.xml").returncode
    [has] = [line.split("/lab")[0].strip() for line in virsh("dumpxml", "D").stdout.splitlines() if "/lab/variables" in line]
    started = virsh("start", "D", "--paused")
    print(f"{nvram}: virsh define ends with {defined}, the domain has {has}, virsh start ends with {started.returncode}")
    if NOT_QCOW2 in started.stdout:
        print(f"  ... {NOT_QCOW2}")
    virsh("destroy", "D")
    assert virsh("undefine", "D", "--keep-nvram").returncode == 0
    return defined, has, started.returncode, NOT_QCOW2 in started.stdout


image("code.qcow2", "2M")
with open("variables", "wb") as file:
    file.truncate(128 << 10)
for path in ("code.qcow2", "variables"):
    os.chmod(path, 0o666)
unnamed, raw = start("<nvram>"), start("<nvram format='raw'>")
raise SystemExit((unnamed, raw) != ((0, "<nvram format='qcow2'>", 1, True), (0, "<nvram format='raw'>", 0, False)))
END

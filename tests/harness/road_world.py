# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VMs on a newcomer's hypervisors, by the names that README and guides use, and how all of it is as new again."""

from __future__ import annotations

import re
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.tests.harness.documented import PAGES, blocks
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk, domain_xml
from ansible_collections.vmfleet.backup.tests.harness.libvirt_guest import AGENT, GuestDomain

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.road import Road

IMAGES = Path("/var/lib/libvirt/images")
MONITORS = Path("/run/vmfleet-monitors")
CHANNEL = f"<channel type='unix'><target type='virtio' name='{AGENT}'/></channel>"

# The disks and directories of the guides' examples. A volume is as good as a file to what is shown there.
PLACES = f"""
set -e
if [ -e /root/walk/web01.pid ]; then kill "$(cat /root/walk/web01.pid)"; fi
rm -rf /srv/* /var/tmp/* /var/lib/images /var/lib/vms {IMAGES} {MONITORS} /dev/vg0 /root/web01*
mkdir -p /var/lib/vms {IMAGES} /dev/vg0
if id libvirt-qemu > /dev/null 2>&1; then install -d -m 0700 -o libvirt-qemu {MONITORS}; fi
"""

DISK = """
set -e
qemu-img create -q -f qcow2 "$1" "$2"
qemu-io -c "write -P $3 0 8M" "$1"
"""


def make_new(road: Road, *, guest: bool = False, tpm: bool = False) -> None:
    """Give the hypervisors new VMs, and take away all that was made.

    With `guest`, a Linux with an agent runs in db01; with `tpm`, web01 has one.
    """
    for libvirt in road.libvirts:
        libvirt.clear()
    for machine in (road.controller, *road.hypervisors):
        machine.directory = "/"
        machine.run(PLACES)
    _start(road, 0, "web01", tpm=tpm, vda="64M", vdb="32M")
    if guest:
        directory = road.path / "guest"
        directory.mkdir()
        GuestDomain(road.libvirts[0], directory, name="db01").start()
    else:
        _start(road, 0, "db01", vda="64M", vdb="32M")
    _start(road, 1, "app01", vda="32M")


def _start(road: Road, number: int, name: str, tpm: bool = False, **sizes: str) -> None:
    """Start a domain without a guest: with a channel for an agent, and with the second monitor that a guide shows."""
    disks = []
    for seed, (target, size) in enumerate(sizes.items(), 17):
        disks.append(DomainDisk(IMAGES / f"{name}-{target}.qcow2", target))
        road.hypervisors[number].run(DISK, disks[-1].path, size, seed)
    xml = domain_xml(name, *disks, devices=CHANNEL, tpm=tpm)
    xml = xml.replace("<domain ", f"<domain {NAME_SPACE} ").replace("</domain>", f"{second_monitor(name)}</domain>")
    road.libvirts[number].define(name, xml=xml).start()


def second_monitor(name: str) -> str:
    """Return the XML for it, as the guide has it."""
    [shown] = [block.text for block in blocks(PAGES["docs/docsite/rst/getting_started.rst"]) if block.language == "xml"]
    assert NAME_SPACE in shown
    [found] = re.findall("<qemu:commandline>.*</qemu:commandline>", shown, re.DOTALL)
    return str(found).replace("web01", name)


NAME_SPACE = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"

#!/usr/bin/env bash
# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# QEMU 11.1.3 (7.2.22 does the same): the workers of drive-backup write the clusters of a new qcow2 image in the order in which
# they happen to be done. So two full copies of a disk that nobody has changed are the same to a guest, and different files: a
# store that cuts files into pieces by their content (restic, borg) finds little of the first one in the second. One worker
# keeps the order (x-perf, which is unstable), and is slower.
#   first: 256 runs of clusters, 60 lie before the one that the guest has before them
#   second: 256 runs of clusters, 59 lie before the one that the guest has before them
#   first and second copy of the unchanged disk: the guest sees the same: True; pieces in common: 25%
#   third: 256 runs of clusters, 0 lie before the one that the guest has before them
#   fourth: 256 runs of clusters, 0 lie before the one that the guest has before them
#   with one worker: pieces in common: 100%

. "$(dirname "$(readlink -f "$0")")/lib.sh"
qemu "1:11.1.3+ds-*" /trixie-backports /trixie
python3 - <<'END'
import json
import os
import subprocess
from vm import VM, image, same

image("disk.qcow2", "512M")
vm = VM("-drive", "file=disk.qcow2,format=qcow2,if=none,id=d0,node-name=n0,cache=none")
# Every other MiB holds data, so that there is something to be put in order.
for at in range(0, 512, 2):
    with open("data", "wb") as data:
        data.write(os.urandom(1 << 20))
    vm.io("d0", f"write -s data {at}M 1M")


def back_up(name, **more):
    """Copy the disk; return where the clusters of the copy lie, in the order in which the guest sees them."""
    image(name, "512M")
    answer = vm.ask("drive-backup", job_id="j", device="n0", target=name, format="qcow2", mode="existing", sync="full", auto_dismiss=False, **more)
    assert "return" in answer, answer
    assert vm.wait("j") == ""
    said = subprocess.run([os.environ["IMG"], "map", "-U", "--output=json", name], stdout=-1, check=True).stdout
    return [each["offset"] for each in json.loads(said) if each["data"]]


def told(what, places):
    back = sum(later < earlier for earlier, later in zip(places, places[1:]))
    print(f"{what}: {len(places)} runs of clusters, {back} lie before the one that the guest has before them")
    return back


def common(one, other):
    """The share of the second file whose 1 MiB pieces are in the first one as well."""
    def pieces(name):
        with open(name, "rb") as file:
            return list(iter(lambda: file.read(1 << 20), b""))
    known = set(pieces(one))
    found = pieces(other)
    return sum(piece in known for piece in found) / len(found)


back = [told(name, back_up(name)) for name in ("first", "second")]
equal = same("first", "second")
print(f"first and second copy of the unchanged disk: the guest sees the same: {equal}; pieces in common: {common('first', 'second'):.0%}")
one = [told(name, back_up(name, x_perf={"max-workers": 1})) for name in ("third", "fourth")]
print(f"with one worker: pieces in common: {common('third', 'fourth'):.0%}")
vm.end()
raise SystemExit(not (min(back) > 0 and equal and common("first", "second") < 0.9 and one == [0, 0] and common("third", "fourth") == 1))
END

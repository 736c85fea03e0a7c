# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A whole host of libvirt, on which one domain hangs: it fails alone, and libvirt goes on serving everybody else."""

from __future__ import annotations

import contextlib
import re
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain, DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt

# As many as libvirtd has workers for.
NAMES = [f"vm{number:02}" for number in range(20)]
HANGS = "vm07"


@contextlib.contextmanager
def asked_all_the_while(domain: Domain) -> t.Iterator[None]:
    """Have others use libvirt meanwhile; they always get an answer. libvirtd without a free worker would give none."""
    over = threading.Event()

    def ask() -> int:
        answers = 0
        while not over.wait(0.5):
            assert domain.libvirt.virsh("list", "--name").split() == NAMES
            assert domain.qmp("query-status")["running"]
            answers += 1
        return answers

    with ThreadPoolExecutor(1) as others:
        answers = others.submit(ask)
        try:
            yield
        finally:
            over.set()
        assert answers.result() > 0


def each(libvirt: Libvirt, command: str, names: t.Iterable[str] = NAMES) -> str:
    """Run a command of virsh on many domains, in one process; `{}` in it is the name. Returns what it prints."""
    return libvirt.virsh("; ".join(command.format(name) for name in names))


def assert_tidy(libvirt: Libvirt, names: t.Sequence[str]) -> None:
    for command in ("query-jobs", "query-fdsets"):
        assert re.findall(r'"return":(.*?),"id"', ask(libvirt, command, names)) == ["[]"] * len(names)
    nodes = ask(libvirt, "query-named-block-nodes", names)
    assert nodes.count('"libvirt-1-format"') >= len(names)
    assert not re.search(r'"vmf[.]|copy-before-write', nodes)


def ask(libvirt: Libvirt, command: str, names: t.Sequence[str]) -> str:
    """Ask QEMUs the same; returns their answers."""
    return each(libvirt, f'qemu-monitor-command {{}} \'{{{{"execute":"{command}"}}}}\'', names)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_one_of_twenty_hangs(libvirt: Libvirt, directory: Path) -> None:
    disks = {name: patterned(directory / f"{name}.qcow2", size=MIB, seed=seed) for seed, name in enumerate(NAMES)}
    # They have no guest, and a firmware that halts at once, so that twenty of them cost next to nothing.
    firmware = directory / "halt"
    firmware.write_bytes(b"\xf4" * 65536)
    for name, disk in disks.items():
        libvirt.start(name, DomainDisk(disk), os=f"<loader type='rom'>{firmware}</loader>")
    play = Hypervisor(directory, inside=libvirt.inside)
    others = [name for name in NAMES if name != HANGS]
    hanging = Domain(libvirt, HANGS)
    hanging.hang()
    try:
        with asked_all_the_while(Domain(libvirt, others[0])):
            done = play.run(domains=["*"])
        assert done.rc != 0
        assert "19 of 20 VMs have their set, 1 failed, 0 skipped" in done.output, done.output
        [told] = re.findall(rf"failed +{HANGS} .*", done.output)
        assert f"libvirt:{HANGS}: no answer to " in told
        assert "QEMU's main loop is blocked" in told
        assert_tidy(libvirt, others)
        play.sets.assert_absent(HANGS)
        for name in others:
            play.sets.assert_tidy(name)
    finally:
        hanging.wake()
    again = play.run(domains=["*"])
    assert again.rc == 0, again.output
    assert_tidy(libvirt, [HANGS])
    each(libvirt, "destroy {}")
    for name in NAMES:
        assert identical(disks[name], play.sets.images(name)["vda"])

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The backup playbook over several hypervisors, of which some cannot be reached or fail; they all are this machine."""

from __future__ import annotations

import re
import socket
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import ID

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.playbooks import Play

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def closed_port() -> t.Iterator[int]:
    """A port at which nobody listens: it is taken, so that nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def fleet(vms: Vms, directory: Path, closed_port: int) -> Hypervisor:
    """One that is off, a good one, and one with a VM that is off."""
    good, other = vms.start(name="web01"), vms.start(vms.disk(1), name="db01")
    off = {"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": closed_port}
    return Hypervisor(
        directory,
        {
            "gone": {**off, "vm_backup_sockets": ["/run/none.qmp"]},
            "good": {"vm_backup_sockets": [str(good.monitor)]},
            "half": {"vm_backup_sockets": [str(other.monitor), f"{directory}/off.qmp"]},
        },
    )


def summary(play: Play) -> list[str]:
    """The lines of the summary."""
    [found] = re.findall(r"^(Backup \S+ of 3 hypervisors.*?)^(?:ok: |$)", play.output, re.MULTILINE | re.DOTALL)
    return [line.strip() for line in found.splitlines()]


@pytest.mark.parametrize(
    ("way", "plays"), [("serial=100%", 1), ("serial=1", 3), ("strategy=free", 1)], ids=["at once", "one by one", "free"]
)
def test_one_that_cannot_be_reached_does_not_spoil_the_others(fleet: Hypervisor, way: str, plays: int) -> None:
    play = fleet.run("-e", f"vm_backup_{way}")
    assert play.rc == 2, play.output
    assert {path.parent.parent.name for path in fleet.sets.path.glob(f"*/{ID}/manifest.json")} == {"web01", "db01"}
    assert {host: play.recap(host)["failed"] for host in fleet.hosts} == {"gone": 1, "good": 0, "half": 1}
    assert play.output.count("PLAY [Back up VMs]") == plays
    head, *lines = summary(play)
    assert "2 of 3 VMs have their set, 1 failed, 0 skipped" in head
    assert re.fullmatch(r"FAILED  gone: .*Connection refused.*", lines[0])
    assert re.fullmatch(r"FAILED  half, off: .+", lines[1])
    again = lines[-1]
    assert again.startswith("ansible-playbook -i ")
    assert again.endswith(f"inventory.yml vmfleet.backup.backup -e vm_backup_id={ID} --limit gone,half")
    assert len(lines) == 4


def test_the_id_is_one_for_all_batches(fleet: Hypervisor) -> None:
    play = fleet.run("--limit", "good,half", "-e", "vm_backup_serial=1", id="")
    assert play.output.count("PLAY [Back up VMs]") == 2
    ids = set(re.findall(r"Backup (\S+) of", play.output))
    assert len(ids) == 1, play.output
    assert {path.parent.name for path in fleet.sets.path.glob("*/*/manifest.json")} == ids


def test_check_mode_tells_who_cannot_be_backed_up(fleet: Hypervisor) -> None:
    play = fleet.run("--check")
    assert play.rc == 2
    assert play.recap("gone")["failed"] == 1
    assert play.recap("good")["failed"] == 0
    assert not fleet.sets.path.exists()


def test_one_that_is_lost_before_its_metrics_are_written_has_failed(
    vms: Vms, directory: Path, closed_port: int
) -> None:
    vm = vms.start(name="web01")
    hypervisor = Hypervisor(directory)
    (directory / "metrics").mkdir()
    made = hypervisor.sets.path / "web01" / ID / "manifest.json"
    connection = f"{{{{ 'ssh' if '{made}' is exists else 'local' }}}}"
    off = {"ansible_host": "127.0.0.1", "ansible_port": closed_port, "ansible_connection": connection}
    hypervisor.hosts = {
        "hv1": off,
        "hv2": {"vm_backup_allow_empty": True, "vm_backup_sockets": [f"{directory}/*.none"]},
    }
    play = hypervisor.run(sockets=[str(vm.monitor)], metrics_dir=str(directory / "metrics"))
    assert made.exists(), play.output
    assert play.recap("hv1")["failed"] == 1
    assert play.recap("hv2")["failed"] == 0
    assert re.search(r"^FAILED  hv1: .*Connection refused", play.output, re.MULTILINE)
    assert play.output.count("--limit hv1\n") == 1

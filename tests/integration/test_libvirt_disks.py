# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The disks that a domain can have: which are in its sets, and what is said of the others."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, create, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.library import Library
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import succeed
from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

SIZE = 8 * MIB
WEB01 = "libvirt:web01"
TRANSIENT = (
    "VM web01: disk vde is transient: the set has its present content, and the disk loses that content when the domain"
    " stops"
)
SHAREABLE = (
    "VM web01: disk vdc is shareable: each copy of it is full, and the set may or may not have what another VM writes"
    " during the copy"
)
SERVED = "is served by another program (vhostuser, {}), and not by QEMU"
NOT_IN_IT = "VM web01: disk vdb is not in the set: it {}. Back it up by other means, and exclude it (exclude_disks)"


def drive(target: str, bus: str, device: str, image: Path | None = None) -> str:
    """The XML of a drive with or without a medium."""
    source = f"<source file='{image}'/>" if image else ""
    return f"<disk type='file' device='{device}'>{source}<target dev='{target}' bus='{bus}'/></disk>"


@pytest.fixture
def library(libvirt: Libvirt, directory: Path) -> Library:
    return Library(directory / "repository", libvirt.inside)


def plan_of(library: Library, **options: t.Any) -> tuple[dict[str, t.Any], list[str]]:
    """Plan the backup of web01; returns what is planned, and all warnings."""
    result = library.plan(WEB01, **options)
    return result["plan"]["vms"][0], result["warnings"]


class TestAllSorts:
    """A domain that has one of each sort."""

    @pytest.fixture
    def domain(self, libvirt: Libvirt, directory: Path) -> Domain:
        images = {name: patterned(directory / f"{name}.qcow2", size=SIZE, seed=ord(name)) for name in "abe"}
        raw = {name: patterned(directory / f"{name}.raw", "raw", SIZE, ord(name)) for name in "cdfn"}
        floppy, cd = create(directory / "floppy.img", 1440 * 1024, "raw"), create(directory / "cd.iso", MIB, "raw")
        socket = directory / "nbd"
        # It takes one client at a time, which is QEMU.
        libvirt.run("qemu-nbd", "--fork", "-t", "-f", "raw", "-x", "exp", "-k", socket, raw["n"])
        wait_until(socket.exists, "the NBD server")
        for path in (floppy, cd, socket, *images.values(), *raw.values()):
            path.chmod(0o666)
        network = (
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='exp'>"
            f"<host transport='unix' socket='{socket}'/></source><target dev='vdd' bus='virtio'/></disk>"
        )
        return libvirt.start(
            "web01",
            DomainDisk(images["a"]),
            DomainDisk(images["b"], "vdb", more="<readonly/>"),
            DomainDisk(raw["c"], "vdc", format="raw", more="<shareable/>"),
            DomainDisk(images["e"], "vde", more="<transient/>"),
            machine="pc",
            devices=network
            + f"<disk type='file' device='disk'><source file='{raw['f']}'/><target dev='vdf' bus='virtio'/></disk>"
            + drive("hda", "ide", "cdrom", cd)
            + drive("hdb", "ide", "cdrom")
            + drive("fda", "fdc", "floppy", floppy),
        )

    def test_each_is_told(self, domain: Domain, library: Library) -> None:
        plan, warnings = plan_of(library)
        assert domain.state == "running"
        assert [disk["name"] for disk in plan["disks"]] == ["vda", "vdc", "vdd", "vde", "vdf", "fda"]
        assert {drive["name"]: drive["reason"] for drive in plan["left_out"]} == {
            "vdb": "is read-only",
            "hda": "is read-only",
            "hdb": "has no medium",
        }
        assert warnings == [SHAREABLE, TRANSIENT]
        one, _warnings = plan_of(library, include_disks=["vdb"])
        assert [disk["name"] for disk in one["disks"]] == ["vdb"]
        empty, _warnings = plan_of(library, include_disks=["hdb"])
        assert empty["reason"] == "include_disks: drive hdb of VM web01 has no medium"

    def test_each_is_copied(self, domain: Domain, library: Library, directory: Path) -> None:
        disks = {"vda": "qcow2", "vdc": "raw", "vde": "qcow2", "vdf": "raw", "fda": "raw"}
        for number in (1, 2):
            for place, target in enumerate(disks):
                domain.io(target, f"write -P {number + 2 * place} {number * 65536} 65536")
            copies = {target: domain.freeze(target, directory / f"{target}-{number}") for target in disks}
            library.back_up(WEB01, id=f"s{number}")
            images = library.images("web01", f"s{number}")
            assert set(images) == {*disks, "vdd"}
            for target, copy in copies.items():
                assert identical(copy, images[target]), target
            assert identical(directory / "n.raw", images["vdd"], "raw")
        levels = library.levels("web01", "s2")
        assert levels.pop("vdc") == "full"
        assert set(levels.values()) == {"incremental"}
        assert library.reasons("web01", "s2")["vdc"] == "it is shareable: what other VMs write to it is not recorded"
        shared = library.manifest("web01", "s2")["disks"][1]
        assert (shared["name"], shared["bitmap"]) == ("vdc", None)

    def test_a_transient_disk_begins_anew_with_the_domain(
        self, domain: Domain, library: Library, directory: Path
    ) -> None:
        first = domain.freeze("vde", directory / "first")
        domain.io("vde", "write -P 9 0 65536")
        library.back_up(WEB01, id="s1", include_disks=["vde"])
        domain.destroy()
        domain.start()
        library.back_up(WEB01, id="s2", include_disks=["vde"])
        assert library.levels("web01", "s2") == {"vde": "full"}
        assert identical(first, library.images("web01", "s2")["vde"])
        assert not identical(first, library.images("web01", "s1")["vde"])


class TestVhostUser:
    """A disk that another program serves to the guest: QEMU has never seen it."""

    @pytest.fixture
    def socket(self, libvirt: Libvirt, directory: Path) -> Path:
        image, socket = create(directory / "v.raw", SIZE, "raw"), directory / "vhost"
        node = f"driver=file,node-name=n,filename={image}"
        export = f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on"
        libvirt.run("qemu-storage-daemon", "--daemonize", "--blockdev", node, "--export", export)
        wait_until(socket.exists, "the daemon")
        socket.chmod(0o777)
        served = (
            "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>"
            f"<source type='unix' path='{socket}'/><target dev='vdb' bus='virtio'/></disk>"
        )
        shared = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        libvirt.start("web01", DomainDisk(patterned(directory / "a.qcow2", size=SIZE)), devices=served, more=shared)
        return socket

    def test_it_is_told(self, socket: Path, library: Library) -> None:
        reason = SERVED.format(socket)
        plan, warnings = plan_of(library)
        assert plan["left_out"] == [{"name": "vdb", "reason": reason}]
        assert warnings == [NOT_IN_IT.format(reason)]
        library.back_up(WEB01)
        assert list(library.images("web01")) == ["vda"]
        plan, warnings = plan_of(library, id="s2", exclude_disks=["vdb"])
        assert (plan["left_out"], warnings) == ([{"name": "vdb", "reason": "is excluded"}], [])
        plan, _warnings = plan_of(library, id="s2", include_disks=["vdb"])
        assert (plan["action"], plan["reason"]) == ("fail", f"include_disks: drive vdb of VM web01 {reason}")


def test_uefi_variables_have_a_name(libvirt: Libvirt, library: Library, directory: Path) -> None:
    libvirt.start("web01", DomainDisk(patterned(directory / "a.qcow2", size=SIZE)), nvram=True)
    plan, _warnings = plan_of(library)
    assert [disk["name"] for disk in plan["disks"]] == ["nvram", "vda"]
    assert plan["left_out"] == [{"name": "loader", "reason": "is read-only"}]
    library.back_up(WEB01)
    plan, _warnings = plan_of(library, id="s2", exclude_disks=["nvram"])
    assert [disk["name"] for disk in plan["disks"]] == ["vda"]


def test_internal_snapshots_and_the_way_back(libvirt: Libvirt, library: Library, directory: Path) -> None:
    domain = libvirt.start("web01", DomainDisk(patterned(directory / "a.qcow2", size=SIZE)), machine="pc")
    domain.virsh("snapshot-create-as", "before")
    _plan, warnings = plan_of(library)
    assert any(
        "has internal snapshots: a revert to one of them (virsh snapshot-revert) fails" in warning
        for warning in warnings
    )
    assert not any("bitmaps" in warning for warning in plan_of(library, tracking=False)[1])
    domain.io("vda", "write -P 7 0 65536")
    library.back_up(WEB01)
    told = domain.libvirt.attempt("virsh", "snapshot-revert", "--domain", "web01", "before")
    assert "dirty bitmaps" in told.stderr
    # What is warned of: it is off.
    assert domain.state == "shut off"
    domain.start()
    # What is advised.
    untracked = {"repository": str(library.path), "state": "untracked", "names": ["web01"]}
    assert succeed("backup_set", untracked, inside=libvirt.inside)["changed"]
    domain.virsh("snapshot-revert", "before")
    assert domain.state == "running"
    library.back_up(WEB01, id="s2")
    assert library.levels("web01", "s2") == {"vda": "full"}

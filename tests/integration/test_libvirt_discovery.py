# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Domains are found by patterns, running and shut off; they say themselves how they are backed up, or not at all."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.images import MIB, identical, patterned
from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import DomainDisk
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.sets import Sets, result_of

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.libvirt import Libvirt
    from ansible_collections.vmfleet.backup.tests.harness.libvirt_domains import Domain

POLICY = "https://github.com/vmfleet/backup/policy/1"
MONITOR = "/var/lib/libvirt/qemu/second.qmp"
# As an administrator gives QEMU one more monitor.
SECOND = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
    f"<qemu:arg value='-qmp'/><qemu:arg value='unix:{MONITOR},server=on,wait=off'/></qemu:commandline>"
)
SHUT_OFF = "libvirt:db: the domain is shut off"
DAILY = (
    "the domain's metadata on its backup: <backup level='daily'>: level is one of: auto, full, incremental,"
    " differential. See `virsh dumpxml`, and correct it with `virsh metadata`"
)


@pytest.fixture
def sets(libvirt: Libvirt, directory: Path) -> Sets:
    return Sets(directory / "repository", libvirt.inside)


def disk(directory: Path, name: str, target: str = "vda") -> DomainDisk:
    return DomainDisk(patterned(directory / f"{name}.qcow2", size=8 * MIB, seed=len(name)), target)


@pytest.fixture
def web(libvirt: Libvirt, directory: Path) -> Domain:
    """A domain that runs, with two disks and a second monitor."""
    return libvirt.start("web", disk(directory, "web"), disk(directory, "webdata", "vdb"), more=SECOND)


@pytest.fixture
def db(libvirt: Libvirt, directory: Path) -> Domain:
    """A domain that is shut off."""
    return libvirt.define("db", disk(directory, "db"))


def found(sets: Sets, **options: t.Any) -> dict[str, tuple[str, str, str]]:
    """What is planned for each VM: monitor, action and reason."""
    vms = sets.plan(**{"vms": [], **options})["plan"]["vms"]
    return {vm["name"]: (vm["monitor"], vm["action"], vm["reason"]) for vm in vms}


def say(domain: Domain, policy: str, *how: str) -> None:
    """Have a domain say how it is backed up."""
    domain.virsh("metadata", "--uri", POLICY, "--key", "vmfleet", *how, "--set", policy)


@pytest.mark.usefixtures("web", "db")
class TestPatterns:
    """What is found, and what is said where nothing is."""

    def test_running_and_shut_off(self, sets: Sets, libvirt: Libvirt, directory: Path) -> None:
        start = ("libvirt:web", "start", "there is no set s1 of this VM")
        off = ("libvirt:db", "start", f"{start[2]}; it is off, and cannot be started while it is copied")
        assert found(sets, domains=["*"]) == {"db": off, "web": start}
        skipped = {"db": ("libvirt:db", "skip", SHUT_OFF), "web": start}
        assert found(sets, domains=["d*", "web"], offline="skip") == skipped
        assert found(sets, domains=["*"], exclude_domains=["db"]) == {"web": start}
        # libvirt takes a name that nothing here can be called by.
        libvirt.define("a\tb", disk(directory, "odd"))
        result = sets.plan(vms=[], domains=["*"])
        assert [vm["name"] for vm in result["plan"]["vms"]] == ["db", "web"]
        told = "a domain cannot be backed up under its name: domains: 'libvirt:a\\tb' has control characters"
        assert result["warnings"] == [told]
        libvirt.virsh("undefine", "a\tb")
        # What is spelled out should be there.
        result = sets.plan(vms=[], domains=["wep", "web", "mail*"], exclude_domains=["x"])
        assert [(vm["name"], vm["action"]) for vm in result["plan"]["vms"]] == [("wep", "fail"), ("web", "start")]
        assert "libvirt:wep: libvirt has no domain of this name: is web meant?" in result["plan"]["vms"][0]["reason"]
        assert result["warnings"] == ["exclude_domains: no domain matches x", "domains: no domain matches mail*"]

    def test_what_cannot_be_meant(self, sets: Sets) -> None:
        said = fail("backup_plan", sets.arguments(vms=[], domains=[]), inside=sets.inside)["msg"]
        assert said.startswith("vms: nothing is to be backed up; list VMs")
        said = fail("backup_plan", sets.arguments(vms=[], domains=["a/b"]), inside=sets.inside)["msg"]
        assert said.startswith("domains: 'libvirt:a/b' names no domain")
        uri = {"libvirt_uri": "qemu:///system?socket=/nowhere"}
        said = fail("backup_plan", sets.arguments(vms=[], domains=["*"], **uri), inside=sets.inside)["msg"]
        assert said.startswith("domains: qemu:///system?socket=/nowhere: cannot connect to libvirt at ")
        for other in ("qemu+ssh://elsewhere/system", "test:///default"):
            said = fail("backup_plan", sets.arguments(vms=[], domains=["*"], libvirt_uri=other), inside=sets.inside)
            assert said["msg"].startswith("libvirt_uri: ")

    def test_vm_info(self, libvirt: Libvirt) -> None:
        asked = {"domains": ["*"], "sockets": [MONITOR]}
        db, web = succeed("vm_info", asked, inside=libvirt.inside)["vms"]
        assert (db["monitor"], db["error"], db["excluded"]) == ("libvirt:db", SHUT_OFF, False)
        assert (web["monitor"], web["name"], web["error"]) == ("libvirt:web", "web", "")
        # What is listed stands above what is found.
        [web] = succeed("vm_info", {"domains": ["web"], "monitors": [MONITOR]}, inside=libvirt.inside)["vms"]
        assert web["monitor"] == f"unix:{MONITOR}"


@pytest.mark.usefixtures("web")
class TestOneVm:
    """A domain that is reached in two ways is one VM."""

    def test_libvirt_before_its_socket(self, sets: Sets) -> None:
        planned = sets.plan(vms=[], domains=["*"], sockets=[MONITOR])["plan"]
        assert [(vm["monitor"], vm["action"]) for vm in planned["vms"]] == [("libvirt:web", "start")]
        assert [one["name"] for one in planned["vms"][0]["disks"]] == ["vda", "vdb"]
        result = succeed("backup_set", {"plan": planned}, inside=sets.inside)
        assert result_of(result, "web")["state"] == "published"

    def test_what_is_listed_before_all(self, sets: Sets) -> None:
        for monitor in (f"unix:{MONITOR}", "libvirt:web"):
            planned = sets.plan(monitor, domains=["*"], sockets=["/var/lib/libvirt/qemu/*.qmp"])["plan"]
            assert [(vm["monitor"], vm["action"]) for vm in planned["vms"]] == [(monitor, "start")]
        # Who lists it under a name of its own means that one.
        named = [{"name": "shop", "monitor": "libvirt:web"}]
        assert list(found(sets, vms=named, domains=["*"])) == ["shop"]

    def test_two_that_are_listed_are_refused(self, sets: Sets) -> None:
        both = [{"name": "one", "monitor": MONITOR}, {"name": "two", "monitor": "libvirt:web"}]
        assert {action for _monitor, action, _reason in found(sets, vms=both).values()} == {"fail"}

    def test_off_is_off_in_both_ways(self, sets: Sets, web: Domain) -> None:
        web.destroy()
        assert list(found(sets, domains=["*"], sockets=["/run/web.qmp"])) == ["web"]
        [(monitor, _action, reason)] = found(sets, vms=[{"monitor": "/run/web.qmp"}], domains=["*"]).values()
        assert monitor == "unix:/run/web.qmp"
        assert "there is no such socket" in reason


class TestPolicy:
    """What a domain says of its own backup."""

    def plan(self, sets: Sets, **options: t.Any) -> dict[str, t.Any]:
        [vm] = sets.plan(**{"vms": [], "domains": ["web"], "exclude_disks": [], **options})["plan"]["vms"]
        return t.cast("dict[str, t.Any]", vm)

    def test_level_quiesce_and_disks(self, web: Domain, sets: Sets) -> None:
        say(web, "<backup level='full' quiesce='require'><exclude disk='vdb'/></backup>")
        planned = self.plan(sets)
        assert (planned["wanted"], planned["quiesce"], planned["exclude_disks"]) == ("full", "require", ["vdb"])
        assert [one["name"] for one in planned["disks"]] == ["vda"]
        # What the options say of all is less than what the domain says, and what they say of this one is more.
        assert self.plan(sets, level="differential", quiesce="try")["wanted"] == "full"
        own = {"monitor": "libvirt:web", "level": "auto", "exclude_disks": ["vda"]}
        planned = self.plan(sets, vms=[own], quiesce="none")
        assert (planned["wanted"], planned["quiesce"], planned["exclude_disks"]) == ("auto", "require", ["vda"])

    def test_it_is_what_the_set_is_made_by(self, web: Domain, sets: Sets, directory: Path) -> None:
        say(web, "<backup level='full'><exclude disk='vda'/></backup>", "--live", "--config")
        copy = web.freeze("vdb", directory / "copy")
        for set_id in ("s1", "s2"):
            plan = sets.plan(vms=[], domains=["*"], id=set_id)["plan"]
            succeed("backup_set", {"plan": plan}, inside=sets.inside)
        assert sets.levels("web", "s2") == {"vdb": "full"}
        assert identical(copy, sets.images("web", "s2")["vdb"])

    def test_for_the_next_start_only(self, web: Domain, sets: Sets) -> None:
        say(web, "<backup level='full'/>", "--config")
        assert self.plan(sets)["wanted"] == "full"
        # What was set for the domain as it runs stands above that.
        say(web, "<backup level='incremental'/>", "--live")
        assert self.plan(sets)["wanted"] == "incremental"
        web.destroy()
        assert (self.plan(sets)["action"], self.plan(sets)["wanted"]) == ("start", "full")

    def test_skip(self, web: Domain, db: Domain, sets: Sets, libvirt: Libvirt) -> None:
        say(web, "<backup skip='yes'/>")
        say(db, "<backup skip='yes'/>", "--config")
        plan = sets.plan(vms=[], domains=["*"])["plan"]
        reason = "its own metadata say that it is not backed up (skip='yes')"
        assert [(vm["name"], vm["action"], vm["reason"]) for vm in plan["vms"]] == [
            ("db", "skip", reason),
            ("web", "skip", reason),
        ]
        result = succeed("backup_set", {"plan": plan}, inside=libvirt.inside)
        assert {(vm["name"], vm["state"]) for vm in result["vms"]} == {("db", "skipped"), ("web", "skipped")}
        told = succeed("vm_info", {"domains": ["*"]}, inside=libvirt.inside)["vms"]
        assert [vm["excluded"] for vm in told] == [True, True]
        # Whoever lists it means it.
        assert found(sets, vms=[{"monitor": "libvirt:web"}])["web"][1] == "start"

    def test_a_set_that_was_begun_before(self, web: Domain, sets: Sets) -> None:
        sets.start("libvirt:web", id="s1")
        say(web, "<backup skip='yes'/>")
        for job in web.qmp("query-block-jobs"):
            web.qmp("block-job-set-speed", device=job["device"], speed=0)
        plan = sets.plan(vms=[], domains=["*"], id="s2")["plan"]
        result = succeed("backup_set", {"plan": plan}, inside=sets.inside)
        # It comes to its end, and no other is begun.
        assert result_of(result, "web")["state"] == "skipped"
        assert sets.levels("web", "s1") == {"vda": "full", "vdb": "full"}
        assert not (sets.directory("web") / "s2").exists()

    def test_what_makes_no_sense_is_told_of_that_vm(
        self, web: Domain, sets: Sets, libvirt: Libvirt, directory: Path
    ) -> None:
        libvirt.start("good", disk(directory, "good"))
        say(web, "<backup level='daily'/>")
        told = found(sets, domains=["*"])
        assert told["good"][1] == "start"
        assert told["web"][1:] == ("fail", DAILY)
        plan = sets.plan(vms=[], domains=["*"])["plan"]
        result = fail("backup_set", {"plan": plan}, inside=sets.inside)
        assert {vm["name"]: vm["state"] for vm in result["vms"]} == {"good": "published", "web": "failed"}


def test_role(web: Domain, db: Domain, directory: Path) -> None:
    """Every domain has its set, be it on or off, but for one that wants none."""
    mail = web.libvirt.define("mail", disk(directory, "mail"))
    say(mail, "<backup skip='yes'/>", "--config")
    play = Hypervisor(directory, inside=web.libvirt.inside)
    done = play.run(domains=["*"], sockets=[], exclude_domains=["x*"])
    assert done.rc == 0, done.output
    assert "no domain matches x*" in done.output
    assert list(play.sets.images("web")) == ["vda", "vdb"]
    assert identical(directory / "db.qcow2", play.sets.images("db")["vda"])
    status = play.play("status", domains=["*"], sockets=[])
    assert status.rc == 0, status.output
    # What wants none lacks none.
    assert "mail" not in status.output
    assert (db.state, mail.state) == ("shut off", "shut off")

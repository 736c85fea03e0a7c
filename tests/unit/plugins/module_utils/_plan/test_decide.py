# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done with a VM, and why: no QEMU and no repository needed."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import Admission
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.decide import decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Policy, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.disk_file import DiskFile
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import Domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import DomainXml
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Job
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Failure,
    Intent,
    Level,
    Parent,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import ELSEWHERE, UUID, image, job
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import (
    FAILED,
    GOLDEN,
    JOB0,
    JOB1,
    MONDAY,
    OFF,
    REQUEST,
    TERMS,
    intent,
    manifest,
    tracked,
    vm,
)

DECISIONS = {
    "nothing there": (Observation(vm()), VmRecords(), "start", "no set today"),
    "published": (Observation(vm()), VmRecords(sets=(manifest(),)), "skip", "published"),
    "published, off now": (OFF, VmRecords(sets=(manifest(),)), "skip", "published"),
    "of another VM": (Observation(vm(identity="uuid-2")), VmRecords(sets=(manifest(),)), "fail", "uuid-2"),
    "without a disk": (
        Observation(vm()),
        VmRecords(sets=(manifest(disks=(image("vda"),)),)),
        "fail",
        "without disk vdb",
    ),
    "published, though this run failed before": (
        Observation(vm()),
        VmRecords(sets=(manifest(),), failures=(FAILED,)),
        "skip",
        "published",
    ),
    "being made": (Observation(vm()), VmRecords(intents=(intent(),)), "attach", "since 2026-11-22T01:00:00Z"),
    "being made, off now": (OFF, VmRecords(intents=(intent(),)), "attach", "since 2026-11-22T01:00:00Z"),
    "being made elsewhere": (
        Observation(vm()),
        VmRecords(intents=(intent(hypervisor=ELSEWHERE),)),
        "fail",
        "hypervisor hv2",
    ),
    "being made of another VM": (
        Observation(vm(identity="uuid-2")),
        VmRecords(intents=(intent(),)),
        "fail",
        "another VM",
    ),
    "another VM's attempt is dead": (
        Observation(vm(identity="uuid-2"), dead=frozenset({"a1"})),
        VmRecords(intents=(intent(),)),
        "attach",
        "since",
    ),
    "being made of another QEMU of this name and identity": (
        Observation(vm(process=Process(7, 7)), elsewhere=frozenset({"a1"})),
        VmRecords(intents=(intent(),)),
        "fail",
        "another VM of this name (pid 1, unix:/web01.qmp)",
    ),
    "that QEMU has ended": (
        Observation(vm(process=Process(7, 7)), dead=frozenset({"a1"})),
        VmRecords(intents=(intent(),)),
        "attach",
        "since",
    ),
    "being made of this QEMU": (
        Observation(vm(process=Process(1, 2))),
        VmRecords(intents=(intent(),)),
        "attach",
        "since",
    ),
    "being made over TCP": (
        Observation(vm(process=Process(1, 2))),
        VmRecords(intents=(intent(process=()),)),
        "attach",
        "since",
    ),
    "failed by this run, and being made by another": (
        Observation(vm()),
        VmRecords(intents=(intent(run="other", attempt="a2"),), failures=(FAILED,)),
        "fail",
        "target full",
    ),
    "failed by this run, which is not through with it": (
        Observation(vm()),
        VmRecords(intents=(intent(),), failures=(FAILED,)),
        "attach",
        "since",
    ),
    "the newest set is another VM's": (
        Observation(vm(identity="uuid-2")),
        VmRecords(sets=(manifest(id="monday"),)),
        "fail",
        "adopt: true",
    ),
    "an older set was another VM's": (
        Observation(vm()),
        VmRecords(sets=(manifest(id="sunday", vm=VmName("web01", "uuid-0", "")), manifest(id="monday", sequence=2))),
        "start",
        "no set",
    ),
    "an older one first": (Observation(vm()), VmRecords(intents=(intent(id="monday"),)), "finish", "set monday"),
    "an older one before its own": (
        Observation(vm()),
        VmRecords(intents=(intent(), intent(id="monday", attempt="a0"))),
        "finish",
        "set monday",
    ),
    "failed by this run": (Observation(vm()), VmRecords(failures=(FAILED,)), "fail", "target full"),
    "failed by another run": (Observation(vm()), VmRecords(failures=(replace(FAILED, run="old"),)), "start", "no set"),
    "something in the way": (Observation(vm()), VmRecords(strays=frozenset({"today"})), "fail", "move it away"),
    "off": (OFF, VmRecords(), "fail", "no such socket"),
    "busy": (Observation(vm(jobs=(job("job7"),))), VmRecords(), "fail", "busy: job job7"),
    "busy with a job of libvirt's": (
        Observation(vm(domain=Domain(DomainXml("web01", UUID), "a save"))),
        VmRecords(),
        "fail",
        "busy: libvirt is working on the domain: a save; wait for its end",
    ),
    "a domain": (Observation(vm(domain=Domain(DomainXml("web01", UUID)))), VmRecords(), "start", "no set"),
    "somebody's ended job": (Observation(vm(jobs=(job("job7", "concluded"),))), VmRecords(), "start", "no set"),
    "our own leftover": (
        Observation(vm(jobs=(Job("vmfleet.12345678.a9.0", "backup", "running"),))),
        VmRecords(),
        "start",
        "no set",
    ),
    "another repository's job": (
        Observation(vm(jobs=(Job("vmfleet.87654321.a9.0", "backup", "running"),))),
        VmRecords(),
        "fail",
        "busy",
    ),
    "migrating": (Observation(vm(status="inmigrate")), VmRecords(), "skip", "migrating"),
    "no disks": (Observation(vm(GOLDEN)), VmRecords(), "skip", "no disk"),
    "confined": (Observation(vm(), admission=Admission("not given")), VmRecords(), "fail", "not given"),
    "confined, and being made": (
        Observation(vm(), admission=Admission("not given")),
        VmRecords(intents=(intent(),)),
        "attach",
        "since",
    ),
    "confined, and to be labelled": (
        Observation(vm(), admission=Admission("not given", "var", "image")),
        VmRecords(),
        "start",
        "no set",
    ),
}


@pytest.mark.parametrize(("facts", "records", "action", "reason"), DECISIONS.values(), ids=list(DECISIONS))
def test_decide(facts: Observation, records: VmRecords, action: str, reason: str) -> None:
    plan = decide(REQUEST, facts, records, TERMS).plan
    assert plan.action == action
    assert reason in plan.reason


@pytest.mark.parametrize(
    ("followed", "state", "attempt", "action"),
    [
        ("a1", "cancelled", "a1", "fail"),
        ("a1", "failed", "a1", "start"),
        ("a2", "cancelled", "a1", "start"),
        ("", "cancelled", "a1", "start"),
        ("", "cancelled", "", "start"),
    ],
)
def test_what_another_run_has_begun_is_cancelled_for_who_follows_it(
    followed: str, state: str, attempt: str, action: str
) -> None:
    records = VmRecords(failures=(replace(FAILED, run="other", state=state, attempt=attempt),))
    assert decide(REQUEST, Observation(vm()), records, TERMS, followed).plan.action == action


def test_all_that_is_asked_for_is_in_the_plan() -> None:
    request = Request(
        "web01",
        "libvirt:web01",
        include_disks=("vda",),
        exclude_disks=("vdb",),
        wanted=Level.DIFFERENTIAL,
        quiesce="try",
        agent="/agent",
        libvirt_uri="qemu:///session",
        files=(DiskFile("vda", "/vms/a.qcow2", "qcow2"),),
        uuid=UUID,
        skip=True,
    )
    defaults = Request("", "")
    # How it has come to be asked for is of no matter any more.
    names = {entry.name for entry in fields(Request)} - {"found_by", "given"}
    assert all(getattr(request, name) != getattr(defaults, name) for name in names)
    assert decide(request, OFF, VmRecords(), TERMS).plan.request == request


def test_a_vm_that_is_off_may_be_skipped_but_one_that_is_silent_never() -> None:
    terms = replace(TERMS, policy=Policy(offline="skip"))
    assert decide(REQUEST, OFF, VmRecords(), terms).plan.action == "skip"
    assert decide(REQUEST, Observation(error="no greeting"), VmRecords(), terms).plan.action == "fail"


def test_of_a_vm_that_wants_no_set_the_one_that_is_being_made_comes_to_its_end() -> None:
    skipped = replace(REQUEST, skip=True, exclude_disks=("vdz",))
    plan = decide(skipped, Observation(vm()), VmRecords(), TERMS).plan
    assert (plan.action, plan.reason) == ("skip", "its own metadata say that it is not backed up (skip='yes')")
    seen = Observation(vm(jobs=(job(JOB0), job(JOB1))))
    assert decide(skipped, seen, VmRecords(intents=(intent(),)), TERMS).plan.action == "attach"


WRONG = {
    "a list of disks": (replace(REQUEST, exclude_disks=("vdx",)), "vdx"),
    "a uuid": (replace(REQUEST, uuid=UUID.replace("6", "7")), "is listed with uuid"),
}


@pytest.mark.parametrize(("request_", "reason"), WRONG.values(), ids=list(WRONG))
def test_what_is_asked_for_wrongly_is_not_begun_and_what_is_being_made_comes_to_its_end(
    request_: Request, reason: str
) -> None:
    seen = Observation(vm(uuid=UUID, jobs=(job(JOB0), job(JOB1))))
    plan = decide(request_, seen, VmRecords(), TERMS).plan
    assert (plan.action, reason in plan.reason) == ("fail", True)
    assert decide(request_, seen, VmRecords(intents=(intent(),)), TERMS).plan.action == "attach"
    older = VmRecords(intents=(intent(id="monday"),))
    assert decide(request_, seen, older, TERMS).plan.action == "finish"
    # There is nothing that could stand in its place.
    assert decide(request_, seen, older, replace(TERMS, supersede=True)).removal == ""


def test_a_set_is_there_though_the_lists_of_disks_are_wrong_by_now() -> None:
    records, at = VmRecords(sets=(manifest(),)), Observation(vm())
    for lists in ({"exclude_disks": ("vdx",)}, {"exclude_disks": ("vdx",), "include_disks": ("vda", "n-vdb")}):
        assert decide(replace(REQUEST, **lists), at, records, TERMS).plan.reason == "the set is published"
    plan = decide(replace(REQUEST, include_disks=("vda", "vdx")), at, records, TERMS).plan
    assert (plan.action, "set today exists without disk vdx. " in plan.reason) == ("fail", True)
    assert "has no device 'vdx'" in plan.reason


def test_a_disk_of_a_set_may_be_named_by_a_filter_above_it() -> None:
    seen = Observation(vm())
    filtered = replace(seen.vm.disks[0], filters=("throttle0",)) if seen.vm else None
    at = Observation(replace(seen.vm, disks=(filtered, *seen.vm.disks[1:]))) if seen.vm and filtered else seen
    request_ = replace(REQUEST, include_disks=("throttle0", "vdx"))
    plan = decide(request_, at, VmRecords(sets=(manifest(),)), TERMS).plan
    assert "set today exists without disk vdx. " in plan.reason


def test_a_set_is_not_of_a_vm_that_is_not_meant() -> None:
    other = replace(REQUEST, uuid=UUID.replace("6", "7"))
    for identity in (UUID, other.uuid):
        made = manifest(vm=VmName("web01", identity, identity))
        plan = decide(other, Observation(vm(uuid=UUID)), VmRecords(sets=(made,)), TERMS).plan
        assert (plan.action, "is listed with uuid" in plan.reason) == ("fail", True)


def test_nothing_is_taken_over_for_a_vm_that_is_not_meant() -> None:
    other = replace(REQUEST, uuid=UUID.replace("6", "7"))
    seen = Observation(vm(uuid=UUID, identity=UUID))
    theirs = intent(vm=VmName("web01", other.uuid, other.uuid))
    decision = decide(other, seen, VmRecords(intents=(theirs,)), replace(TERMS, takeover=True))
    assert (decision.plan.action, decision.intent, decision.removal) == ("fail", theirs, "")
    assert "is listed with uuid" in decision.plan.reason


def test_nothing_is_taken_over_for_a_set_that_cannot_be_begun() -> None:
    wrong = replace(REQUEST, include_disks=("vdx",))
    theirs = intent(hypervisor=ELSEWHERE)
    decision = decide(wrong, Observation(vm()), VmRecords(intents=(theirs,)), replace(TERMS, takeover=True))
    assert (decision.plan.action, decision.intent, decision.removal) == ("fail", theirs, "")
    assert "has no device 'vdx'" in decision.plan.reason
    untold = decide(wrong, Observation(vm()), VmRecords(intents=(theirs,)), TERMS)
    assert "hypervisor hv2" in untold.plan.reason


FOREIGN = {
    "another hypervisor's": (Observation(vm()), intent(hypervisor=ELSEWHERE)),
    "another VM's": (Observation(vm(identity="uuid-2")), intent()),
    "another QEMU's": (Observation(vm(process=Process(7, 7)), elsewhere=frozenset({"a1"})), intent()),
    "one's in another container": (Observation(vm(), doubtful=frozenset({"a1"})), intent()),
    "one's that cannot be asked from here": (replace(OFF, doubtful=frozenset({"a1"})), intent()),
}


@pytest.mark.parametrize(("facts", "theirs"), FOREIGN.values(), ids=list(FOREIGN))
def test_takeover_removes_what_others_make(facts: Observation, theirs: Intent) -> None:
    records = VmRecords(intents=(theirs,))
    refused = decide(REQUEST, facts, records, replace(TERMS, supersede=True, adopt=True))
    assert (refused.plan.action, refused.plan.unless, refused.removal) == ("fail", "takeover", "")
    assert "takeover: true removes the unfinished set" in refused.plan.reason
    taken = decide(REQUEST, facts, records, replace(TERMS, takeover=True))
    assert (taken.plan.action, taken.intent, taken.removal) == ("finish", theirs, "taken over by hypervisor hv1")
    assert [disk.level for disk in taken.plan.disks] == ["full", "full"]


def test_takeover_is_not_for_what_is_ours() -> None:
    decision = decide(
        REQUEST, Observation(vm()), VmRecords(intents=(intent(),)), replace(TERMS, takeover=True, supersede=True)
    )
    assert (decision.plan.action, decision.removal) == ("attach", "")


def test_supersede_cancels_an_older_set() -> None:
    older = intent(id="monday", attempt="a0", run="yesterday")
    records = VmRecords(intents=(older,))
    assert decide(REQUEST, Observation(vm()), records, TERMS).removal == ""
    superseded = decide(REQUEST, Observation(vm()), records, replace(TERMS, supersede=True))
    assert (superseded.plan.action, superseded.intent, superseded.removal) == (
        "finish",
        older,
        "superseded by set today",
    )
    # The run whose set it was does not supersede in turn.
    failed = Failure("yesterday", "a0", "monday", "cancelled", "superseded by set today", "then", "now")
    terms = replace(TERMS, id="monday", run="yesterday", supersede=True, takeover=True)
    decision = decide(REQUEST, Observation(vm()), VmRecords(intents=(intent(),), failures=(failed,)), terms)
    assert (decision.plan.action, decision.plan.reason, decision.removal) == ("fail", "superseded by set today", "")


def test_adopt_goes_on_with_a_full() -> None:
    facts = Observation(vm(identity="uuid-2"))
    records = VmRecords(sets=(manifest(id="monday"),))
    assert decide(REQUEST, facts, records, TERMS).plan.unless == "adopt"
    adopted = decide(REQUEST, facts, records, replace(TERMS, adopt=True)).plan
    assert (adopted.action, adopted.level) == ("start", "full")
    assert {disk.reason for disk in adopted.disks} == {f"set monday is of another VM ({UUID})"}
    # What is published stays another VM's.
    records = VmRecords(sets=(manifest(),))
    assert decide(REQUEST, facts, records, replace(TERMS, adopt=True, takeover=True)).plan.action == "fail"


def test_increments_name_parent_and_bitmap() -> None:
    facts = Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "another")))
    decision = decide(REQUEST, facts, VmRecords(sets=(MONDAY,)), TERMS)
    assert decision.plan.level == "incremental"
    assert [(disk.level, disk.parent) for disk in decision.plan.disks] == [("incremental", "monday"), ("full", None)]
    records = tracked("vda", "b-vda").bitmaps
    assert decision.links[0] == ChainLink(
        "incremental",
        "changes since set monday",
        Parent("monday", "x", MONDAY.attempt),
        "vda.qcow2",
        "b-vda",
        records=records,
    )
    for request, terms in (
        (replace(REQUEST, wanted="full"), TERMS),
        (REQUEST, replace(TERMS, policy=Policy(tracking=False))),
        (REQUEST, replace(TERMS, policy=Policy(max_chain=1))),
    ):
        assert decide(request, facts, VmRecords(sets=(MONDAY,)), terms).plan.level == "full"
    damage = {("monday", "vda"): "image /x is missing"}
    assert decide(REQUEST, replace(facts, damage=damage), VmRecords(sets=(MONDAY,)), TERMS).plan.level == "full"

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is done with a VM, and why: no QEMU and no repository needed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.attempt_state import (
    changes,
    guest_stopped_by,
    judge,
    keep_planned_fulls,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._host.process import Process
from ansible_collections.vmfleet.backup.plugins.module_utils._plan import model, planner
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.decide import decide
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.disks import choose_disks
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.levels import ChainLink
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import (
    Observation,
    Plan,
    Policy,
    Request,
    RunContext,
    Space,
    VmPlan,
    parse_plan,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.planner import refuse_duplicates
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.space import fit_into, reserve_bytes
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.model import Disk, Job, Vm
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Failure,
    Intent,
    Manifest,
    Parent,
    Phase,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.repository import VmRecords
from ansible_collections.vmfleet.backup.tests.unit.plugins import builders
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import (
    ELSEWHERE,
    HERE,
    SIZE,
    UUID,
    bitmap,
    disk,
    image,
    job,
)

TERMS = RunContext("today", "run", "12345678", HERE, Policy())
REQUEST = Request("web01", "unix:/web01.qmp")
VDA, VDB = disk("vda", "n-vda"), disk("vdb", "n-vdb")
GOLDEN = disk("golden", "n-golden", read_only=True)


def vm(*disks: Disk, **more: Any) -> Vm:
    """Return a VM of vda and vdb, or of other disks, whose process nobody knows."""
    return builders.vm(*(disks or (VDA, VDB)), **{"empty": ("cd",), "process": None, **more})


def intent(**more: Any) -> Intent:
    """Return the intent of the set today, of both disks, whose jobs run."""
    given: dict[str, Any] = {"attempt": "a1", "phase": Phase.COPYING, "reserved": True}
    return builders.intent("today", image("vda"), image("vdb"), **{**given, **more})


def manifest(**more: Any) -> Manifest:
    """Return the manifest of the set today, of both disks."""
    return builders.manifest("today", image("vda"), image("vdb"), **more)


FAILED = Failure("run", "a1", "today", "failed", "target full", "then", "now")
OFF = Observation(error="there is no such socket", off=True)

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
    "being made": (Observation(vm()), VmRecords(intents=(intent(),)), "attach", "since then"),
    "being made, off now": (OFF, VmRecords(intents=(intent(),)), "attach", "since then"),
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
}


@pytest.mark.parametrize(("facts", "shelf", "action", "reason"), DECISIONS.values(), ids=list(DECISIONS))
def test_decide(facts: Observation, shelf: VmRecords, action: str, reason: str) -> None:
    plan = decide(REQUEST, facts, shelf, TERMS).plan
    assert plan.action == action
    assert reason in plan.reason


def test_a_vm_that_is_off_may_be_skipped_but_one_that_is_silent_never() -> None:
    terms = replace(TERMS, policy=Policy(offline="skip"))
    assert decide(REQUEST, OFF, VmRecords(), terms).plan.action == "skip"
    assert decide(REQUEST, Observation(error="no greeting"), VmRecords(), terms).plan.action == "fail"


def test_a_wrong_list_of_disks_comes_before_everything_else() -> None:
    request = replace(REQUEST, include_disks=("vdx",))
    assert decide(request, Observation(vm()), VmRecords(sets=(manifest(),)), TERMS).plan.action == "fail"


FOREIGN = {
    "another hypervisor's": (Observation(vm()), intent(hypervisor=ELSEWHERE)),
    "another VM's": (Observation(vm(identity="uuid-2")), intent()),
    "another QEMU's": (Observation(vm(process=Process(7, 7)), elsewhere=frozenset({"a1"})), intent()),
    "one's in another container": (Observation(vm(), doubtful=frozenset({"a1"})), intent()),
    "one's that cannot be asked from here": (replace(OFF, doubtful=frozenset({"a1"})), intent()),
}


@pytest.mark.parametrize(("facts", "theirs"), FOREIGN.values(), ids=list(FOREIGN))
def test_takeover_removes_what_others_make(facts: Observation, theirs: Intent) -> None:
    shelf = VmRecords(intents=(theirs,))
    refused = decide(REQUEST, facts, shelf, replace(TERMS, supersede=True, adopt=True))
    assert (refused.plan.action, refused.plan.unless, refused.removal) == ("fail", "takeover", "")
    assert "takeover: true removes what is there of it" in refused.plan.reason
    taken = decide(REQUEST, facts, shelf, replace(TERMS, takeover=True))
    assert (taken.plan.action, taken.intent, taken.removal) == ("finish", theirs, "taken over by hypervisor hv1")
    assert [disk.level for disk in taken.plan.disks] == ["full", "full"]


def test_takeover_is_not_for_what_is_ours() -> None:
    decision = decide(
        REQUEST, Observation(vm()), VmRecords(intents=(intent(),)), replace(TERMS, takeover=True, supersede=True)
    )
    assert (decision.plan.action, decision.removal) == ("attach", "")


def test_supersede_cancels_an_older_set() -> None:
    older = intent(id="monday", attempt="a0", run="yesterday")
    shelf = VmRecords(intents=(older,))
    assert decide(REQUEST, Observation(vm()), shelf, TERMS).removal == ""
    superseded = decide(REQUEST, Observation(vm()), shelf, replace(TERMS, supersede=True))
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
    shelf = VmRecords(sets=(manifest(id="monday"),))
    assert decide(REQUEST, facts, shelf, TERMS).plan.unless == "adopt"
    adopted = decide(REQUEST, facts, shelf, replace(TERMS, adopt=True)).plan
    assert (adopted.action, adopted.level) == ("start", "full")
    assert {disk.reason for disk in adopted.disks} == {f"set monday is of another VM ({UUID})"}
    # What is published stays another VM's.
    shelf = VmRecords(sets=(manifest(),))
    assert decide(REQUEST, facts, shelf, replace(TERMS, adopt=True, takeover=True)).plan.action == "fail"


def tracked(name: str, record: str, **more: Any) -> Disk:
    return disk(name, f"n-{name}", bitmaps=(bitmap(record),), **more)


MONDAY = manifest(id="monday", disks=(image("vda", bitmap="b-vda", sha256="x"), image("vdb", bitmap="b-vdb")))


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


def test_what_was_planned_as_a_full_stays_one() -> None:
    planned = decide(REQUEST, Observation(vm()), VmRecords(), TERMS).plan
    now = Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "b-vdb"), tracked("new", "b")))
    shelf = VmRecords(sets=(MONDAY,))
    bolder = decide(REQUEST, now, shelf, TERMS)
    assert [link.level for link in bolder.links] == ["incremental", "incremental", "full"]
    safe = keep_planned_fulls(bolder, planned)
    assert [(link.level, link.bitmap) for link in safe.links] == [("full", "")] * 3
    assert [(disk.level, disk.parent) for disk in safe.plan.disks] == [("full", None)] * 3
    assert safe.plan.level == "full"
    assert safe.plan.disks[0].reason == "it is the VM's first set"
    assert changes(planned, safe.plan.disks) == ()
    # A plan that was to attach, or to finish another set first, has said nothing of this one's disks.
    for action in ("attach", "finish", "fail"):
        assert keep_planned_fulls(bolder, replace(planned, action=action)) == bolder
        assert changes(replace(planned, action=action), bolder.plan.disks) == ()


def test_what_goes_otherwise_than_planned_is_said() -> None:
    both = Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "b-vdb")))
    planned = decide(REQUEST, both, VmRecords(sets=(MONDAY,)), TERMS).plan
    now = decide(
        REQUEST, Observation(vm(tracked("vda", "b-vda"), tracked("vdb", "gone"))), VmRecords(sets=(MONDAY,)), TERMS
    )
    [said] = changes(planned, keep_planned_fulls(now, planned).plan.disks)
    assert said.startswith("disk vdb is full instead of incremental: the record of the changes since set monday")


def test_disks_of_one_name_cannot_be_told_apart() -> None:
    twins = (VDA, replace(VDA, node="other"), VDB)
    assert "(nodes n-vda, other)" in choose_disks(vm(*twins), REQUEST).error
    choice = choose_disks(vm(*twins), replace(REQUEST, exclude_disks=("other",)))
    assert [disk.node for disk in choice.disks] == ["n-vda", "n-vdb"]


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), (), ["vda", "vdb"]),
        (("vdb",), (), ["vdb"]),
        (("n-vdb",), (), ["vdb"]),
        ((), ("vdb",), ["vda"]),
        (("vda", "vdb"), ("vda",), ["vdb"]),
        (("golden",), (), ["golden"]),
        ((), ("cd",), ["vda", "vdb"]),
    ],
)
def test_choose_disks(include: tuple[str, ...], exclude: tuple[str, ...], chosen: list[str]) -> None:
    choice = choose_disks(vm(VDA, VDB, GOLDEN), replace(REQUEST, include_disks=include, exclude_disks=exclude))
    assert [disk.name for disk in choice.disks] == chosen
    left_out = {drive.name for drive in choice.left_out}
    assert left_out == {"vda", "vdb", "golden", "cd"} - set(chosen)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"include_disks": ("vdx",)}, "include_disks: "),
        ({"exclude_disks": ("vdx",)}, "exclude_disks: "),
        ({"include_disks": ("cd",)}, "no medium"),
    ],
)
def test_names_that_no_disk_has(lists: dict[str, Any], said: str) -> None:
    assert said in choose_disks(vm(), replace(REQUEST, **lists)).error


BOTH_DONE = (job("job0", "concluded"), job("job1", "concluded"))
VERDICTS = {
    "copying": (intent(), Observation(vm(jobs=(job("job0"), job("job1")))), VmRecords(), "running"),
    "one is done": (intent(), Observation(vm(jobs=(job("job0", "concluded"), job("job1")))), VmRecords(), "running"),
    "copied": (intent(), Observation(vm(jobs=BOTH_DONE)), VmRecords(), "copied"),
    "started, not yet written down": (
        intent(phase=Phase.PREPARING),
        Observation(vm(jobs=(job("job0"), job("job1")))),
        VmRecords(),
        "running",
    ),
    "never started": (intent(phase=Phase.PREPARING), Observation(vm()), VmRecords(), "interrupted"),
    "never started, QEMU gone": (
        intent(phase=Phase.PREPARING),
        replace(OFF, dead=frozenset({"a1"})),
        VmRecords(),
        "interrupted",
    ),
    "one failed": (
        intent(),
        Observation(vm(jobs=(job("job0", "concluded", error="No space left on device"), job("job1")))),
        VmRecords(),
        "broken",
    ),
    "not listed is no success": (intent(), Observation(vm()), VmRecords(), "broken"),
    "one dismissed": (intent(), Observation(vm(jobs=(job("job0", "concluded"),))), VmRecords(), "broken"),
    "aborting": (intent(), Observation(vm(jobs=(job("job0", "null"), job("job1")))), VmRecords(), "broken"),
    "QEMU gone": (intent(), replace(OFF, dead=frozenset({"a1"})), VmRecords(), "broken"),
    "silent": (intent(), Observation(error="no greeting"), VmRecords(), "unreachable"),
    "described, then QEMU gone": (
        intent(),
        replace(OFF, dead=frozenset({"a1"})),
        VmRecords(described=frozenset({"a1"})),
        "copied",
    ),
    "given up": (intent(), Observation(vm(jobs=BOTH_DONE)), VmRecords(failures=(FAILED,)), "given up"),
    "an older attempt failed": (
        intent(),
        Observation(vm(jobs=BOTH_DONE)),
        VmRecords(failures=(replace(FAILED, attempt="a0"),)),
        "copied",
    ),
    "shrunk while it was copied": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=0), jobs=BOTH_DONE)),
        VmRecords(),
        "broken",
    ),
    "grown while it was copied": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=2 * SIZE), jobs=BOTH_DONE)),
        VmRecords(),
        "copied",
    ),
    "unplugged since": (intent(), Observation(vm(VDA, jobs=BOTH_DONE)), VmRecords(), "copied"),
    "shrunk since it was described": (
        intent(),
        Observation(vm(VDA, replace(VDB, virtual_size=0), jobs=BOTH_DONE)),
        VmRecords(described=frozenset({"a1"})),
        "copied",
    ),
    "too late": (intent(deadline=150.0), Observation(vm(jobs=(job("job0"), job("job1")))), VmRecords(), "broken"),
    "in time": (intent(deadline=250.0), Observation(vm(jobs=(job("job0"), job("job1")))), VmRecords(), "running"),
    "late but done": (intent(deadline=150.0), Observation(vm(jobs=BOTH_DONE)), VmRecords(), "copied"),
}


@pytest.mark.parametrize(("attempt", "facts", "shelf", "state"), VERDICTS.values(), ids=list(VERDICTS))
def test_judge(attempt: Intent, facts: Observation, shelf: VmRecords, state: str) -> None:
    verdict = judge(attempt, facts, shelf, now=200.0)
    assert verdict.state == state
    assert bool(verdict.error) == (state in ("broken", "unreachable", "given up"))


@pytest.mark.parametrize(
    ("attempt", "facts", "ours"),
    [
        (intent(reserved=False), Observation(vm(status="io-error", jobs=(job("job0"), job("job1")))), True),
        (intent(reserved=True), Observation(vm(status="io-error", jobs=(job("job0"), job("job1")))), False),
        (intent(), Observation(vm(status="io-error", jobs=(job("job0", "concluded", error="EIO"),))), True),
        (intent(guest="io-error"), Observation(vm(status="io-error", jobs=(job("job0", error="EIO"),))), False),
        (intent(reserved=False), Observation(vm(status="paused", jobs=(job("job0"), job("job1")))), False),
        (intent(reserved=False), OFF, False),
    ],
)
def test_a_guest_is_resumed_only_if_our_target_stopped_it(attempt: Intent, facts: Observation, ours: bool) -> None:
    assert guest_stopped_by(attempt, facts) is ours


def start(name: str, size: int = 0, monitor: str = "") -> VmPlan:
    disk = model.DiskPlan("vda", "n0", "full", "", None, "vda.qcow2", size)
    return VmPlan(name, monitor or f"unix:/{name}", "start", "", disks=(disk,))


def test_a_twin_is_nobody_to_look_after() -> None:
    [twin, _other] = refuse_duplicates([replace(start("web"), identity=UUID, unless="adopt"), start("web")], {})
    assert (twin.identity, twin.unless) == ("", "")


def test_each_vm_takes_its_part_of_the_space() -> None:
    space = Space(free=100, reserve=10, promised=20, reservable=True)
    space, plans = fit_into(space, [start("a", 40), start("b", 40), start("c", 30)])
    assert [plan.action for plan in plans] == ["start", "fail", "start"]
    assert space.needed == 70
    assert "not enough space" in plans[1].reason


def test_the_reserve_counts_twice_where_nothing_can_be_reserved() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=False)
    assert [plan.action for plan in fit_into(space, [start("a", 81)])[1]] == ["fail"]
    assert [plan.action for plan in fit_into(space, [start("a", 80)])[1]] == ["start"]


def test_a_set_that_is_there_needs_no_space() -> None:
    space = Space(free=0, reserve=10, promised=0, reservable=True)
    assert [plan.action for plan in fit_into(space, [replace(start("a", 5), action="skip")])[1]] == ["skip"]


def test_twins_are_not_touched() -> None:
    plans = [start("web"), start("web", monitor="unix:/web2"), start("db"), start("db2"), start("good")]
    processes = {"unix:/db": (7, 1), "unix:/db2": (7, 1), "unix:/good": (8, 1)}
    checked = refuse_duplicates(plans, processes)
    assert [plan.action for plan in checked] == ["fail", "fail", "fail", "fail", "start"]
    assert "unix:/web2" in checked[0].reason
    assert "unix:/db2" in checked[2].reason


@pytest.mark.parametrize(
    ("text", "size"), [("5%", 50), ("0", 0), ("0%", 0), ("12.5%", 125), ("300", 300), ("2K", 2048), ("1G", 1 << 30)]
)
def test_reserve(text: str, size: int) -> None:
    assert reserve_bytes(text, 1000) == size


@pytest.mark.parametrize("text", ["much", "100%", "-1%", "%", "5 percent", ""])
def test_bad_reserve(text: str) -> None:
    with pytest.raises(Refused, match="reserve"):
        reserve_bytes(text, 1000)


def test_a_plan_survives_the_way_through_ansible() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=True)
    decided = decide(REQUEST, Observation(vm()), VmRecords(), TERMS).plan
    plan = Plan("/srv/backup", False, "run", "today", Policy(), space, (decided,), ("a warning",))
    assert parse_plan(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_of_increments_survives_the_way_through_ansible() -> None:
    space = Space(free=100, reserve=10, promised=5, reservable=False, needed=20)
    request = replace(
        REQUEST, include_disks=("vda",), exclude_disks=("vdb",), wanted="differential", quiesce="try", agent="/agent"
    )
    facts = Observation(vm(tracked("vda", "b-vda"), VDB))
    decided = decide(request, facts, VmRecords(sets=(MONDAY,)), TERMS).plan
    assert decided.level == "differential"
    refused = decide(request, Observation(vm(identity="uuid-2")), VmRecords(sets=(MONDAY,)), TERMS).plan
    policy = Policy(
        "zstd", 1 << 20, "20G", checksum=False, offline="skip", max_chain=7, tracking=False, encrypted_source="refuse"
    )
    plan = Plan("/srv/backup", True, "run", "today", policy, space, (decided, refused))
    found = parse_plan(json.loads(json.dumps(plan.to_dict())))
    assert found == plan
    assert [vm.request for vm in found.vms] == [request] * 2
    # What a later release adds to a plan is no obstacle.
    later = plan.to_dict()
    later["vms"][0]["colour"] = later["policy"]["colour"] = later["vms"][0]["disks"][0]["colour"] = "blue"
    assert parse_plan(later) == plan


@pytest.mark.parametrize("found", [{}, {"repository": "/x"}, {"vms": 3}])
def test_something_else_is_no_plan(found: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="plan"):
        parse_plan(found)


def test_a_plan_cannot_lead_out_of_the_repository() -> None:
    space = Space(free=100, reserve=10, promised=0, reservable=True)
    plan = Plan("/srv/backup", False, "run", "today", Policy(), space, ()).to_dict()
    with pytest.raises(Refused, match="no id of a set"):
        parse_plan({**plan, "id": "../../etc"})


def test_the_plan_reads_well() -> None:
    space = Space(free=100 << 20, reserve=10 << 20, promised=0, reservable=False)
    decided = decide(REQUEST, Observation(vm(VDA, GOLDEN)), VmRecords(), TERMS).plan
    failing = decide(Request("db", "unix:/db"), OFF, VmRecords(), TERMS).plan
    plan = Plan("/srv/backup", True, "run", "today", Policy(), space, (decided, failing), ())
    assert planner.describe(plan) == [
        "Backup today to /srv/backup (to be created)",
        "Space: 0 B needed, 100.0 MiB free, 10.0 MiB kept in reserve, 0 B promised to other sets",
        "This file system cannot reserve space for a copy: the reserve counts twice.",
        "start   web01  there is no set today of this VM",
        "               vda: full, about 0 B: it is the VM's first set",
        "               cd: left out, has no medium",
        "               golden: left out, is read-only",
        "fail    db     there is no such socket",
    ]

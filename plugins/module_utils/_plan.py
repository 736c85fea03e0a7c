# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""What is to be done with each VM, and why: pure functions of what was asked, what QEMU says and what there is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING

from ansible.module_utils.common.text.formatters import human_to_bytes

from ansible_collections.vmfleet.backup.plugins.module_utils import _chain
from ansible_collections.vmfleet.backup.plugins.module_utils._chain import AUTO, FULL, Link, Wish
from ansible_collections.vmfleet.backup.plugins.module_utils._documents import PREPARING
from ansible_collections.vmfleet.backup.plugins.module_utils._errors import Refused
from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import IO_ERROR
from ansible_collections.vmfleet.backup.plugins.module_utils._names import check_set_id, column, image_files
from ansible_collections.vmfleet.backup.plugins.module_utils._units import human

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from ansible_collections.vmfleet.backup.plugins.module_utils._documents import Hypervisor, Intent, Manifest
    from ansible_collections.vmfleet.backup.plugins.module_utils._inspect import Disk, Job, Vm
    from ansible_collections.vmfleet.backup.plugins.module_utils._qmp import Process
    from ansible_collections.vmfleet.backup.plugins.module_utils._repository import Shelf

SKIP = "skip"
ATTACH = "attach"
FINISH = "finish"
START = "start"
FAIL = "fail"

MIGRATING = frozenset({"inmigrate", "postmigrate", "finish-migrate"})

NONE = "none"
TRY = "try"
REQUIRE = "require"
QUIESCE = (NONE, TRY, REQUIRE)

WARN = "warn"
REFUSE = "refuse"
ENCRYPTED_SOURCE = (WARN, REFUSE)

PUBLISHED_ALREADY = "the set is published"

IMAGE_SUFFIX = ".qcow2"

READ_ONLY = "is read-only"

CANCELLED = "Operation canceled"
"""QEMU's words for a cancelled job."""


@dataclass(frozen=True)
class Policy:
    """How sets are made. C(speed) is bytes/s, 0 for no limit; C(reserve) as it was given, such as C(5%)."""

    compression: str = "none"
    speed: int = 0
    reserve: str = "5%"
    checksum: bool = True
    offline: str = "fail"
    max_chain: int = 30
    tracking: bool = True
    encrypted_source: str = WARN


@dataclass(frozen=True)
class Request:
    """A VM to back up. C(name) is what the set is called after; the lists name disks by any of their names.

    C(wanted) is the level that is asked for; C(agent) the guest agent's socket, empty for the one that QEMU knows.
    """

    name: str
    monitor: str
    include_disks: tuple[str, ...] = ()
    exclude_disks: tuple[str, ...] = ()
    wanted: str = AUTO
    quiesce: str = NONE
    agent: str = ""


@dataclass(frozen=True)
class Facts:
    """What a look at a VM found. C(vm) is None where it did not answer, and C(off) says that there is no QEMU.

    C(dead) are the attempts whose QEMU has ended, C(doubtful) those of whose QEMU that cannot be told, C(elsewhere)
    those of a QEMU that is seen to be another one than that which has answered. C(damage) says, by set id and disk,
    what is wrong with the files of the images that the next ones would build on.
    """

    vm: Vm | None = None
    error: str = ""
    off: bool = False
    dead: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    damage: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def process(self) -> Process | None:
        """The QEMU that has answered, where it is known."""
        return self.vm.process if self.vm else None

    def shows(self, intent: Intent) -> bool:
        """Whether the QEMU that has answered has a job of this attempt, and so is the one that makes its set."""
        return self.vm is not None and any(self.vm.job(job) for job in intent.jobs)


@dataclass(frozen=True)
class LeftOut:
    """A drive that is not backed up, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class DiskPlan:
    """One disk of a set. C(bytes) is the most that its image is expected to take."""

    name: str
    node: str
    level: str
    reason: str
    parent: str | None
    target: str
    bytes: int = 0


@dataclass(frozen=True)
class VmPlan:
    """One VM: what is to be done, and why. C(wanted) is the level that is asked for, C(level) the one to be made.

    C(unless) is the option of backup_set with which it goes on after all, where C(action) is C(fail).
    """

    name: str
    monitor: str
    action: str
    reason: str
    identity: str = ""
    level: str = FULL
    include_disks: tuple[str, ...] = ()
    exclude_disks: tuple[str, ...] = ()
    wanted: str = AUTO
    quiesce: str = NONE
    agent: str = ""
    unless: str = ""
    disks: tuple[DiskPlan, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def request(self) -> Request:
        return Request(
            self.name, self.monitor, self.include_disks, self.exclude_disks, self.wanted, self.quiesce, self.agent
        )

    @property
    def bytes(self) -> int:
        return sum(disk.bytes for disk in self.disks) if self.action in (START, FINISH) else 0


@dataclass(frozen=True)
class Space:
    """Room in the repository, in bytes. C(reserve) stays free; C(promised) is what other growing sets will take."""

    free: int
    reserve: int
    promised: int
    reservable: bool
    needed: int = 0

    @property
    def usable(self) -> int:
        # Where nothing can be reserved, others may take the space in the middle of a copy: the reserve counts double.
        return self.free - self.reserve * (1 if self.reservable else 2) - self.promised


@dataclass(frozen=True)
class Plan:
    """One run on one hypervisor."""

    repository: str
    create_repository: bool
    run: str
    id: str
    policy: Policy
    space: Space
    vms: tuple[VmPlan, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["space"]["usable"] = self.space.usable
        for plan, entry in zip(self.vms, found["vms"]):
            entry["bytes"] = plan.bytes
        return found


def parse_plan(found: Mapping[str, Any]) -> Plan:
    """The plan that backup_plan has returned; Refused where it is something else."""
    try:
        plan = Plan(
            repository=str(found["repository"]),
            create_repository=bool(found["create_repository"]),
            run=str(found["run"]),
            id=check_set_id(str(found["id"]), "plan"),
            policy=_build(Policy, found["policy"]),
            space=_build(Space, found["space"]),
            vms=tuple(_parse_vm(entry) for entry in found["vms"]),
            warnings=tuple(found.get("warnings", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused("plan", f"this is not the plan that backup_plan returns ({error!r})") from error
    return plan


def _parse_vm(found: Mapping[str, Any]) -> VmPlan:
    parsed = {
        **found,
        "include_disks": tuple(found["include_disks"]),
        "exclude_disks": tuple(found["exclude_disks"]),
        "disks": tuple(_build(DiskPlan, disk) for disk in found["disks"]),
        "left_out": tuple(_build(LeftOut, disk) for disk in found["left_out"]),
    }
    plan: VmPlan = _build(VmPlan, parsed)
    return plan


def _build(cls: Any, found: Mapping[str, Any]) -> Any:
    names = {entry.name for entry in fields(cls)}
    return cls(**{name: value for name, value in found.items() if name in names})


@dataclass(frozen=True)
class Choice:
    """Which disks of a VM are backed up. C(error) says what is wrong with the lists of names."""

    disks: tuple[Disk, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    error: str = ""


def choose_disks(vm: Vm, request: Request) -> Choice:
    """All disks that can be written to, or those that are named; a name that no disk has is an error, never a shrug."""
    try:
        included = [vm.disk(name, "include_disks") for name in request.include_disks if name not in vm.empty]
        excluded = [vm.disk(name, "exclude_disks") for name in request.exclude_disks if name not in vm.empty]
    except Refused as error:
        return Choice(error=str(error))
    without_medium = [name for name in request.include_disks if name in vm.empty]
    if without_medium:
        return Choice(error=f"include_disks: drive {without_medium[0]} of VM {vm.name} has no medium")
    chosen: list[Disk] = []
    left_out = [LeftOut(name, "has no medium") for name in vm.empty]
    for disk in dict.fromkeys([*vm.disks, *included]):
        if disk in excluded:
            left_out.append(LeftOut(disk.name, "is excluded"))
        elif included and disk not in included:
            left_out.append(LeftOut(disk.name, "is not in include_disks"))
        elif disk.read_only and disk not in included:
            left_out.append(LeftOut(disk.name, READ_ONLY))
        else:
            chosen.append(disk)
    refused = next(filter(None, (vm.cannot_copy(disk) for disk in chosen)), "")
    if refused:
        return Choice(error=f"{refused}, or leave the disk out (exclude_disks)")
    names = [disk.name for disk in chosen]
    twins = [disk for disk in chosen if names.count(disk.name) > 1]
    if twins:
        nodes = ", ".join(disk.node for disk in twins if disk.name == twins[0].name)
        return Choice(
            error=f"several disks of VM {vm.name} are called {twins[0].name} (nodes {nodes}); exclude all but one of"
            " them by its node's name, or give them different names"
        )
    return Choice(tuple(chosen), tuple(left_out))


@dataclass(frozen=True)
class Terms:
    """What holds for all VMs of a run. C(tag) marks the jobs of its repository.

    C(takeover) removes what others are making, C(supersede) what we are making under another id, and C(adopt) goes on
    with a directory that belongs to another VM.
    """

    id: str
    run: str
    tag: str
    hypervisor: Hypervisor
    policy: Policy
    takeover: bool = False
    supersede: bool = False
    adopt: bool = False


@dataclass(frozen=True)
class Decision:
    """What is to be done with a VM now. C(intent) is the one to bring to its end, C(manifest) the set that is there.

    C(links) says how each of the chosen disks goes into the set; C(removal) why the intent is removed instead.
    """

    plan: VmPlan
    choice: Choice = field(default_factory=Choice)
    links: tuple[Link, ...] = ()
    intent: Intent | None = None
    manifest: Manifest | None = None
    removal: str = ""


def decide(request: Request, facts: Facts, shelf: Shelf, terms: Terms) -> Decision:
    """What to do with one VM; the first reason that applies wins."""
    choice = choose_disks(facts.vm, request) if facts.vm else Choice()
    intent, removal, unless = None, "", ""
    if choice.error:
        action, reason = FAIL, choice.error
    elif shelf.published(terms.id):
        action, reason = _already_published(facts, shelf, terms, choice)
    elif _has_given_up(shelf, terms):
        action, reason = FAIL, _has_given_up(shelf, terms)
    elif shelf.intents:
        intent = _next_intent(shelf.intents, terms.id)
        action, reason, removal = _being_made(intent, facts, terms)
        unless = "takeover" if action == FAIL else ""
    elif _belongs_to_another(facts, shelf) and not terms.adopt:
        action, reason, unless = FAIL, _belongs_to_another(facts, shelf), "adopt"
    else:
        action, reason = _not_begun(facts, shelf, terms, choice)
    links = link_disks(request, facts, shelf, terms, choice) if action in (START, FINISH) else ()
    disks = plan_disks(choice.disks, links) if links else _disks_of(intent)
    plan = VmPlan(
        name=request.name,
        monitor=request.monitor,
        action=action,
        reason=reason,
        identity=facts.vm.identity if facts.vm else "",
        level=_chain.set_level(disk.level for disk in disks),
        include_disks=request.include_disks,
        exclude_disks=request.exclude_disks,
        wanted=request.wanted,
        quiesce=request.quiesce,
        agent=request.agent,
        unless=unless,
        disks=disks,
        left_out=choice.left_out,
    )
    return Decision(plan, choice, links, intent, shelf.published(terms.id), removal)


def _already_published(facts: Facts, shelf: Shelf, terms: Terms, choice: Choice) -> tuple[str, str]:
    manifest = shelf.published(terms.id)
    wrong = _mismatch(manifest, facts.vm, choice) if manifest and facts.vm else ""
    return (FAIL, wrong) if wrong else (SKIP, PUBLISHED_ALREADY)


def _has_given_up(shelf: Shelf, terms: Terms) -> str:
    """Why this run has come to its end without a set: it neither tries again nor stands in the way of others."""
    failure = shelf.failure(terms.id)
    if failure and failure.run == terms.run and not any(intent.run == terms.run for intent in shelf.intents):
        return failure.error
    return ""


def _being_made(intent: Intent, facts: Facts, terms: Terms) -> tuple[str, str, str]:
    """Action, reason, and why the intent is to be removed."""
    foreign = _foreign(intent, facts, terms.hypervisor)
    if foreign and not terms.takeover:
        return (
            FAIL,
            f"{foreign}; let it end. If nobody makes it any more, takeover: true removes what is there of it",
            "",
        )
    if foreign:
        return FINISH, f"{foreign}; it is taken over", f"taken over by hypervisor {terms.hypervisor.name}"
    if intent.id != terms.id and terms.supersede:
        return FINISH, f"set {intent.id} is unfinished, and superseded", f"superseded by set {terms.id}"
    if intent.id != terms.id:
        return FINISH, f"set {intent.id} of this VM is unfinished, and comes first", ""
    return ATTACH, f"the set is being made since {intent.started}", ""


def _not_begun(facts: Facts, shelf: Shelf, terms: Terms, choice: Choice) -> tuple[str, str]:
    if terms.id in shelf.strays:
        return FAIL, f"in the place of set {terms.id} stands something that is no set (no valid manifest); move it away"
    if facts.vm is None:
        return SKIP if facts.off and terms.policy.offline == "skip" else FAIL, facts.error
    busy = ", ".join(f"job {job.id} ({job.type}, {job.status})" for job in _foreign_jobs(facts.vm, terms.tag))
    if busy:
        return FAIL, f"busy: {busy}; wait for its end, or cancel it with block_job"
    if facts.vm.status in MIGRATING:
        return SKIP, f"migrating ({facts.vm.status})"
    if not choice.disks:
        return SKIP, _nothing_to_back_up(choice)
    encrypted = ", ".join(disk.name for disk in choice.disks if disk.encrypted)
    if encrypted and terms.policy.encrypted_source == REFUSE:
        return FAIL, (
            f"encrypted_source: disk {encrypted} is encrypted at rest, and its copy would not be; exclude it"
            " (exclude_disks), or let it be copied with encrypted_source: warn (vm_backup_encrypted_source)"
        )
    return START, f"there is no set {terms.id} of this VM"


def _nothing_to_back_up(choice: Choice) -> str:
    drives = "; ".join(f"{drive.name} {drive.reason}" for drive in choice.left_out)
    read_only = any(drive.reason == READ_ONLY for drive in choice.left_out)
    return "it has no disk to back up{}{}".format(
        f": {drives}" if drives else "",
        ". Read-only ones do not change with the VM; name them in include_disks to back them up too"
        if read_only
        else "",
    )


def _belongs_to_another(facts: Facts, shelf: Shelf) -> str:
    """What is said of a VM in whose directory another one's sets are; empty where there are none."""
    newest = shelf.sets[-1] if shelf.sets else None
    if newest is None or facts.vm is None or newest.vm.identity == facts.vm.identity:
        return ""
    return (
        f"the directory belongs to another VM of this name ({newest.vm.identity}, set {newest.id}; this one is"
        f" {facts.vm.identity}). Give one of them another name; if this VM has taken the other's place, adopt: true"
        " goes on there, with a full set"
    )


def link_disks(request: Request, facts: Facts, shelf: Shelf, terms: Terms, choice: Choice) -> tuple[Link, ...]:
    """How each chosen disk goes into the next set."""
    if facts.vm is None:
        return ()
    vm = facts.vm
    wish = Wish(request.wanted, terms.policy.tracking, terms.policy.max_chain)
    return tuple(
        _chain.link(disk, vm.disks, vm.identity, shelf.sets, wish, facts.damage, vm.other_nodes)
        for disk in choice.disks
    )


def plan_disks(disks: Iterable[Disk], links: Iterable[Link]) -> tuple[DiskPlan, ...]:
    """What is said of the disks of a set."""
    chosen = tuple(disks)
    images = image_files((disk.name for disk in chosen), IMAGE_SUFFIX)
    return tuple(
        DiskPlan(
            name=disk.name,
            node=disk.node,
            level=link.level,
            reason=link.reason,
            parent=link.parent.id if link.parent else None,
            target=images[disk.name],
        )
        for disk, link in zip(chosen, links)
    )


def never_bolder(decision: Decision, planned: VmPlan) -> Decision:
    """The decision, with a full image wherever the plan had one: what has changed since makes a run safer only."""
    if planned.action != START:
        return decision
    full = {disk.name: disk.reason for disk in planned.disks if disk.level == FULL}
    links = tuple(
        Link(FULL, full[disk.name]) if disk.name in full else link
        for disk, link in zip(decision.choice.disks, decision.links)
    )
    disks = plan_disks(decision.choice.disks, links)
    level = _chain.set_level(disk.level for disk in disks)
    return replace(decision, links=links, plan=replace(decision.plan, disks=disks, level=level))


def changes(planned: VmPlan, disks: Iterable[DiskPlan]) -> tuple[str, ...]:
    """What goes otherwise than planned."""
    before = {disk.name: disk for disk in planned.disks} if planned.action == START else {}
    return tuple(
        f"disk {disk.name} is {disk.level} instead of {before[disk.name].level}: {disk.reason}"
        for disk in disks
        if disk.name in before and disk.level != before[disk.name].level
    )


def _disks_of(intent: Intent | None) -> tuple[DiskPlan, ...]:
    if intent is None:
        return ()
    return tuple(
        DiskPlan(
            name=disk.image.name,
            node=disk.image.node,
            level=disk.image.level,
            reason=disk.image.reason,
            parent=disk.image.parent.id if disk.image.parent else None,
            target=disk.image.image,
            bytes=disk.expected,
        )
        for disk in intent.disks
    )


def _next_intent(intents: tuple[Intent, ...], set_id: str) -> Intent:
    """An unfinished older set comes to its end before a new one begins."""
    others = [intent for intent in intents if intent.id != set_id]
    return [*others, *intents][0]


def _mismatch(published: Manifest, vm: Vm, choice: Choice) -> str:
    """Why a published set is not the one that is asked for; empty where it is."""
    if published.vm.identity != vm.identity:
        return (
            f"set {published.id} belongs to another VM of this name ({published.vm.identity};"
            f" this one is {vm.identity}); rename one of them, or use another id, with adopt: true"
        )
    held = {disk.name for disk in published.disks}
    missing = ", ".join(disk.name for disk in choice.disks if disk.name not in held)
    return f"set {published.id} exists without disk {missing}; use another id" if missing else ""


def _foreign(intent: Intent, facts: Facts, hypervisor: Hypervisor) -> str:
    """Why an intent is somebody else's; empty where it is ours."""
    maker = intent.hypervisor
    if not maker.is_same(hypervisor):
        return (
            f"set {intent.id} is being made by hypervisor {maker.name} (machine-id {maker.machine_id}) since"
            f" {intent.started}"
        )
    if intent.attempt in facts.doubtful:
        return in_doubt(intent)
    vm = facts.vm
    # The name of a job is that of one attempt only: the VM that has it is the right one, whatever it is called here.
    if vm is None or intent.attempt in facts.dead or facts.shows(intent):
        return ""
    if vm.identity != intent.vm.identity:
        return f"set {intent.id} is being made of another VM of this name ({intent.vm.identity}) since {intent.started}"
    if intent.attempt in facts.elsewhere:
        other = f"pid {intent.process[0]}, {intent.monitor}"
        return f"set {intent.id} is being made of another VM of this name ({other}) since {intent.started}"
    return ""


def in_doubt(intent: Intent) -> str:
    """What is said of an attempt whose QEMU can neither be asked nor be seen to have ended."""
    return (
        f"set {intent.id} is being made since {intent.started}, and was begun where processes and sockets have other"
        " names than here (in a container, or outside of this one): whether its QEMU still copies cannot be told from"
        " here. Run the backup where it was begun"
    )


def _foreign_jobs(vm: Vm, tag: str) -> tuple[Job, ...]:
    """The jobs of a VM that are none of this repository's."""
    return tuple(job for job in vm.active_jobs() if not job.id.startswith(f"vmfleet.{tag}."))


# What an attempt has come to

RUNNING = "running"
COPIED = "copied"
INTERRUPTED = "interrupted"
BROKEN = "broken"
GIVEN_UP = "given up"
UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Verdict:
    """What has become of an attempt. C(error) says why it is broken, or why nobody can tell."""

    state: str
    error: str = ""


def judge(intent: Intent, facts: Facts, shelf: Shelf, now: float) -> Verdict:
    """What has become of an attempt, at C(now) seconds of the hypervisor's CLOCK_BOOTTIME."""
    failure = shelf.failure(intent.id)
    if failure and failure.attempt == intent.attempt:
        return Verdict(GIVEN_UP, failure.error)
    if intent.attempt in shelf.described:
        return Verdict(COPIED)
    if intent.attempt in facts.dead:
        if intent.phase == PREPARING:
            return Verdict(INTERRUPTED)
        return Verdict(BROKEN, "QEMU ended, or was restarted, while the set was made")
    if facts.vm is None:
        return Verdict(UNREACHABLE, facts.error)
    return _judge_jobs(intent, facts.vm, now)


def _judge_jobs(intent: Intent, vm: Vm, now: float) -> Verdict:
    jobs = {disk.image.name: vm.job(disk.job) for disk in intent.disks}
    if intent.phase == PREPARING and not any(jobs.values()):
        return Verdict(INTERRUPTED)
    errors = [f"disk {disk}: {_job_error(job)}" for disk, job in jobs.items() if _job_error(job)]
    if errors:
        return Verdict(BROKEN, "; ".join(errors))
    if all(job and job.ended for job in jobs.values()):
        return _judge_sizes(intent, vm)
    if intent.deadline is not None and now >= intent.deadline:
        return Verdict(BROKEN, f"not done within the timeout of {intent.deadline - intent.begun:g} s")
    return Verdict(RUNNING)


def _judge_sizes(intent: Intent, vm: Vm) -> Verdict:
    """A disk that is cut short while it is copied leaves an image that lacks the end, and no error.

    QEMU refuses that for a disk with a job, but not through a filter (such as a throttle) above its node.
    """
    now = {disk.node: disk.virtual_size for disk in vm.disks}
    for disk in intent.disks:
        if now.get(disk.image.node, disk.image.virtual_size) < disk.image.virtual_size:
            return Verdict(BROKEN, f"disk {disk.image.name} has been shrunk while it was copied")
    return Verdict(COPIED)


def _job_error(job: Job | None) -> str:
    """Why a job comes to nothing; empty while it runs, and where it has ended well."""
    if job is None:
        return "its job was dismissed by somebody else: nobody knows how it ended"
    if not job.ended or (job.status == "concluded" and not job.error):
        return ""
    return "cancelled from outside" if job.error == CANCELLED else job.error or f"its job ended as {job.status}"


def guest_stopped_by(intent: Intent, facts: Facts) -> bool:
    """Whether a VM stands still because of our target: only then is it ours to let it go on.

    A target whose space is not reserved may have been full for a moment: neither it nor the job tells of that later. To
    go on does no harm to a VM that has stopped for another reason: it tries its write again, and stops again.
    """
    if facts.vm is None or facts.vm.status != IO_ERROR or intent.guest == IO_ERROR:
        return False
    in_error = any(job.id in intent.jobs and (job.error or job.io_status != "ok") for job in facts.vm.jobs)
    return in_error or not intent.reserved


# The whole run


def refuse_twins(plans: Iterable[VmPlan], processes: Mapping[str, tuple[int, ...]]) -> tuple[VmPlan, ...]:
    """VMs of one name, or monitors of one QEMU: which of them is meant cannot be known, so none is touched.

    C(processes) are the QEMUs behind the monitors, as far as they are known.
    """
    checked = tuple(plans)
    names = [plan.name for plan in checked]
    pids = [processes.get(plan.monitor) for plan in checked]
    result = []
    for plan, process in zip(checked, pids):
        if names.count(plan.name) > 1:
            others = ", ".join(other.monitor for other in checked if other.name == plan.name and other is not plan)
            reason = f"another VM is called {plan.name} too ({others}); give one of them another name"
        elif process and pids.count(process) > 1:
            others = ", ".join(
                other.monitor for other, pid in zip(checked, pids) if pid == process and other is not plan
            )
            reason = f"{plan.monitor} belongs to the same QEMU as {others}; name one of the two only"
        else:
            result.append(plan)
            continue
        # Without an identity: nobody is to look whether it goes on after all.
        result.append(replace(plan, action=FAIL, reason=reason, unless="", identity="", disks=()))
    return tuple(result)


def fit_into(space: Space, plans: Iterable[VmPlan]) -> tuple[Space, tuple[VmPlan, ...]]:
    """Let each VM in turn take its part of the space; one for which there is not enough fails, and the others go on."""
    left = space.usable
    needed = 0
    result = []
    for plan in plans:
        if plan.bytes > max(left, 0):
            result.append(replace(plan, action=FAIL, reason=no_room(plan.bytes, space, left)))
            continue
        left -= plan.bytes
        needed += plan.bytes
        result.append(plan)
    return replace(space, needed=needed), tuple(result)


def reserve_bytes(reserve: str, total: int) -> int:
    """C(5%) of a file system of C(total) bytes, or an amount such as C(20G)."""
    try:
        if reserve.endswith("%"):
            percent = float(reserve[:-1])
            if not 0 <= percent < 100:
                raise ValueError
            return int(total * percent / 100)
        return int(human_to_bytes(reserve, default_unit="B"))
    except ValueError:
        raise Refused(
            "reserve", f"{reserve!r} is neither an amount, such as 20G, nor a percentage, such as 5%"
        ) from None


def no_room(needed: int, space: Space, left: int) -> str:
    """What is said of a set for which only C(left) bytes are there."""
    reserve = human(space.reserve)
    if not space.reservable:
        reserve += " (counted twice, because this file system cannot reserve space for a copy)"
    return (
        f"not enough space: the set may take {human(needed)}, and there is room for {human(max(left, 0))}:"
        f" {human(space.free)} are free, {reserve} are kept in reserve, and the rest is for other sets;"
        " make room, or lower the reserve"
    )


def describe(plan: Plan) -> list[str]:
    """The plan for people to read."""
    space = plan.space
    created = " (to be created)" if plan.create_repository else ""
    amounts = {
        "needed": space.needed,
        "free": space.free,
        "kept in reserve": space.reserve,
        "promised to other sets": space.promised,
    }
    lines = [
        f"Backup {plan.id} to {plan.repository}{created}",
        "Space: {}".format(", ".join(f"{human(size)} {what}" for what, size in amounts.items())),
    ]
    if not space.reservable:
        lines.append("This file system cannot reserve space for a copy: the reserve counts twice.")
    lines += [f"Warning: {warning}" for warning in plan.warnings]
    width = column(vm.name for vm in plan.vms)
    for vm in plan.vms:
        lines.append(f"{vm.action:6}  {vm.name:{width}}  {vm.reason}")
        if vm.action in (START, ATTACH, FINISH):
            indent = " " * (6 + 2 + width + 2)
            lines += [
                f"{indent}{disk.name}: {disk.level}, about {human(disk.bytes)}: {disk.reason}" for disk in vm.disks
            ]
            lines += [f"{indent}{drive.name}: left out, {drive.reason}" for drive in vm.left_out]
    return lines

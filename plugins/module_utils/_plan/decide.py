# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Decide what is to be done with each VM, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._qemu.model import EncryptedSource
from .._repository import chain
from .disks import READ_ONLY, choose_disks, disks_of_intent, link_disks, plan_disks
from .model import PUBLISHED_ALREADY, UNLESS, Action, Case, Choice, Decision, Offline, VmPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .._qemu.model import Job, Vm
    from .._repository.documents import Hypervisor, Intent, Manifest
    from .._repository.repository import VmRecords
    from .disks import ChainLink
    from .model import Observation, Request, RunContext


UNTOLD = ". The VM is off, and its uuid is unknown: if it has one, list it (vms: uuid)"
SKIPPED = "its own metadata say that it is not backed up (skip='yes')"
MIGRATING = frozenset({"inmigrate", "postmigrate", "finish-migrate"})


def decide(
    request: Request, seen: Observation, records: VmRecords, context: RunContext, followed: str = ""
) -> Decision:
    """Decide what to do with one VM; the first case that holds wins.

    C(followed) is the attempt at the set that this run has seen to be made.
    """
    choice = choose_disks(seen.vm, request) if seen.vm else Choice()
    intent, removal = None, ""
    # These are of the set that is to be begun: what we are making comes to its end, whatever they say by now.
    other = "" if request.skip else _has_other_uuid(request, seen)
    wrong = "" if request.skip else choice.error or other
    if records.published(context.id):
        named = request.include_disks if wrong else ()
        case, reason = _already_published(seen, records, context, choice, named, other)
    elif _has_given_up(records, context, followed):
        case, reason = Case.FAILED, _has_given_up(records, context, followed)
    elif records.intents:
        intent = _next_intent(records.intents, context.id)
        case, reason, removal = _being_made(intent, seen, context, wrong, other)
    elif request.skip:
        case, reason = Case.EXCLUDED, SKIPPED
    elif wrong:
        case, reason = Case.WRONG_DISKS, wrong
    elif records.barred:
        case, reason = Case.IN_THE_WAY, records.barred
    elif _belongs_to_another(seen, records) and not context.adopt:
        case, reason = Case.OTHER_DIRECTORY, _belongs_to_another(seen, records)
    else:
        case, reason = _not_begun(request, seen, records, context, choice)
    action = case.action
    links = link_disks(request, seen, records, context, choice) if action in (Action.START, Action.FINISH) else ()
    disks = plan_disks(choice.disks, links) if links else disks_of_intent(intent)
    plan = VmPlan(
        name=request.name,
        monitor=request.monitor,
        action=action,
        reason=f"{reason}{_while_off(seen, links)}",
        identity=seen.vm.identity if seen.vm else "",
        level=chain.set_level(disk.level for disk in disks),
        include_disks=request.include_disks,
        exclude_disks=request.exclude_disks,
        wanted=request.wanted,
        quiesce=request.quiesce,
        agent=request.agent,
        libvirt_uri=request.libvirt_uri,
        skip=request.skip,
        unless=UNLESS.get(case, ""),
        disks=disks,
        left_out=choice.left_out,
        files=request.files,
        uuid=request.uuid,
        process=(seen.process.pid, seen.process.start) if seen.process else (),
    )
    return Decision(case, plan, choice, links, intent, records.published(context.id), removal)


def _already_published(
    seen: Observation,
    records: VmRecords,
    context: RunContext,
    choice: Choice,
    named: Iterable[str],
    other: str,
) -> tuple[Case, str]:
    """Return the case, and the reason, of a VM that has its set.

    C(named) are the disks that are asked for where the lists of disks are wrong, and C(other) says that the VM has
    another uuid than the one of the list.
    """
    manifest = records.published(context.id)
    if other:
        return Case.OTHER_VM, other
    if manifest and seen.vm and manifest.vm.identity != seen.vm.identity:
        return Case.OTHER_VM, (
            f"set {manifest.id} belongs to another VM of this name ({manifest.vm.identity};"
            f" this one is {seen.vm.identity}); rename one of them, or use another id, with adopt: true"
        )
    missing = _missing_disks(manifest, choice, named, seen.vm) if manifest else ""
    if missing:
        remedy = f". {choice.error}" if choice.error else "; use another id"
        return Case.WITHOUT_DISK, f"set {context.id} exists without disk {missing}{remedy}"
    return Case.PUBLISHED, PUBLISHED_ALREADY


def _has_given_up(records: VmRecords, context: RunContext, followed: str) -> str:
    """Return why this run has come to its end without a set: it neither tries again nor stands in the way of others.

    Who cancels an attempt means all who follow it, whoever has begun it. One that has failed is another's failure.
    """
    failure = records.failure(context.id)
    if failure is None or any(intent.run == context.run for intent in records.intents):
        return ""
    is_cancelled = failure.state == "cancelled" and bool(followed) and failure.attempt == followed
    return failure.error if failure.run == context.run or is_cancelled else ""


def _being_made(
    intent: Intent, seen: Observation, context: RunContext, wrong: str, other: str
) -> tuple[Case, str, str]:
    """Return the case, the reason, and why the intent is to be removed.

    C(wrong) says why no set could be begun instead, and C(other) that the VM has another uuid than the one of the list.
    """
    theirs = foreign(intent, seen, context.hypervisor)
    if theirs and (other or (wrong and context.takeover)):
        # A set is taken over only to make way for one that can be begun, of the VM that is meant.
        return Case.FOREIGN, other or wrong, ""
    if theirs and not context.takeover:
        return (
            Case.FOREIGN,
            f"{theirs}; wait until it ends. If nobody makes it any more, takeover: true removes the unfinished set",
            "",
        )
    if theirs:
        return Case.TAKEN_OVER, f"{theirs}; it is taken over", f"taken over by hypervisor {context.hypervisor.name}"
    if intent.id != context.id and context.supersede and not wrong:
        return Case.SUPERSEDED, f"set {intent.id} is unfinished, and superseded", f"superseded by set {context.id}"
    if intent.id != context.id:
        return Case.OTHER_SET, f"set {intent.id} of this VM is unfinished, and comes first", ""
    return Case.BEING_MADE, f"the set is being made since {intent.started}", ""


def _not_begun(
    request: Request, seen: Observation, records: VmRecords, context: RunContext, choice: Choice
) -> tuple[Case, str]:
    if context.id in records.strays:
        return (
            Case.IN_THE_WAY,
            f"the place of set {context.id} is taken by something that is no set (no valid manifest); move it away",
        )
    if seen.vm is None:
        return _silent(request, seen, context)
    busy = busy_with(seen.vm.jobs, context.tag)
    if busy:
        return Case.BUSY, busy
    if seen.vm.domain and seen.vm.domain.job:
        return Case.BUSY, (
            f"busy: libvirt is working on the domain: {seen.vm.domain.job}; wait for its end (virsh domjobinfo)"
        )
    if seen.vm.status in MIGRATING:
        return Case.MIGRATING, f"migrating ({seen.vm.status})"
    if not choice.disks:
        return Case.NO_DISKS, _nothing_to_back_up(choice)
    encrypted = ", ".join(disk.name for disk in choice.disks if disk.encrypted)
    if encrypted and seen.vm.is_off:
        return Case.ENCRYPTED, (
            f"disk {encrypted} is encrypted at rest, and only its VM has the key: it cannot be copied while the VM is"
            " off; start the VM, or exclude the disk (exclude_disks)"
        )
    if encrypted and context.policy.encrypted_source == EncryptedSource.REFUSE:
        return Case.ENCRYPTED, (
            f"encrypted_source: disk {encrypted} is encrypted at rest, but its copy would not be encrypted; exclude"
            " the disk (exclude_disks), or allow the copy with encrypted_source: warn (vm_backup_encrypted_source)"
        )
    refusal = seen.admission.refusal(context.policy.selinux_label)
    if refusal:
        return Case.CONFINED, refusal
    return Case.NOT_BEGUN, f"there is no set {context.id} of this VM"


def _silent(request: Request, seen: Observation, context: RunContext) -> tuple[Case, str]:
    """Return the case, and the reason, of a VM of which nothing is seen."""
    if seen.off and context.policy.offline == Offline.SKIP:
        return Case.OFF, seen.error
    if seen.off and context.policy.offline == Offline.BACKUP and not (request.files or request.address.domain):
        return Case.SILENT, f"{seen.error}. To back it up while it is off, list its disks (vms: disks)"
    return Case.SILENT, seen.error


def _while_off(seen: Observation, links: Iterable[ChainLink]) -> str:
    """Return what is to be known of a set that is made while its VM is off; empty for others."""
    copied = [not link.unchanged for link in links]
    if seen.vm is None or not seen.vm.is_off or not copied:
        return ""
    return (
        "; it is off, and cannot be started while it is copied" if any(copied) else "; it is off, and has not changed"
    )


def _has_other_uuid(request: Request, seen: Observation) -> str:
    """Return what is said of a VM that has another uuid than the one that it is listed with."""
    if seen.vm is None or not request.uuid or seen.vm.uuid == request.uuid:
        return ""
    has = f"uuid {seen.vm.uuid}" if seen.vm.uuid else "no uuid"
    return f"vms: {request.name} is listed with uuid {request.uuid}, and the VM at {request.monitor} has {has}"


def _nothing_to_back_up(choice: Choice) -> str:
    drives = "; ".join(f"{drive.name} {drive.reason}" for drive in choice.left_out)
    read_only = any(drive.reason == READ_ONLY for drive in choice.left_out)
    return "it has no disk to back up{}{}".format(
        f": {drives}" if drives else "",
        ". Read-only ones do not change with the VM; name them in include_disks to back them up too"
        if read_only
        else "",
    )


def _belongs_to_another(seen: Observation, records: VmRecords) -> str:
    """Return what is said of a VM in whose directory another one's sets are; empty where there are none."""
    newest = records.sets[-1] if records.sets else None
    if newest is None or seen.vm is None or newest.vm.identity == seen.vm.identity:
        return ""
    return (
        f"the directory belongs to another VM of this name ({newest.vm.identity}, set {newest.id}; this one is"
        f" {seen.vm.identity}). Give one of them another name; if this VM replaces the other, adopt: true continues in"
        f" this directory, with a full set{UNTOLD if seen.vm.is_off and not seen.vm.uuid else ''}"
    )


def _next_intent(intents: tuple[Intent, ...], set_id: str) -> Intent:
    """Return the set that comes to its end first: an unfinished one of another id, before the new one begins."""
    others = [intent for intent in intents if intent.id != set_id]
    return [*others, *intents][0]


def _missing_disks(published: Manifest, choice: Choice, named: Iterable[str], vm: Vm | None) -> str:
    """Return the disks that are chosen, or C(named), and that a published set lacks; empty where it has all."""
    known = {name for image in published.disks for name in (*image.names, image.node)}
    # A disk has more names than a set knows: that of a filter above it, say.
    there = {name: vm.find_disk(name) if vm else None for name in named}
    return ", ".join(
        (
            *(disk.name for disk in choice.disks if not published.find(disk.names)),
            *(name for name, disk in there.items() if name not in known and not (disk and published.find(disk.names))),
        )
    )


def foreign(intent: Intent, seen: Observation, hypervisor: Hypervisor) -> str:
    """Return why an intent is somebody else's; empty where it is ours."""
    maker = intent.hypervisor
    if not maker.is_same(hypervisor):
        return (
            f"set {intent.id} is being made by hypervisor {maker.name} (machine-id {maker.machine_id}) since"
            f" {intent.started}"
        )
    if intent.attempt in seen.doubtful:
        return in_doubt(intent)
    vm = seen.vm
    # The name of a job is that of one attempt only: the VM that has it is the right one, whatever it is called here.
    if vm is None or intent.attempt in seen.dead or seen.shows(intent):
        return ""
    if vm.identity != intent.vm.identity:
        return f"set {intent.id} is being made of another VM of this name ({intent.vm.identity}) since {intent.started}"
    if intent.attempt in seen.elsewhere:
        other = f"pid {intent.process[0]}, {intent.monitor}"
        return f"set {intent.id} is being made of another VM of this name ({other}) since {intent.started}"
    return ""


def in_doubt(intent: Intent) -> str:
    """Return what is said of an attempt whose QEMU can neither be asked nor be seen to have ended."""
    return (
        f"a run in another container, or outside of this one, began set {intent.id} at {intent.started}. This process"
        " cannot see whether its QEMU still copies. Run the backup where it began"
    )


def busy_with(jobs: Iterable[Job], tag: str) -> str:
    """Return what is said of jobs that have not ended and are not this repository's; empty where there are none."""
    foreign = (job for job in jobs if not job.ended and not job.id.startswith(f"vmfleet.{tag}."))
    told = ", ".join(f"job {job.id} ({job.type}, {job.status})" for job in foreign)
    return f"busy: {told}; wait for its end, or cancel it with block_job" if told else ""

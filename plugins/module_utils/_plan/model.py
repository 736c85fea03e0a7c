# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Describe what is asked for, what is seen, and what is planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._common.errors import Refused
from .._common.fields import FLAG, NAME, SIZE, TEXT, DocumentError, Maybe, OneOf, Several, Text, Whole, holds, part
from .._common.formats import Word
from .._common.options import LIBVIRT_URI
from .._host.confinement import ADMITTED, Admission
from .._qemu.address import FoundBy, parse_address
from .._qemu.disk_file import DiskFile
from .._qemu.model import EncryptedSource
from .._repository.documents import COMPRESSION, IMAGE, SET_ID, Level

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .._host.process import Process
    from .._qemu.address import Address
    from .._qemu.model import Disk, Vm
    from .._repository.documents import Hypervisor, Intent, Manifest
    from .disks import ChainLink


class Action(Word):
    """What is to be done for a VM."""

    SKIP = "skip"
    ATTACH = "attach"
    """Go on with a set that is being made."""
    FINISH = "finish"
    """Bring an older set to its end, before the new one begins."""
    START = "start"
    FAIL = "fail"


class Case(Word):
    """What is found of a VM's set. The first case that holds decides, in this order."""

    OTHER_VM = "other VM"
    """The set is published, and is of another VM of this name."""
    WITHOUT_DISK = "without disk"
    """The set is published, and lacks a disk that is chosen now."""
    PUBLISHED = "published"
    FAILED = "failed"
    """This very run has failed at it, or somebody has cancelled it while this run followed it."""
    FOREIGN = "foreign"
    """Somebody else is making a set of this name."""
    TAKEN_OVER = "taken over"
    """Somebody else is making a set of this name, and that is to be removed."""
    SUPERSEDED = "superseded"
    """A set of another id is unfinished, and is to be removed."""
    OTHER_SET = "other set"
    """A set of another id is unfinished, and comes first."""
    BEING_MADE = "being made"
    EXCLUDED = "excluded"
    """The domain itself says that it is not backed up."""
    WRONG_DISKS = "wrong disks"
    """A list names a disk that the VM does not have or that cannot be copied, or another uuid than the VM's."""
    OTHER_DIRECTORY = "other directory"
    """The newest set in the VM's directory is of another VM."""
    IN_THE_WAY = "in the way"
    """Something that is no set stands in the set's place."""
    OFF = "off"
    """There is no QEMU, and the policy is to skip such a VM."""
    SILENT = "silent"
    """QEMU does not answer."""
    BUSY = "busy"
    """A block job of somebody else is active."""
    MIGRATING = "migrating"
    NO_DISKS = "no disks"
    ENCRYPTED = "encrypted"
    """A disk is encrypted at rest, and the policy is to refuse such a disk."""
    CONFINED = "confined"
    """A security module would not give QEMU the images, and they are not to be, or cannot be, labelled for it."""
    NOT_BEGUN = "not begun"

    @property
    def action(self) -> Action:
        """What is to be done about it."""
        return ACTIONS.get(self, Action.FAIL)


ACTIONS = {
    Case.PUBLISHED: Action.SKIP,
    Case.TAKEN_OVER: Action.FINISH,
    Case.SUPERSEDED: Action.FINISH,
    Case.OTHER_SET: Action.FINISH,
    Case.BEING_MADE: Action.ATTACH,
    Case.EXCLUDED: Action.SKIP,
    Case.OFF: Action.SKIP,
    Case.MIGRATING: Action.SKIP,
    Case.NO_DISKS: Action.SKIP,
    Case.NOT_BEGUN: Action.START,
}
"""What is to be done in which case. The VM fails in all others."""
UNLESS = {Case.FOREIGN: "takeover", Case.OTHER_DIRECTORY: "adopt"}
"""The option of backup_set with which a VM goes on that fails in this case."""


class Quiesce(Word):
    """Whether the file systems of the guest are frozen while the jobs start."""

    NONE = "none"
    TRY = "try"
    REQUIRE = "require"


class Offline(Word):
    """What becomes of a VM that is off."""

    BACKUP = "backup"
    FAIL = "fail"
    SKIP = "skip"


LEVEL = holds(OneOf(*Level))
NAMES = holds(Several(Text("a name", least=1)))
RESERVE = holds(Text("a part of a file system, or an amount", pattern="[0-9.]{1,20}(%| ?[A-Za-z]{1,5})?"))
DIRECTORY = holds(Text("an absolute path", pattern="/[^\0-\x1f\x7f]*"))
MONITOR = holds(Text("a monitor", pattern="(unix:/|tcp:|libvirt:)[^\0]+"))
LIBVIRT = holds(Text("a libvirt of this machine, or nothing", pattern=f"({LIBVIRT_URI})?"))
SOCKET = holds(Text("an absolute path, or nothing", pattern="(/[^\0]*)?"))
PUBLISHED_ALREADY = "the set is published"


@dataclass(frozen=True)
class Policy:
    """How sets are made. C(speed) is bytes/s, 0 for no limit; C(reserve) as it was given, such as C(5%)."""

    compression: str = field(default="none", metadata=COMPRESSION)
    speed: int = field(default=0, metadata=SIZE)
    reserve: str = field(default="5%", metadata=RESERVE)
    checksum: bool = field(default=True, metadata=FLAG)
    offline: str = field(default=Offline.BACKUP, metadata=holds(OneOf(*Offline)))
    max_chain: int = field(default=30, metadata=holds(Whole(1)))
    tracking: bool = field(default=True, metadata=FLAG)
    encrypted_source: str = field(default=EncryptedSource.WARN, metadata=holds(OneOf(*EncryptedSource)))
    selinux_label: bool = field(default=True, metadata=FLAG)


@dataclass(frozen=True)
class Request:
    """A VM to back up. C(name) is what the set is called after; the lists name disks by any of their names.

    C(wanted) is the level that is asked for; C(agent) the guest agent's socket, empty for the one that QEMU knows.
    C(libvirt_uri) is which libvirt the domain C(monitor) is of; empty for a monitor that is none. C(files) are its
    disks for when it is off, and is to be backed up then; C(uuid) is its own, where it is told. C(skip) says that no
    set is to be begun. C(found_by) is how its monitor was found, and C(given) names the fields that are said of this
    very VM.
    """

    name: str
    monitor: str
    include_disks: tuple[str, ...] = ()
    exclude_disks: tuple[str, ...] = ()
    wanted: Level = Level.AUTO
    quiesce: str = Quiesce.NONE
    agent: str = ""
    libvirt_uri: str = ""
    files: tuple[DiskFile, ...] = ()
    uuid: str = ""
    skip: bool = False
    found_by: FoundBy = FoundBy.LISTED
    given: frozenset[str] = frozenset()

    @property
    def address(self) -> Address:
        """Where its monitor is."""
        return parse_address(self.monitor, "vms", self.libvirt_uri)


@dataclass(frozen=True)
class Observation:
    """What a look at a VM found. C(vm) is None where it did not answer, and C(off) says that there is no QEMU.

    C(dead) are the attempts whose QEMU has ended, C(doubtful) those of whose QEMU that cannot be told, C(elsewhere)
    those of a QEMU that is seen to be another one than that which has answered. C(damage) says, by set id and disk,
    what is wrong with the files of the images that the next ones would build on. C(admission) tells whether QEMU would
    be given new images.
    """

    vm: Vm | None = None
    error: str = ""
    off: bool = False
    dead: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    damage: Mapping[tuple[str, str], str] = field(default_factory=dict)
    admission: Admission = ADMITTED

    @property
    def process(self) -> Process | None:
        """The QEMU that has answered, or the storage daemon, where it is known."""
        return self.vm.process if self.vm else None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to ask about the VM, nor to be told what to do with it."""
        return self.vm is None or (self.vm.is_off and not self.vm.daemon)

    def shows(self, intent: Intent) -> bool:
        """Tell whether the QEMU that has answered has a job of this attempt, and so is the one that makes its set."""
        return self.vm is not None and any(self.vm.job(job) for job in intent.jobs)


@dataclass(frozen=True)
class LeftOut:
    """A drive that is not backed up, and why."""

    name: str = field(metadata=TEXT)
    reason: str = field(metadata=TEXT)


@dataclass(frozen=True)
class DiskPlan:
    """One disk of a set. C(bytes) is the most that its image is expected to take."""

    name: str = field(metadata=NAME)
    node: str = field(metadata=TEXT)
    level: Level = field(metadata=LEVEL)
    reason: str = field(metadata=TEXT)
    parent: str | None = field(metadata=holds(Maybe(Text())))
    target: str = field(metadata=IMAGE)
    bytes: int = field(default=0, metadata=SIZE)


@dataclass(frozen=True)
class VmPlan:
    """One VM: what is to be done, and why. C(wanted) is the level that is asked for, C(level) the one to be made.

    C(unless) is the option of backup_set with which it goes on after all, where C(action) is C(fail). C(process) is
    the pid and the start time of the QEMU that has answered; empty where none has, or that cannot be told.
    """

    name: str = field(metadata=NAME)
    monitor: str = field(metadata=MONITOR)
    action: str = field(metadata=holds(OneOf(*Action)))
    reason: str = field(metadata=TEXT)
    identity: str = field(default="", metadata=TEXT)
    level: Level = field(default=Level.FULL, metadata=LEVEL)
    include_disks: tuple[str, ...] = field(default=(), metadata=NAMES)
    exclude_disks: tuple[str, ...] = field(default=(), metadata=NAMES)
    wanted: Level = field(default=Level.AUTO, metadata=LEVEL)
    quiesce: str = field(default=Quiesce.NONE, metadata=holds(OneOf(*Quiesce)))
    agent: str = field(default="", metadata=SOCKET)
    libvirt_uri: str = field(default="", metadata=LIBVIRT)
    skip: bool = field(default=False, metadata=FLAG)
    unless: str = field(default="", metadata=holds(OneOf("", *UNLESS.values())))
    disks: tuple[DiskPlan, ...] = field(default=(), metadata=holds(Several(part(DiskPlan))))
    left_out: tuple[LeftOut, ...] = field(default=(), metadata=holds(Several(part(LeftOut))))
    files: tuple[DiskFile, ...] = field(default=(), metadata=holds(Several(part(DiskFile))))
    uuid: str = field(default="", metadata=TEXT)
    process: tuple[int, ...] = field(default=(), metadata=holds(Several(Whole(), most=2)))

    @property
    def request(self) -> Request:
        return Request(
            self.name,
            self.monitor,
            self.include_disks,
            self.exclude_disks,
            self.wanted,
            self.quiesce,
            self.agent,
            self.libvirt_uri,
            self.files,
            self.uuid,
            self.skip,
        )

    @property
    def bytes(self) -> int:
        return sum(disk.bytes for disk in self.disks) if self.action in (Action.START, Action.FINISH) else 0


@dataclass(frozen=True)
class Space:
    """Room in the repository, in bytes. C(reserve) stays free; C(promised) is what other growing sets will take."""

    free: int = field(metadata=SIZE)
    reserve: int = field(metadata=SIZE)
    promised: int = field(metadata=SIZE)
    reservable: bool = field(metadata=FLAG)
    needed: int = field(default=0, metadata=SIZE)

    @property
    def usable(self) -> int:
        # Where nothing can be reserved, others may take the space in the middle of a copy: the reserve counts double.
        return self.free - self.reserve * (1 if self.reservable else 2) - self.promised


@dataclass(frozen=True)
class Plan:
    """One run on one hypervisor."""

    repository: str = field(metadata=DIRECTORY)
    create_repository: bool = field(metadata=FLAG)
    run: str = field(metadata=TEXT)
    id: str = field(metadata=SET_ID)
    policy: Policy = field(metadata=holds(part(Policy)))
    space: Space = field(metadata=holds(part(Space)))
    vms: tuple[VmPlan, ...] = field(metadata=holds(Several(part(VmPlan))))
    warnings: tuple[str, ...] = field(default=(), metadata=holds(Several(Text())))


def parse_plan(found: Mapping[str, Any]) -> Plan:
    """Return the plan that backup_plan has returned; Refused where it is something else."""
    try:
        plan: Plan = part(Plan).read(found)
    except DocumentError as error:
        raise Refused("plan", f"this is not the plan that backup_plan returns: {error}") from error
    return plan


@dataclass(frozen=True)
class Choice:
    """Which disks of a VM are backed up. C(error) says what is wrong with the lists of names."""

    disks: tuple[Disk, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class RunContext:
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
    """What is to be done with a VM now, and in which case it is.

    C(intent) is the one to bring to its end, C(manifest) the set that is there. C(links) says how each of the chosen
    disks goes into the set; C(removal) why the intent is removed instead.
    """

    case: Case
    plan: VmPlan
    choice: Choice = field(default_factory=Choice)
    links: tuple[ChainLink, ...] = ()
    intent: Intent | None = None
    manifest: Manifest | None = None
    removal: str = ""

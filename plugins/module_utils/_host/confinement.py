# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether a confined QEMU is given the files that this process opens, and label them where it is not.

A security module looks at a file when QEMU receives it, and drops it without a word to the sender. AppArmor asks who
has opened it: what an unconfined process has opened is given to every QEMU. SELinux asks for its label.
Reference: aa_file_perm() in security/apparmor/file.c and selinux_file_receive() in security/selinux/hooks.c of Linux.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .files import step

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


NO_DESCRIPTOR = "No file descriptor supplied via SCM_RIGHTS"
"""What QEMU says of a file that it was not given."""
ATTRIBUTE = "security.selinux"
IMAGE_TYPE = "svirt_image_t"
"""The type of the images of a VM in the policies of Fedora, RHEL and Debian."""
WANTED = ("read", "write", "getattr", "lock")
"""What QEMU does with a target that it was handed over."""
UNTOLD = frozenset({errno.ENOENT, errno.ESRCH, errno.EINVAL, errno.EACCES, errno.EPERM})
"""Why nobody tells a label: there is no such process, no module that labels one, or one that forbids the question."""
NO_LABELS = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
"""What is said of a file that has no label of its own."""
IS_PERMISSIVE = 1
"""The flag of an answer of SELinux about a process whose domain is permissive."""
APPARMOR = re.compile(r"(?P<profile>.+) \((?P<mode>[a-z]+)\)")
SELINUX = re.compile(r"(?P<user>[^\s:]+):[^\s:]+:(?P<type>[^\s:]+)(:(?P<level>\S+))?")
REGULAR_EXPRESSION = re.compile(r"([][\\^$.|?*+(){}])")
RESIZED = frozenset({"vhdx", "parallels"})
"""Formats for which QEMU calls ftruncate: for that AppArmor wants a rule for the path, however the file was opened."""


@dataclass(frozen=True)
class Label:
    """What a security module calls a process; empty where there is no such module, or where it cannot be told."""

    text: str = ""

    @property
    def profile(self) -> str:
        """The profile of AppArmor that the process is in; empty where it is unconfined, and without AppArmor."""
        found = APPARMOR.fullmatch(self.text)
        return found["profile"] if found and found["mode"] != "unconfined" else ""

    @property
    def is_held(self) -> bool:
        """Whether AppArmor keeps the process to its profile."""
        return bool(self.profile) and not self.text.endswith(" (complain)")

    @property
    def context(self) -> str:
        """The context of SELinux; empty without SELinux."""
        return self.text if SELINUX.fullmatch(self.text) and not APPARMOR.fullmatch(self.text) else ""

    @property
    def type(self) -> str:
        """The type in a context of SELinux."""
        return _part(self.context, "type")

    @property
    def level(self) -> str:
        """The lowest level in a context of SELinux, with its categories; empty where the policy has none."""
        return _part(self.context, "level").partition("-")[0]


def _part(context: str, name: str) -> str:
    found = SELINUX.fullmatch(context)
    return (found[name] or "") if found else ""


def label_of(process: int | str = "self", root: str = "/") -> Label:
    """Return the label of a process. C(root) is where C(proc) is mounted."""
    try:
        with open(os.path.join(root, "proc", str(process), "attr/current"), "rb") as source:
            said = source.read()
    except OSError as error:
        if error.errno not in UNTOLD:
            raise
        return Label()
    return Label(os.fsdecode(said.rstrip(b"\0\n")))


def file_label(file: str | int) -> str:
    """Return the SELinux context of a file; empty where it has none."""
    try:
        return os.fsdecode(os.getxattr(file, ATTRIBUTE).rstrip(b"\0"))
    except OSError as error:
        if error.errno not in NO_LABELS:
            raise
        return ""


def set_file_label(path: str, label: str, fd: int | None = None) -> None:
    """Give a file an SELinux context."""
    with step(path, f"it was given the SELinux context {label}"):
        os.setxattr(path if fd is None else fd, ATTRIBUTE, os.fsencode(label) + b"\0")


@dataclass(frozen=True)
class Selinux:
    """SELinux as the kernel shows it below C(root)."""

    root: str = "/"

    @property
    def enforces(self) -> bool:
        """Whether it is on and refuses what its policy does not allow."""
        try:
            return self._read("enforce") == "1"
        except OSError as error:
            if error.errno not in UNTOLD:
                raise
            return False

    def allows(self, subject: str, target: str, kind: str, permissions: Iterable[str]) -> bool | None:
        """Return whether a context may do all this with a target of this class; None where nobody tells.

        What the policy does not know of is left to the kernel, as is what is not asked for.
        """
        try:
            number = self._read(f"class/{kind}/index")
            bits = [self._read(f"class/{kind}/perms/{name}") for name in permissions]
            answer = self._ask("access", f"{subject} {target} {number}").split()
        except OSError as error:
            # No context that the policy knows.
            if error.errno == errno.EINVAL:
                return False
            if error.errno not in UNTOLD:
                raise
            return None
        allowed, flags = int(answer[0], 16), int(answer[5])
        return bool(flags & IS_PERMISSIVE) or all(allowed >> (int(bit) - 1) & 1 for bit in bits)

    @property
    def image_context(self) -> str:
        """The context that the policy has for the images of VMs; empty where none is written down."""
        with contextlib.suppress(FileNotFoundError):
            found = re.search(r"^SELINUXTYPE=(\S+)", self._configured("config"), re.MULTILINE)
            name = found[1] if found else "targeted"
            return self._configured(f"{name}/contexts/virtual_image_context").split("\n")[0].strip()
        return ""

    def image_label(self, qemu: Label) -> str:
        """Return the label that libvirt gives the images of one VM: no other one may touch them."""
        found = SELINUX.fullmatch(self.image_context)
        user, kind = (found["user"], found["type"]) if found else (_part(qemu.context, "user"), IMAGE_TYPE)
        return ":".join(filter(None, (user, "object_r", kind, qemu.level)))

    def _configured(self, name: str) -> str:
        with open(os.path.join(self.root, "etc/selinux", name), encoding="utf-8", errors="replace") as source:
            return source.read()

    def _read(self, name: str) -> str:
        with open(os.path.join(self.root, "sys/fs/selinux", name), encoding="ascii") as source:
            return source.read().strip()

    def _ask(self, name: str, question: str) -> str:
        """Ask the kernel, which answers in the same open file."""
        fd = os.open(os.path.join(self.root, "sys/fs/selinux", name), os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, os.fsencode(question))
            return os.pread(fd, 4096, 0).decode("ascii")
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Admission:
    """Whether QEMU is given the files of one place.

    C(reason) says why not; empty where it is. C(before) is the SELinux context of such a file, and C(label) the one
    with which QEMU is given it all the same; empty where there is none that this process can set.
    """

    reason: str = ""
    before: str = ""
    label: str = ""

    def refusal(self, may_label: bool) -> str:
        """Return why QEMU cannot be given such a file; empty where it can, be it with another label, if that may be."""
        return "" if self.label and may_label else self.reason

    @property
    def former_label(self) -> str:
        """Return what a file that got C(label) is given back; empty where it keeps its own."""
        return self.before if self.label else ""


ADMITTED = Admission()


@dataclass(frozen=True)
class Sample:
    """An open file like those that QEMU is to be given. C(place) is the directory, or the device, that messages name.

    C(spare) says that nobody needs it: a label can be tried on it. C(kind) is its class in the words of SELinux.
    """

    fd: int
    place: str
    spare: bool = False
    kind: str = "file"


def admit(qemu: Label, sample: Sample, images: Collection[str] = (), root: str = "/") -> Admission:
    """Tell whether a QEMU with this label is given a file like C(sample) that this process has opened.

    C(images) are the labels of files that this QEMU has open.
    """
    own = label_of(root=root)
    if qemu.is_held and own.profile and own != qemu:
        return Admission(_other_opener(qemu, own))
    selinux = Selinux(root)
    if not qemu.context or not selinux.enforces:
        return ADMITTED
    if own.context and selinux.allows(qemu.context, own.context, "fd", ("use",)) is False:
        return Admission(_no_use(qemu, own))
    before = file_label(sample.fd)
    if not before or selinux.allows(qemu.context, before, sample.kind, WANTED) is not False:
        return ADMITTED
    label, why = _find_label(selinux, qemu, own, sample, before, images)
    reason = f"{_other_label(qemu, sample.place, before)}; {_remedy(selinux, sample.place, sample.kind, why)}"
    return Admission(reason, before, label)


def _find_label(
    selinux: Selinux, qemu: Label, own: Label, sample: Sample, before: str, images: Collection[str]
) -> tuple[str, OSError | None]:
    """Return a label that QEMU may write to, and that this process can set; else what the attempt has come to."""
    error = None
    for label in dict.fromkeys((selinux.image_label(qemu), *images)) if sample.kind == "file" else ():
        if not selinux.allows(qemu.context, label, sample.kind, WANTED):
            continue
        may_set = not own.context or selinux.allows(own.context, label, sample.kind, ("relabelto",)) is not False
        try:
            # To set the label that it has changes nothing, and still tells whether its file system keeps one.
            set_file_label(sample.place, label if sample.spare else before, sample.fd)
        except OSError as failed:
            error = error or failed
        else:
            if may_set or sample.spare:
                return label, None
    return "", error


def open_labels(process: int, files: Collection[str], root: str = "/") -> list[str]:
    """Return the labels of those files that a process has open: not by a path, through a file system that may hang."""
    directory = os.path.join(root, "proc", str(process), "fd")
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(directory):
            # It may have been closed meanwhile.
            with contextlib.suppress(OSError):
                path = os.path.join(directory, fd)
                if os.readlink(path) in files:
                    found.append(file_label(path))
    return list(filter(None, found))


def not_given(process: int | None, path: str, fd: int, place: str, root: str = "/") -> str:
    """Return why QEMU has not received a file that was handed over to it, and what to do about that."""
    qemu, own = label_of(process, root) if process else Label(), label_of(root=root)
    start = f"QEMU did not receive the open file {path}"
    if qemu.is_held and own.profile:
        return f"{start}: {_other_opener(qemu, own)}"
    if qemu.context:
        return f"{start}: {_other_label(qemu, path, file_label(fd))}; {_remedy(Selinux(root), place)}"
    return (
        f"{start}: QEMU has reached its limit of open files (Max open files in /proc/PID/limits), or a security module"
        " does not let it use files that this process has opened"
    )


def keeps_length(qemu: Label, image_format: str) -> str:
    """Return why QEMU must not be told to write an image of this format; empty where it may."""
    if not qemu.is_held or image_format not in RESIZED:
        return ""
    return (
        f"QEMU changes the length of a {image_format} image while it writes it, and AppArmor (profile {qemu.profile})"
        " does not let it do that with a file that it received open; use qcow2 or raw"
    )


def _other_opener(qemu: Label, own: Label) -> str:
    return (
        f"this process is confined by AppArmor profile {own.profile}; QEMU, which is confined by {qemu.profile}, could"
        " not use the files that it opens; run the backup unconfined"
    )


def _no_use(qemu: Label, own: Label) -> str:
    return (
        f"SELinux does not let QEMU ({qemu.context}) use what this process ({own.context}) has opened; a rule has to"
        " allow that: `setsebool -P domain_fd_use on` where the policy has it (RHEL, Fedora), else a module with"
        f" `(allow {qemu.type} {own.type} (fd (use)))`"
    )


def _other_label(qemu: Label, place: str, before: str) -> str:
    return f"SELinux does not let QEMU ({qemu.context}) write to what has the label {before}, as {place} has"


def _remedy(selinux: Selinux, place: str, kind: str = "file", why: OSError | None = None) -> str:
    """Return what an admin has to do once. C(why) is what has come of setting another label."""
    image = selinux.image_context or f"system_u:object_r:{IMAGE_TYPE}:s0"
    name = _part(image, "type")
    if kind != "file":
        return (
            f"devices are not labelled anew here; use an image file, or `chcon -t {name} {shlex.quote(place)}` before"
        )
    if why is not None and why.errno == errno.EOPNOTSUPP:
        return f'its file system has the label of its mount only; mount it with `context="{image}"`'
    pattern = shlex.quote(REGULAR_EXPRESSION.sub(r"\\\1", place) + "(/.*)?")
    lines = f"`semanage fcontext -a -t {name} {pattern}`, then `restorecon -R {shlex.quote(place)}`"
    return f"as root, once: {lines}"

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Confined QEMU: labels that are read, what is asked of SELinux, and what is said. `make confined` has real kernels.

A root directory stands for the kernel's files. What the kernel answers to a question is in a table here.
"""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._host import confinement
from ansible_collections.vmfleet.backup.plugins.module_utils._host.confinement import (
    ADMITTED,
    ATTRIBUTE,
    Admission,
    Label,
    Sample,
    Selinux,
    admit,
    file_label,
    keeps_length,
    label_of,
    not_given,
    open_labels,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QEMU = "system_u:system_r:svirt_t:s0:c1,c2"
OURS = "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023"
OWN_IMAGE = "system_u:object_r:svirt_image_t:s0:c1,c2"
VAR = "system_u:object_r:var_t:s0"
NFS = "system_u:object_r:nfs_t:s0"
PROFILE = "libvirt-4b1e3cde-4a29-4f1c-9a55-6b6f1b7c2d10"
LINES = "`semanage fcontext -a -t svirt_image_t '/srv/backup(/.*)?'`, then `restorecon -R /srv/backup`"
PID = 7

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="labels are given by root")


class Machine:
    """What a kernel shows below `root`. `allowed` are the permissions of a context on another, `permissive` contexts
    that are never refused, `cannot` is what setting a label fails with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.allowed: dict[tuple[str, str, str], set[str]] = {}
        self.permissive: set[str] = set()
        self.cannot: dict[str, int] = {}

    def process(self, process: int | str, label: bytes) -> None:
        place = self.root / "proc" / str(process) / "attr"
        place.mkdir(parents=True)
        (place / "current").write_bytes(label)

    def selinux(self, enforce: str = "1") -> None:
        place = self.root / "sys/fs/selinux"
        place.mkdir(parents=True)
        (place / "enforce").write_text(enforce)
        names = {
            "file": ["ioctl", "read", "write", "getattr", "lock", "relabelto"],
            "blk_file": ["read"],
            "fd": ["use"],
        }
        for number, (kind, permissions) in enumerate(names.items(), 1):
            (place / "class" / kind / "perms").mkdir(parents=True)
            (place / "class" / kind / "index").write_text(str(number))
            for bit, permission in enumerate(permissions, 1):
                (place / "class" / kind / "perms" / permission).write_text(str(bit))
        for permission in confinement.WANTED[1:]:
            (place / "class/blk_file/perms" / permission).write_text("2")

    def answer(self, question: str) -> str:
        self.asked.append(question)
        subject, target, number = question.split()
        kind = ("file", "blk_file", "fd")[int(number) - 1]
        if "invalid" in target:
            raise OSError(errno.EINVAL, "Invalid argument")
        mask = 0
        for permission in self.allowed.get((subject, target, kind), ()):
            path = self.root / "sys/fs/selinux/class" / kind / "perms" / permission
            mask |= 1 << (int(path.read_text()) - 1)
        return f"{mask:x} ffffffff 0 ffffffff 5 {int(subject in self.permissive):x}\n"

    def admit(self, label: str, *images: str, spare: bool = True, kind: str = "file") -> Admission:
        path = self.root / "sample"
        path.touch()
        os.setxattr(path, ATTRIBUTE, label.encode() + b"\0")
        with path.open("rb") as sample:
            found = Sample(sample.fileno(), "/srv/backup", spare, kind)
            return admit(label_of(PID, str(self.root)), found, images, str(self.root))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(Selinux, "_ask", lambda _self, _name, question: made.answer(question))
    really = confinement.set_file_label

    def set_file_label(path: str, label: str, fd: int | None = None) -> None:
        kind = label.split(":")[2]
        if kind in made.cannot:
            raise OSError(made.cannot[kind], os.strerror(made.cannot[kind]))
        really(path, label, fd)

    monkeypatch.setattr(confinement, "set_file_label", set_file_label)
    return made


@pytest.fixture
def enforcing(machine: Machine) -> Machine:
    """A host with Fedora's policy as far as it was measured: QEMU may write to its own images, and to NFS."""
    machine.process(PID, QEMU.encode() + b"\0")
    machine.process("self", OURS.encode() + b"\0")
    machine.selinux()
    for label in (OWN_IMAGE, NFS):
        machine.allowed[QEMU, label, "file"] = {"read", "write", "getattr", "lock"}
    # The first file of the pair that is handed over is received, the second one is not.
    machine.allowed[QEMU, VAR, "file"] = {"read", "getattr", "lock"}
    machine.allowed[QEMU, OURS, "fd"] = {"use"}
    machine.allowed[OURS, OWN_IMAGE, "file"] = {"relabelto"}
    return machine


class TestLabel:
    @pytest.mark.parametrize(
        ("text", "profile", "held", "context"),
        [
            ("", "", False, ""),
            ("unconfined", "", False, ""),
            (f"{PROFILE} (enforce)", PROFILE, True, ""),
            ("backupper (complain)", "backupper", False, ""),
            ("firefox (unconfined)", "", False, ""),
            (":lxd:/usr/bin/x y (enforce)", ":lxd:/usr/bin/x y", True, ""),
            ("libvirt//&:ns://unconfined (mixed)", "libvirt//&:ns://unconfined", True, ""),
            (QEMU, "", False, QEMU),
            ("system_u:system_r:svirt_t", "", False, "system_u:system_r:svirt_t"),
            ("_", "", False, ""),
        ],
    )
    def test_module_that_gives_it(self, text: str, profile: str, held: bool, context: str) -> None:
        label = Label(text)
        assert (label.profile, label.is_held, label.context) == (profile, held, context)

    @pytest.mark.parametrize(("text", "level"), [(QEMU, "s0:c1,c2"), (OURS, "s0"), ("a:b:c", ""), ("unconfined", "")])
    def test_lowest_level(self, text: str, level: str) -> None:
        assert Label(text).level == level

    @pytest.mark.parametrize("said", [QEMU.encode() + b"\0", QEMU.encode() + b"\n", QEMU.encode()])
    def test_is_read_without_its_end(self, machine: Machine, said: bytes) -> None:
        machine.process(PID, said)
        assert label_of(PID, str(machine.root)) == Label(QEMU)

    def test_unknown_process(self, machine: Machine) -> None:
        assert label_of(PID, str(machine.root)) == Label()

    def test_question_that_is_forbidden(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_arguments: object, **_options: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        assert label_of(root=str(machine.root)) == Label()

    def test_another_error_is_told(self, machine: Machine) -> None:
        (machine.root / "proc/7/attr/current").mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            label_of(PID, str(machine.root))

    def test_this_very_process(self) -> None:
        """Whatever this machine has."""
        label = label_of()
        assert label == label_of(os.getpid())
        assert not (label.profile and label.context)


@as_root
class TestFileLabel:
    def test_ends_without_a_zero(self, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.touch()
        assert file_label(str(path)) == ""
        confinement.set_file_label(str(path), OWN_IMAGE)
        assert os.getxattr(path, ATTRIBUTE) == OWN_IMAGE.encode() + b"\0"
        assert file_label(str(path)) == OWN_IMAGE

    def test_error_says_what_was_done(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"while it was given the SELinux context") as error:
            confinement.set_file_label(str(tmp_path / "x"), VAR)
        assert error.value.filename == str(tmp_path / "x")

    def test_of_the_files_that_a_process_has_open(self, tmp_path: Path) -> None:
        wanted, other = tmp_path / "wanted", tmp_path / "other"
        for path, label in ((wanted, OWN_IMAGE), (other, VAR)):
            path.touch()
            confinement.set_file_label(str(path), label)
        with wanted.open(), other.open():
            assert open_labels(os.getpid(), {str(wanted)}) == [OWN_IMAGE]
        assert open_labels(os.getpid(), {str(wanted)}) == []

    def test_of_a_process_that_has_ended(self) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        assert open_labels(ended.pid, {"/x"}) == []


class TestAppArmor:
    @pytest.mark.parametrize("ours", ["unconfined", "python (unconfined)", f"{PROFILE} (enforce)", ""])
    def test_says_nothing(self, machine: Machine, tmp_path: Path, ours: str) -> None:
        machine.process(PID, f"{PROFILE} (enforce)\n".encode())
        machine.process("self", ours.encode())
        with (tmp_path / "x").open("w") as sample:
            found = admit(label_of(PID, str(tmp_path)), Sample(sample.fileno(), "/srv"), root=str(tmp_path))
        assert found == ADMITTED

    @pytest.mark.parametrize("qemu", ["unconfined", f"{PROFILE} (complain)", ""])
    def test_qemu_that_is_not_held(self, machine: Machine, tmp_path: Path, qemu: str) -> None:
        machine.process(PID, qemu.encode())
        machine.process("self", b"backupper (enforce)\n")
        with (tmp_path / "x").open("w") as sample:
            found = admit(label_of(PID, str(tmp_path)), Sample(sample.fileno(), "/srv"), root=str(tmp_path))
        assert found == ADMITTED

    @pytest.mark.parametrize("mode", ["enforce", "complain"])
    def test_confined_opener(self, machine: Machine, tmp_path: Path, mode: str) -> None:
        machine.process(PID, f"{PROFILE} (enforce)\n".encode())
        machine.process("self", f"backupper ({mode})\n".encode())
        with (tmp_path / "x").open("w") as sample:
            found = admit(label_of(PID, str(tmp_path)), Sample(sample.fileno(), "/srv"), root=str(tmp_path))
        assert found.reason == (
            f"this process is confined by AppArmor profile backupper; QEMU, which is confined by {PROFILE}, could not"
            " use the files that it opens; run the backup unconfined"
        )
        assert not found.label

    @pytest.mark.parametrize(
        ("label", "image_format", "refused"),
        [
            (f"{PROFILE} (enforce)", "vhdx", True),
            (f"{PROFILE} (enforce)", "parallels", True),
            (f"{PROFILE} (enforce)", "qcow2", False),
            (f"{PROFILE} (complain)", "vhdx", False),
            ("unconfined", "vhdx", False),
            (QEMU, "vhdx", False),
        ],
    )
    def test_formats_whose_length_changes(self, label: str, image_format: str, refused: bool) -> None:
        found = keeps_length(Label(label), image_format)
        assert bool(found) == refused
        assert not refused or (PROFILE in found and image_format in found)


@as_root
class TestSelinux:
    def test_says_nothing_where_qemu_may_write(self, enforcing: Machine) -> None:
        assert enforcing.admit(OWN_IMAGE) == ADMITTED
        assert enforcing.admit(NFS) == ADMITTED
        assert enforcing.asked == [f"{QEMU} {OURS} 3", f"{QEMU} {OWN_IMAGE} 1", f"{QEMU} {OURS} 3", f"{QEMU} {NFS} 1"]

    @pytest.mark.parametrize("missing", ["read", "write", "getattr", "lock"])
    def test_all_that_qemu_does_is_asked_for(self, enforcing: Machine, missing: str) -> None:
        enforcing.allowed[QEMU, NFS, "file"].remove(missing)
        assert enforcing.admit(NFS).reason

    @pytest.mark.parametrize("enforce", ["0", None])
    def test_says_nothing_where_nothing_is_enforced(self, machine: Machine, enforce: str | None) -> None:
        machine.process(PID, QEMU.encode())
        machine.process("self", OURS.encode())
        if enforce:
            machine.selinux(enforce)
        assert machine.admit(VAR) == ADMITTED
        assert not machine.asked

    def test_says_nothing_of_a_permissive_domain(self, enforcing: Machine) -> None:
        enforcing.permissive.add(QEMU)
        assert enforcing.admit(VAR) == ADMITTED

    def test_says_nothing_where_the_kernel_does_not_answer(
        self, enforcing: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_arguments: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Selinux, "_ask", refuse)
        assert enforcing.admit(VAR) == ADMITTED

    def test_own_label_of_the_vm(self, enforcing: Machine) -> None:
        found = enforcing.admit(VAR)
        assert (found.before, found.label) == (VAR, OWN_IMAGE)
        assert found.reason == (
            f"SELinux does not let QEMU ({QEMU}) write to what has the label {VAR}, as /srv/backup has; as root, once:"
            f" {LINES}"
        )

    def test_label_is_tried_on_a_file_that_nobody_needs(self, enforcing: Machine) -> None:
        enforcing.admit(VAR)
        assert file_label(str(enforcing.root / "sample")) == OWN_IMAGE
        enforcing.admit(VAR, spare=False)
        assert file_label(str(enforcing.root / "sample")) == VAR

    def test_type_of_images_is_the_policys(self, enforcing: Machine) -> None:
        contexts = enforcing.root / "etc/selinux/default/contexts"
        contexts.mkdir(parents=True)
        (contexts.parents[1] / "config").write_text("# a comment\nSELINUX=enforcing\nSELINUXTYPE=default\n")
        (contexts / "virtual_image_context").write_text("sys_u:object_r:our_image_t:s0\nsys_u:object_r:content_t:s0\n")
        label = "sys_u:object_r:our_image_t:s0:c1,c2"
        enforcing.allowed[QEMU, label, "file"] = set(confinement.WANTED)
        assert enforcing.admit(VAR).label == label
        assert "fcontext -a -t our_image_t" in enforcing.admit(VAR).reason

    def test_label_of_an_image_that_qemu_has_open(self, enforcing: Machine) -> None:
        del enforcing.allowed[QEMU, OWN_IMAGE, "file"]
        mine = "system_u:object_r:mine_t:s0:c1,c2"
        enforcing.allowed[QEMU, mine, "file"] = set(confinement.WANTED)
        assert enforcing.admit(VAR, "system_u:object_r:invalid_t:s0", mine).label == mine

    def test_label_that_cannot_be_set(self, enforcing: Machine) -> None:
        enforcing.cannot["svirt_image_t"] = errno.EACCES
        found = enforcing.admit(VAR)
        assert not found.label
        assert LINES in found.reason

    def test_label_that_must_not_be_set_on_a_file_in_use(self, enforcing: Machine) -> None:
        del enforcing.allowed[OURS, OWN_IMAGE, "file"]
        found = enforcing.admit(VAR, spare=False)
        assert not found.label
        assert LINES in found.reason

    def test_file_system_with_the_label_of_its_mount(self, enforcing: Machine) -> None:
        enforcing.cannot["svirt_image_t"] = errno.EOPNOTSUPP
        found = enforcing.admit(VAR)
        assert not found.label
        assert found.reason.endswith('mount it with `context="system_u:object_r:svirt_image_t:s0"`')

    def test_device_keeps_its_label(self, enforcing: Machine) -> None:
        enforcing.allowed[QEMU, OWN_IMAGE, "blk_file"] = set(confinement.WANTED)
        found = enforcing.admit(VAR, OWN_IMAGE, kind="blk_file")
        assert not found.label
        assert "chcon -t svirt_image_t /srv/backup" in found.reason
        assert file_label(str(enforcing.root / "sample")) == VAR

    def test_descriptors_of_ours_must_not_be_used(self, enforcing: Machine) -> None:
        del enforcing.allowed[QEMU, OURS, "fd"]
        found = enforcing.admit(OWN_IMAGE)
        assert not found.label
        assert "`setsebool -P domain_fd_use on`" in found.reason
        assert "(allow svirt_t unconfined_t (fd (use)))" in found.reason

    def test_context_that_the_policy_does_not_know(self, enforcing: Machine) -> None:
        assert enforcing.admit("system_u:object_r:invalid_t:s0").label == OWN_IMAGE


def test_pattern_of_an_odd_path() -> None:
    found = confinement._remedy(Selinux(), "/srv/it's (b.kup)")
    assert r"""'/srv/it'"'"'s \(b\.kup\)(/.*)?'""" in found
    assert found.endswith("""restorecon -R '/srv/it'"'"'s (b.kup)'`""")


def test_question_is_asked_in_one_open_file(tmp_path: Path) -> None:
    """As the kernel wants it; a file gives back what was written."""
    (tmp_path / "sys/fs/selinux").mkdir(parents=True)
    (tmp_path / "sys/fs/selinux/access").touch()
    assert Selinux(str(tmp_path))._ask("access", "a b 1") == "a b 1"


class TestNotGiven:
    @pytest.fixture(autouse=True)
    def _image(self, tmp_path: Path) -> Iterator[None]:
        with (tmp_path / "image").open("w") as image:
            self.fd = image.fileno()
            yield

    def said(self, machine: Machine, process: int | None = PID) -> str:
        return not_given(process, "/srv/backup/web01/x.qcow2", self.fd, "/srv/backup", str(machine.root))

    def test_confined_opener(self, machine: Machine) -> None:
        machine.process(PID, f"{PROFILE} (enforce)".encode())
        machine.process("self", b"backupper (enforce)")
        found = self.said(machine)
        assert found.startswith("QEMU did not receive the open file /srv/backup/web01/x.qcow2: ")
        assert all(part in found for part in ("profile backupper", PROFILE, "run the backup unconfined"))

    @as_root
    def test_label(self, machine: Machine) -> None:
        machine.process(PID, QEMU.encode())
        os.setxattr(self.fd, ATTRIBUTE, VAR.encode())
        found = self.said(machine)
        assert all(part in found for part in (QEMU, VAR, LINES))

    @pytest.mark.parametrize("process", [PID, None])
    def test_no_module(self, machine: Machine, process: int | None) -> None:
        assert "Max open files" in self.said(machine, process)

# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tell whether QEMU can make images in a repository: one that is confined is asked for on a file that does not stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .._host.confinement import ADMITTED, Admission, Sample, admit, label_of, open_labels
from .._host.directory import Directory
from .._host.files import nearest_directory, scratch
from .._host.probe import PREFIX
from .._host.target_files import is_smb

if TYPE_CHECKING:
    from .._qemu.model import Vm
    from .._repository.repository import Repository
    from .model import Observation


def with_admission(seen: Observation, repository: Repository, name: str) -> Observation:
    """Add to an observation whether QEMU is given images that this process makes for the VM C(name)."""
    if seen.vm is None or seen.vm.process is None:
        # Over TCP nothing is handed over, and nobody knows who opens it.
        return seen
    return replace(seen, admission=_admission(seen.vm, seen.vm.process.pid, repository, name))


def _admission(vm: Vm, process: int, repository: Repository, name: str) -> Admission:
    qemu = label_of(process)
    try:
        with _nearest(repository, name) as directory:
            if is_smb(directory.fd):
                return Admission(
                    f"{repository.path} is on SMB: an SMB server does not rename the directory of a set while QEMU has"
                    " its images open; use a local disk, NFS or CephFS, and copy the sets to SMB from there"
                )
        if not (qemu.is_held or qemu.context):
            return ADMITTED
        with _nearest(repository, name) as directory, scratch(f"/proc/self/fd/{directory.fd}", PREFIX) as fd:
            # The directory in which a set grows, and the images in it, get the label that this has got.
            sample = Sample(fd, repository.path, spare=True)
            return admit(qemu, sample, open_labels(process, vm.files) if qemu.context else ())
    except OSError:
        # Nothing can be made there now. Whoever needs to make something tells that, and why.
        return ADMITTED


def _nearest(repository: Repository, name: str) -> Directory:
    """Open the directory of a VM; where there is none yet, the one in which it is going to be made."""
    try:
        return repository.opened(name)
    except FileNotFoundError:
        return Directory.at(nearest_directory(repository.path))

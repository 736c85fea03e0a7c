# Copyright (c) 2026, vmfleet contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Say what C(vm.json) of a set holds, and read it: it tells how the VM was built."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from .._common.fields import Fields, Flag, Maybe, Names, OneOf, Several, Text, Time, Whole, check_schema, load
from .documents import LARGE
from .repository import DESCRIPTION

if TYPE_CHECKING:
    from typing import Any

    from .documents import Manifest
    from .repository import Repository


LONG_ARGUMENT = 1 << 18
"""Characters: the kernel takes arguments of 128 KiB (execve(2)), and secrets leave something longer behind."""
ARGUMENTS = 1 << 16
LONG_XML = 1 << 19
"""Characters of the XML of a domain: no more than half of it is written."""
DISK = Fields(
    needed=False,
    name=Text(),
    node=Text(),
    qdev=Text(),
    device=Text(),
    driver=Text(),
    file=Text(),
    backing_file=Text(),
    layers=Several(Text(), plain=True),
    virtual_size=Whole(),
    read_only=Flag(),
    removable=Flag(),
)
VM = Fields(
    # What is missing is unknown: one who builds a VM again may leave out what does not matter.
    needed=False,
    collection=Text(),
    taken=Time(),
    name=Text(),
    uuid=Text(),
    qemu=Text(),
    machine=Maybe(Text()),
    accelerator=Maybe(OneOf("kvm")),
    memory=Maybe(Whole()),
    cpus=Fields(needed=False, count=Whole(), type=Maybe(Text())),
    firmware=Fields(needed=False, bios=Maybe(Text()), flash=Several(Text(), plain=True)),
    command_line=Maybe(Several(Text(most=LONG_ARGUMENT), most=ARGUMENTS, plain=True)),
    disks=Several(DISK, plain=True),
    devices=Several(Fields(needed=False, id=Text(), type=Text()), plain=True),
    chardevs=Several(Fields(needed=False, label=Text(), filename=Text()), plain=True),
    domain=Maybe(
        Fields(
            needed=False,
            uri=Text(),
            xml=Text(most=LONG_XML),
            snapshots=Several(Text(), plain=True),
            checkpoints=Several(Text(), plain=True),
        )
    ),
    tpm=Maybe(Fields(needed=False, model=Text(), backend=Text(), directory=Text(), state=Names())),
    removed=Several(Text(), plain=True),
    schema=Whole(1),
)


def parse_description(content: bytes) -> dict[str, Any]:
    """Return what C(vm.json) says, without what a later release has added. DocumentError where it is none."""
    found = load(content)
    check_schema(found)
    return VM.read(found)


def read_description(repository: Repository, manifest: Manifest) -> dict[str, Any]:
    """Return what C(vm.json) of a set says. OSError, ValueError or WrongEntry where it cannot be read."""
    return parse_description(_content(repository, manifest))


def is_as_written(repository: Repository, manifest: Manifest) -> bool:
    """Return whether C(vm.json) has the SHA-256 that its manifest says, if any. OSError, WrongEntry as above."""
    wanted = manifest.description_sha256
    return wanted is None or hashlib.sha256(_content(repository, manifest)).hexdigest() == wanted


def _content(repository: Repository, manifest: Manifest) -> bytes:
    with repository.opened(manifest.vm.name, manifest.id) as place:
        return place.read(DESCRIPTION, LARGE)

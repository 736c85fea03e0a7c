# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a disk of a domain that is off builds on: by the definition, and by the headers of its images."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu import domain_files
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import DomainDisk, DomainXml, Source
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, disk, vm

if TYPE_CHECKING:
    from pathlib import Path

TOP, BASE = "/images/top.qcow2", "/images/base.qcow2"


def file(path: str = BASE, image_format: str = "qcow2", kind: str = "file") -> Source:
    return Source(kind, path, image_format)


def check(below: str, chain: tuple[Source, ...], ends: bool = False, driver: str = "qcow2") -> None:
    """Compare what a definition names with the image that a header names, if it names one."""
    layers = (disk("", "base", filename=below, driver=driver),) if below else ()
    top = disk("vda", "top", filename=TOP, layers=tuple(layer.node for layer in layers))
    defined = DomainDisk("vda", source=file(TOP), chain=chain, ends=ends)
    found = vm(top, other_nodes=layers)
    asyncio.run(domain_files._check_chain(top, found, DomainXml("web", UUID, disks=(defined,))))


@pytest.mark.parametrize(
    ("below", "chain", "ends"),
    [
        pytest.param("", (), False, id="nothing, and nothing said"),
        pytest.param("", (), True, id="nothing, as is said"),
        pytest.param(BASE, (), False, id="a base, and nothing said"),
        pytest.param(BASE, (file(),), False, id="the same one"),
        pytest.param(BASE, (file(),), True, id="the same one, and nothing below"),
        pytest.param(BASE, (file(image_format=""),), True, id="the same one, of whatever format"),
        pytest.param("nbd://far/base", (file("nbd:base", kind="network"),), True, id="far away, both of them"),
    ],
)
def test_the_same(below: str, chain: tuple[Source, ...], ends: bool) -> None:
    check(below, chain, ends)


@pytest.mark.parametrize(
    ("below", "chain", "ends"),
    [
        pytest.param(BASE, (), True, id="nothing is said to be there"),
        pytest.param("", (file(),), True, id="a base is said to be there"),
        pytest.param(BASE, (file("/images/other.qcow2"),), False, id="another one"),
        pytest.param(BASE, (file(image_format="raw"),), False, id="another format"),
        pytest.param(BASE, (file(), file("/images/more.qcow2")), False, id="one more"),
        pytest.param(BASE, (file("nbd:base", kind="network"),), True, id="one that is far away"),
        pytest.param(BASE, (file("pool/base", kind="volume"),), True, id="a volume, which may be any"),
        pytest.param("", (file("nbd:base", kind="network"),), True, id="one that is far away, for none"),
    ],
)
def test_another_disk(below: str, chain: tuple[Source, ...], ends: bool) -> None:
    with pytest.raises(BackupError, match="disk vda: the definition of the domain says that /images/"):
        check(below, chain, ends)


def test_a_link_is_the_same(tmp_path: Path) -> None:
    image, link = tmp_path / "base.qcow2", tmp_path / "link"
    image.touch()
    link.symlink_to(image)
    check(str(image), (file(str(link)),), ends=True)

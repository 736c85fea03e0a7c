# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a domain says of its own backup is read as it is meant, or refused with its element."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.domain_policy import (
    DomainPolicy,
    apply_policy,
    read_policy,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Quiesce, Request
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import FoundBy
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import POLICY, Note, parse_domain
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID

GENERAL = Request("", "libvirt:web01", exclude_disks=("scratch",), wanted=Level.AUTO, found_by=FoundBy.DOMAIN)


def notes(metadata: str) -> tuple[Note, ...]:
    """What is read of these metadata."""
    uri = f"xmlns:b='{POLICY}'"
    xml = f"<domain><name>web01</name><uuid>{UUID}</uuid><metadata {uri}>{metadata}</metadata></domain>"
    return parse_domain(xml).policies


@pytest.mark.parametrize(
    ("metadata", "policy"),
    [
        ("", DomainPolicy()),
        ("<b:backup/>", DomainPolicy()),
        ("<b:backup level='full' quiesce='require'/>", DomainPolicy(Level.FULL, Quiesce.REQUIRE)),
        ("<b:backup skip='yes'/>", DomainPolicy(skip=True)),
        ("<b:backup skip='no'/>", DomainPolicy()),
        (
            "<b:backup level='differential'><b:exclude disk='vdb'/> <b:exclude disk='vdc'/></b:backup>",
            DomainPolicy(Level.DIFFERENTIAL, exclude_disks=("vdb", "vdc")),
        ),
    ],
)
def test_what_is_meant(metadata: str, policy: DomainPolicy) -> None:
    assert read_policy(notes(metadata)) == policy


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("<b:backup level='ful'/>", "<backup level='ful'>: level is one of: auto, full, incremental, differential"),
        ("<b:backup quiesce='yes'/>", "<backup quiesce='yes'>: quiesce is one of: none, try, require"),
        ("<b:backup skip='true'/>", "<backup skip='true'>: skip is one of: yes, no"),
        ("<b:backup levle='full'/>", "<backup> has an attribute 'levle', which is unknown; it may have: level, quie"),
        ("<b:backup>full</b:backup>", "<backup> has a text, 'full', which nobody reads"),
        (
            "<b:backup><b:include disk='vdb'/></b:backup>",
            "an element <include>, which is unknown; it may have: <ex",
        ),
        ("<b:backup><b:exclude/></b:backup>", "<exclude> names no disk; write <exclude disk='vdb'/>"),
        ("<b:backup><b:exclude disk=''/></b:backup>", "<exclude> names no disk"),
        ("<b:backup><b:exclude>vdb</b:exclude></b:backup>", "<exclude> has a text, 'vdb', which nobody reads"),
        ("<b:backup><b:exclude disk='vdb' dev='x'/></b:backup>", "<exclude> has an attribute 'dev', which is unknown"),
        ("<b:backup/><b:backup/>", "has 2 elements <backup>; leave one"),
    ],
)
def test_what_cannot_be_meant(metadata: str, reason: str) -> None:
    with pytest.raises(BackupError, match=r"the domain's metadata on its backup: .* with `virsh metadata`") as refusal:
        read_policy(notes(metadata))
    assert reason in str(refusal.value)


def test_the_domain_stands_above_what_is_general() -> None:
    policy = DomainPolicy(Level.FULL, Quiesce.TRY, ("vdb",))
    found = apply_policy(GENERAL, policy)
    assert (found.wanted, found.quiesce, found.exclude_disks, found.skip) == (Level.FULL, Quiesce.TRY, ("vdb",), False)
    # Where it says nothing, what is general stands.
    assert apply_policy(GENERAL, DomainPolicy()) == GENERAL


def test_the_inventory_stands_above_the_domain() -> None:
    listed = replace(GENERAL, found_by=FoundBy.LISTED, given=frozenset({"wanted"}))
    policy = DomainPolicy(Level.FULL, Quiesce.TRY, ("vdb",), skip=True)
    found = apply_policy(listed, policy)
    assert (found.wanted, found.quiesce, found.exclude_disks) == (Level.AUTO, Quiesce.TRY, ("vdb",))
    # To list a VM is to ask for it.
    assert not found.skip
    assert apply_policy(GENERAL, policy).skip

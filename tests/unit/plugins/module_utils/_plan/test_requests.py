# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is asked of each VM, and what becomes of one that is reached in several ways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.errors import BackupError
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.model import Observation, Quiesce, Request, VmPlan
from ansible_collections.vmfleet.backup.plugins.module_utils._plan.requests import (
    reached_once,
    requests_for,
    with_policy,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.address import Address, FoundBy
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.discovery import Discovery
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_disks import Domain
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_list import DomainEntry
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.domain_xml import DomainXml, Note
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import Level
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID
from ansible_collections.vmfleet.backup.tests.unit.plugins.today import start, vm

URI = "qemu:///system"
WEB = Address(domain="web", uri=URI)


def test_a_request_for_each_monitor() -> None:
    listed = [Request("shop", "/run/a.qmp", quiesce=Quiesce.TRY), Request("", "/run/a.qmp")]
    general = Request("", "", wanted=Level.FULL, libvirt_uri=URI)
    found = Discovery(
        {listed[0].address: FoundBy.LISTED, WEB: FoundBy.DOMAIN, Address(path="/run/b.qmp"): FoundBy.SOCKET}
    )
    assert requests_for(listed, general, found) == [
        # Two that are listed are a mistake that is told.
        replace(listed[0], monitor="unix:/run/a.qmp"),
        replace(listed[1], monitor="unix:/run/a.qmp"),
        replace(general, monitor="libvirt:web", found_by=FoundBy.DOMAIN),
        replace(general, monitor="unix:/run/b.qmp", libvirt_uri="", found_by=FoundBy.SOCKET),
    ]


def test_a_domain_says_how_it_is_backed_up() -> None:
    request = Request("", "libvirt:web", libvirt_uri=URI, found_by=FoundBy.DOMAIN)

    def said(*policies: Note, error: str = "") -> Request:
        known = Discovery(domains={WEB: DomainEntry("web", "", policies, error)})
        return with_policy(request, known, Observation())

    assert with_policy(request, Discovery(), Observation()) == said() == request
    assert said(Note("backup", (("level", "full"),))).wanted == Level.FULL
    with pytest.raises(BackupError, match="the XML of the domain makes no sense"):
        said(error="the XML of the domain makes no sense: it")


def test_what_a_domain_says_has_to_be_known() -> None:
    request, silent = Request("", "libvirt:web", libvirt_uri=URI), Discovery(failure="libvirt hangs")
    # One that does not answer, either, tells why by itself.
    assert with_policy(request, silent, Observation(error="it hangs")) == request
    seen = Observation(vm(domain=Domain(DomainXml("web", UUID))))
    with pytest.raises(BackupError, match="what the domain says of its backup is not known: libvirt hangs"):
        with_policy(request, silent, seen)


LISTED = (Request("", "unix:/run/web.qmp"), replace(start("web"), monitor="unix:/run/web.qmp", identity=UUID))
DOMAIN = (
    Request("", "libvirt:web", found_by=FoundBy.DOMAIN),
    replace(start("web"), monitor="libvirt:web", identity=UUID),
)
SOCKET = (
    Request("", "unix:/run/s.qmp", found_by=FoundBy.SOCKET),
    replace(start("web"), monitor="unix:/run/s.qmp", identity=UUID),
)
SAME = {"unix:/run/web.qmp": (7, 1), "libvirt:web": (7, 1), "unix:/run/s.qmp": (7, 1)}


def once(*pairs: tuple[Request, VmPlan], processes: dict[str, tuple[int, ...]] | None = None) -> list[str]:
    """The monitors that are left."""
    requests, plans = zip(*pairs, strict=True)
    return [plan.monitor for plan in reached_once(requests, plans, processes or {})]


def test_the_best_way_is_left() -> None:
    assert once(LISTED, DOMAIN, SOCKET, processes=SAME) == ["unix:/run/web.qmp"]
    assert once(SOCKET, DOMAIN, processes=SAME) == ["libvirt:web"]
    # By name, where a process is not known: one that is off, or does not answer.
    assert once(DOMAIN, SOCKET) == ["libvirt:web"]
    silent = (SOCKET[0], replace(SOCKET[1], identity="", action="fail"))
    assert once(DOMAIN, silent) == ["libvirt:web"]
    renamed = (SOCKET[0], replace(SOCKET[1], name="s"))
    assert once(DOMAIN, renamed, processes=SAME) == ["libvirt:web"]


def test_others_are_left_alone() -> None:
    """Those are refused as twins, or are VMs of their own."""
    assert len(once(DOMAIN, SOCKET, processes={**SAME, "unix:/run/s.qmp": (8, 1)})) == 2
    assert len(once(DOMAIN, (SOCKET[0], replace(SOCKET[1], identity="other")))) == 2
    assert len(once(DOMAIN, (SOCKET[0], replace(SOCKET[1], name="db", identity="")))) == 2
    assert len(once(LISTED, LISTED, processes=SAME)) == 2

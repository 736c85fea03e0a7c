# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM whose name would steer a terminal, or look like another line, is backed up, and shown in characters."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable
from ansible_collections.vmfleet.backup.tests.harness.images import identical
from ansible_collections.vmfleet.backup.tests.harness.modules import fail, succeed
from ansible_collections.vmfleet.backup.tests.harness.sets import ID, Sets

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

pytestmark = pytest.mark.usefixtures("clean")

NAME = "web\x1b[2J\n01: good\x07\u202e<b>\u2028"


@pytest.fixture
def odd(vms: Vms) -> Qemu:
    """A VM that QEMU itself knows by this name."""
    # The harness makes a file name of a VM's name.
    return vms.start(vms.disk(0, size=8 << 20), extra=["-name", NAME])


def assert_shown(found: t.Any) -> None:
    """No text has a character that cannot be seen; lines of a text are its own."""
    if isinstance(found, str):
        assert printable(found) == found
    for one in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        assert_shown(one)


def test_from_the_plan_to_the_page(odd: Qemu, sets: Sets, directory: Path) -> None:
    assert odd.qmp.execute("query-name") == {"name": NAME}
    planned = sets.plan(odd)
    assert planned["plan"]["vms"][0]["name"] == NAME
    assert_shown(planned["text"])
    assert any(printable(NAME) in line for line in planned["text"])
    made = sets.back_up(odd)
    assert made["vms"][0]["name"] == NAME
    assert_shown([made["text"], made["headline"].split("\n")])
    info = succeed("backup_info", {"repository": str(sets.path)})
    assert info["vms"][0]["name"] == NAME
    (directory / "metrics").mkdir()
    given = {"repository": str(sets.path), "id": ID, "results": made["vms"], "directory": str(directory / "metrics")}
    told = succeed("backup_metrics", given)
    [metrics] = (directory / "metrics").iterdir()
    assert_shown(metrics.read_text().split("\n"))
    hypervisors = {"hv1": told["hypervisor"]}
    report = succeed("backup_report", {"directory": str(directory / "reports"), "id": ID, "hypervisors": hypervisors})
    with open(report["page"], encoding="utf-8") as page:
        html = page.read()
    assert "<b>\u2028" not in html
    assert_shown(html.split("\n"))
    assert printable(NAME).replace("<b>", "&lt;b&gt;") in html
    with open(report["data"], encoding="utf-8") as data:
        assert json.load(data)["hypervisors"][0]["vms"][0]["name"] == NAME


def test_its_sets_are_found_by_its_name(odd: Qemu, sets: Sets, directory: Path) -> None:
    sets.back_up(odd)
    given = {"repository": str(sets.path)}
    chosen = {**given, "names": [NAME]}
    assert [one["id"] for one in succeed("backup_info", chosen)["sets"]] == [ID]
    [verified] = succeed("backup_verify", chosen)["results"]
    assert verified["vm"] == NAME
    copy = odd.freeze(odd.disks[0], directory / "frozen.qcow2")
    (directory / "restored").mkdir()
    succeed("backup_restore", {**given, "vm": NAME, "directory": str(directory / "restored")})
    assert identical(copy, directory / "restored" / "drive0.qcow2")
    assert [one["id"] for one in succeed("backup_prune", {**chosen, "keep_last": 1})["kept"]] == [ID]
    unknown = fail("backup_restore", {**given, "vm": f"{NAME}x", "directory": str(directory)})["msg"]
    assert unknown.startswith("vm: ")
    assert_shown(unknown)


def test_errors(odd: Qemu, sets: Sets, directory: Path) -> None:
    wanted = {"monitor": str(odd.monitor), "target": str(directory / "x.qcow2")}
    assert_shown(fail("drive_backup", {**wanted, "device": "gone\x1b[2J"})["msg"])
    sets.back_up(odd)
    refused = sets.plan(vms=[{"monitor": str(odd.monitor)}, {"monitor": f"unix:{odd.monitor}"}])
    assert_shown([refused["text"], [vm["reason"] for vm in refused["plan"]["vms"]]])
    assert "is called web\\x1b[2J\\n01" in refused["plan"]["vms"][0]["reason"]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The VMs of the last runs as an inventory, as Ansible's own programs see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import typing as t
from pathlib import Path

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness.images import MIB
from ansible_collections.vmfleet.backup.tests.harness.modules import ROOT
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor
from ansible_collections.vmfleet.backup.tests.harness.reports import a_vm, failed, report, told

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
    from ansible_collections.vmfleet.backup.tests.harness.qemu import Qemu

GUIDE = Path(__file__).parents[2] / "docs/docsite/rst/monitoring.rst"


def examples() -> tuple[dict[str, t.Any], str]:
    """Return the inventory and the playbook of the guide."""
    _before, _marker, text = GUIDE.read_text(encoding="utf-8").partition("\nAs an inventory\n")
    blocks = [block.partition("\n\n   ")[2] for block in text.split(".. code-block:: yaml")[1:]]
    inventory, playbook = (textwrap.dedent("   " + block.partition("\n.. ")[0]) for block in blocks)
    # What is said between the blocks is not indented.
    inventory = inventory.partition("\n.. ")[0]
    return yaml.safe_load(inventory), playbook


class Inventory:
    """A file for the plugin, and the programs that read it."""

    def __init__(self, directory: Path, reports: Path, **options: t.Any) -> None:
        self.path = directory / "backup.vms.yml"
        self.options = {**examples()[0], "report_dir": str(reports), **options}
        self.path.write_text(yaml.safe_dump(self.options))
        self._home = directory / "ansible"

    def run(self, program: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name(program), "-i", str(self.path), *options],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
                "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
                "ANSIBLE_HOME": str(self._home),
                "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "1",
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def list(self) -> dict[str, t.Any]:
        done = self.run("ansible-inventory", "--list")
        assert done.returncode == 0, done.stderr
        # This is how Ansible writes what is no template.
        found: dict[str, t.Any] = json.loads(done.stdout, object_hook=lambda one: one.get("__ansible_unsafe", one))
        return found

    @property
    def hosts(self) -> dict[str, dict[str, t.Any]]:
        """The variables of each host."""
        found: dict[str, dict[str, t.Any]] = self.list()["_meta"]["hostvars"]
        return found


def write_report(directory: Path, *vms: dict[str, t.Any]) -> Path:
    """Write the report of a run on hv1, as the backup does."""
    directory.mkdir(exist_ok=True)
    found = report(hv1=told(*vms))
    path = directory / f"{found['id']}.json"
    path.write_text(json.dumps(found))
    return path


def listed(vm: Qemu) -> dict[str, str]:
    return {"monitor": str(vm.monitor), "name": vm.monitor.stem}


def test_a_play_backs_up_the_vms_that_lack_a_set(vms: Vms, directory: Path) -> None:
    hypervisor = Hypervisor(directory)
    web, new = vms.start(name="web01"), vms.start(vms.disk(1, size=8 * MIB), name="new01")
    reports, machines = directory / "reports", [listed(web), listed(new)]
    new.kill()
    assert hypervisor.run(vms=machines, report_dir=str(reports)).rc == 2
    inventory = Inventory(directory, reports)
    found = inventory.list()
    assert found["without_backup"]["hosts"] == ["new01"]
    assert sorted(found["vms_of_hv1"]["hosts"]) == sorted(found["vmfleet_vms"]["hosts"]) == ["new01", "web01"]
    known = found["_meta"]["hostvars"]
    assert [known["web01"][f"vmfleet_{name}"] for name in ("newest", "level", "state")] == ["s1", "full", "published"]
    assert known["web01"]["vmfleet_age"] >= 0
    assert known["web01"]["vmfleet_repository"] == str(hypervisor.sets.path)
    assert [known["new01"][f"vmfleet_{name}"] for name in ("newest", "age", "state")] == ["", None, "failed"]
    assert "new01.qmp" in known["new01"]["vmfleet_error"]
    new.restart()
    (directory / "lacking.yml").write_text(examples()[1])
    options = ("-i", str(inventory.path))
    play = hypervisor.play("lacking.yml", *options, vms=machines, id="s2", report_dir=str(reports))
    assert play.rc == 0, play.output
    sets = {path.parent.name: path.name for path in hypervisor.sets.path.glob("*/s2")}
    assert sets == {"new01": "s2"}
    found = inventory.list()
    assert found.get("without_backup", {}).get("hosts", []) == []
    # Nothing is left to do, and nothing is done.
    play = hypervisor.play("lacking.yml", *options, vms=machines, id="s3", report_dir=str(reports))
    assert play.rc == 0, play.output
    assert list(hypervisor.sets.path.glob("*/s3")) == []


def test_what_hypervisors_tell_is_no_template(directory: Path) -> None:
    odd = "{{ 6 * 7 }}"
    write_report(directory / "reports", failed("web01", odd), a_vm(odd))
    inventory = Inventory(directory, directory / "reports", compose={"copied": "vmfleet_error"})
    expression = "vmfleet_name ~ ' ' ~ vmfleet_error ~ ' ' ~ copied ~ ' ' ~ inventory_hostname"
    done = inventory.run(
        "ansible", "all", "-c", "local", "-m", "ansible.builtin.debug", "-a", f"msg={{{{ {expression} }}}}"
    )
    assert done.returncode == 0, done.stderr
    assert f"web01 {odd} {odd} web01" in done.stdout
    assert "42" not in done.stdout
    assert f'"msg": "{odd}   6_7_-' in done.stdout


def test_the_cache(directory: Path) -> None:
    path = write_report(directory / "reports", a_vm("web01"))
    cached = {"cache": True, "cache_plugin": "ansible.builtin.jsonfile", "cache_connection": str(directory / "cache")}
    inventory = Inventory(directory, directory / "reports", **cached)
    before = inventory.hosts["web01"]
    text = path.read_text()
    path.unlink()
    after = inventory.hosts["web01"]
    # The age is that of now, and not of the cache.
    assert after["vmfleet_age"] >= before["vmfleet_age"] > 0
    assert {**after, "vmfleet_age": 0} == {**before, "vmfleet_age": 0}
    [kept] = (directory / "cache").iterdir()
    kept.write_text(kept.read_text().replace(str(before["vmfleet_bytes"]), "-1"))
    path.write_text(text)
    # What makes no sense there is read anew.
    assert inventory.hosts["web01"]["vmfleet_bytes"] == before["vmfleet_bytes"]
    write_report(directory / "reports", a_vm("db01"))
    assert "web01" in inventory.run("ansible", "all", "--list-hosts").stdout
    assert "db01" in inventory.run("ansible", "all", "--list-hosts", "--flush-cache").stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"report_dir": "/nowhere"}, "report_dir: /nowhere cannot be read: No such file or directory"),
        ({"report_dir": "reports"}, "report_dir: 'reports' is no absolute path"),
        ({}, "report_dir: there is no report of a run in"),
        ({"strict": True, "compose": {"x": "nosuch"}}, "nosuch"),
    ],
    ids=["missing", "relative", "empty", "strict"],
)
def test_what_cannot_be_read_is_refused(directory: Path, options: dict[str, t.Any], reason: str) -> None:
    reports = directory / "reports"
    reports.mkdir()
    if "strict" in options:
        write_report(reports, a_vm())
    done = Inventory(directory, reports, **options).run("ansible-inventory", "--list")
    assert done.returncode != 0
    assert reason in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

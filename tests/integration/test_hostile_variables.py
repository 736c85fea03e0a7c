# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role vm_backup: bad values of variables are refused by a message that names them, before anything has changed."""

from __future__ import annotations

import json
import typing as t

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.library import NAME, Chain
from ansible_collections.vmfleet.backup.tests.harness.playbooks import Hypervisor

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms

pytestmark = pytest.mark.usefixtures("clean")

Values = dict[str, t.Any]

HUGE = 1 << 64
CONTROL = "a\x1b[2Jb"
LONG = "x" * 300


def one(option: str, *values: t.Any, said: str = "", **others: t.Any) -> list[tuple[str, Values]]:
    """A case for each value of a variable; the message has to name it, or else what is `said`."""
    return [(said or option, {option: value, **others}) for value in values]


TABLE: dict[str, list[tuple[str, Values]]] = {
    "main": [
        *one("repository", "", "relative", "~/x", "{dir}/nosuch", "{where}", f"/{LONG}", 5),
        *one("repository", "{repo}/web01", "{repo}/new", repository_create=True),
        *one("repository_create", "perhaps"),
        *one("id", "../x", "a/b", ".x", CONTROL, LONG),
        *one("vms", [], {"a": 1}, "x", [5]),
        *one("vms", [{"name": "x"}], [{"monitor": 5, "nosuch": 1}], said="monitor|vms"),
        *one("vms", [{"monitor": ""}], [{"monitor": "relative"}], [{"monitor": "tcp:x"}], said="vms|monitor"),
        *one("vms", [{"monitor": "{monitor}", "name": ""}], [{"monitor": "{monitor}", "name": CONTROL}], said="name"),
        *one("vms", [{"monitor": "{monitor}", "agent": "relative"}], said="agent"),
        *one("sockets", ["relative/*.qmp"], [""], vms=[]),
        *one("include_disks", [""], [CONTROL]),
        *one("exclude_disks", [""]),
        *one("level", "", "most"),
        *one("max_chain", 0, -1, HUGE, "x", "nan"),
        *one("tracking", "perhaps"),
        *one("quiesce", "always"),
        *one("compression", "lzma"),
        *one("speed", "-1", "nan", "inf", "1e400", str(HUGE), "", "fast"),
        *one("bandwidth", "-1", "nan", str(HUGE), "", "fast"),
        *one("max_vms", -1, HUGE, "x", "nan"),
        *one("reserve", "-1", "100%", "nan%", "inf", "", "most"),
        *one("checksum", "perhaps"),
        *one("offline", "ignore"),
        *one("encrypted_source", "keep"),
        *one("timeout", "-1", "nan", "", "soon", "5w", "5\n", "9" * 30 + "d"),
        *one("stall_timeout", "-1", "inf", "", "1e9", "10m\n", "9" * 400),
        *one("progress", "loud"),
        *one("takeover", "perhaps"),
        *one("report_dir", "relative", "./x"),
        *one("metrics_dir", "relative", "~/x", "{repo}", "{repo}/web01"),
    ],
    "restore": [
        *one("restore_vm", "", "nosuch", "../web01", CONTROL, said="vm"),
        *one("id", "nosuch", "../s1", CONTROL),
        *one("id", "s1", said="restore_before", restore_before="2026-11-22"),
        *one("restore_before", "yesterday", "2026-13-01", "1970-01-01", CONTROL, said="before"),
        *one("restore_directory", "", "relative", "{dir}/nosuch", "{dir}/canary", "{repo}", said="directory"),
        *one("restore_disks", [5], "x", [{}], [{"name": "drive0"}], restore_directory=""),
        *one("restore_disks", [{"name": "nosuch", "target": "{where}/d"}], restore_directory="", said="disks"),
        *one("restore_disks", [{"name": "drive0", "target": "relative"}], restore_directory="", said="target"),
        *one("restore_disks", [{"name": "drive0", "target": "{repo}/d"}], restore_directory="", said="target"),
        *one("restore_disks", [{"name": "drive0", "target": "/d", "format": "x"}], restore_directory="", said="format"),
        *one("restore_method", "clone"),
        *one("restore_state", "gone"),
    ],
    "verify": [
        *one("repository", "", "relative", "{where}"),
        *one("names", ["nosuch"], [""], [CONTROL], {"a": 1}),
        *one("id", "../s1", CONTROL, "nosuch"),
        *one("verify", "", "deep"),
        *one("verify_boot", {"timeout": -1}, {"timeout": 0}, {"timeout": HUGE}, said="boot_timeout"),
        *one("verify_boot", {"timeout": "soon"}, "x", {"nosuch": 1}),
        *one("verify_boot", {"tmpdir": "relative"}, {"tmpdir": "{repo}"}, {"tmpdir": ""}, verify="boot", said="tmpdir"),
        *one("verify_boot", {"pattern": "("}, verify="boot", said="boot_pattern"),
        *one("verify_boot", {"qemu": "relative"}, {"qemu": "/no/such"}, verify="boot", said="qemu"),
        *one("verify_boot", {"options": ["-nic", "user"]}, {"options": [""]}, verify="boot", said="boot_options"),
    ],
    "prune": [
        *one("repository", "", "relative", "{where}"),
        *one("names", ["nosuch"], [""], [CONTROL]),
        *one("keep", {}, "x", [], {"nosuch": 1}, {"last": "x"}),
        *one("keep", {"last": 0}, {"last": -1}, {"last": HUGE}, said="keep_last"),
        *one("keep", {"weekly": -1, "last": 1}, said="keep_weekly"),
        *one("keep", *({"within": within} for within in ("14", "0d", "", "9" * 30 + "y")), said="keep_within"),
        *one("consolidate", "perhaps"),
    ],
    "status": [
        *one("repository", "", "relative", "{where}"),
        *one("names", ["nosuch"], [NAME, "nosuch"], [""], [CONTROL]),
        *one("max_age", "26", "0h", "-1d", "nan", "26h\n", "9" * 30 + "w", "soon"),
        *one("sockets", ["relative"], [""]),
        *one("vms", [{"monitor": "relative"}], said="monitor"),
    ],
    "cancel": [
        *one("repository", "", "relative", "{where}"),
        *one("names", ["nosuch"], [NAME, "nosuch"], [""], [CONTROL]),
    ],
}

NEEDED: dict[str, Values] = {
    "restore": {"restore_vm": NAME, "restore_directory": "{where}", "id": ""},
    "verify": {"id": "", "verify": "manifest"},
    "prune": {"keep": {"last": 1}},
    "status": {"id": ""},
}
"""What makes a good call of a verb. All others are good as they are in the inventory."""


def placed(value: t.Any, places: dict[str, str]) -> t.Any:
    """A value with the paths in their places, safe from being taken for a template."""
    if isinstance(value, str):
        for place, path in places.items():
            value = value.replace(place, path)
    if isinstance(value, dict):
        return {name: placed(each, places) for name, each in value.items()}
    return [placed(each, places) for each in value] if isinstance(value, list) else value


def task(number: int, verb: str, variables: Values) -> Values:
    """A use of the role, and a note of how it has failed."""
    role = {"name": "vmfleet.backup.vm_backup", "tasks_from": verb}
    given = {f"vm_backup_{name}": value for name, value in variables.items()}
    told = "ansible_failed_result.msg | default('no message')"
    note = {"said": "{{ said | default({}) | combine({'" + str(number) + "': " + told + "}) }}"}
    return {
        "block": [{"ansible.builtin.include_role": role, "vars": given}],
        "rescue": [{"ansible.builtin.set_fact": note}],
    }


@pytest.mark.parametrize("verb", TABLE)
def test_refused(vms: Vms, directory: Path, verb: str) -> None:
    chain = Chain(vms, directory)
    hypervisor = Hypervisor(directory)
    where = directory / "where"
    where.mkdir()
    (directory / "canary").write_text("nobody touches this")
    hypervisor.variables.update(vm_backup_repository_create=False, vm_backup_id="s9")
    hypervisor.variables["vm_backup_vms"] = [{"monitor": str(chain.vm.monitor)}]
    places = {
        "{dir}": str(directory),
        "{repo}": str(chain.library.path),
        "{where}": str(where),
        "{monitor}": str(chain.vm.monitor),
    }
    cases = [(said, placed({**NEEDED.get(verb, {}), **variables}, places)) for said, variables in TABLE[verb]]
    result = directory / "ansible" / "said.json"
    tasks: list[Values] = [task(number, verb, variables) for number, (_said, variables) in enumerate(cases)]
    tasks.append({"ansible.builtin.copy": {"content": "{{ said | to_json }}", "dest": str(result), "mode": "0600"}})
    play = [{"hosts": "hypervisors", "gather_facts": False, "tasks": tasks}]
    (directory / "cases.yml").write_text(yaml.safe_dump(play))

    def state() -> object:
        ours = [str(directory / name) for name in ("ansible", "inventory.yml", "cases.yml")]
        files = {path: found for path, found in snapshot(directory).items() if not path.startswith(tuple(ours))}
        return files, chain.vm.block_jobs, chain.vm.bitmaps("n0")

    before = state()
    ended = hypervisor.play("cases.yml")
    assert ended.rc == 0, ended.output
    said = json.loads(result.read_text())
    wrong = [
        f"{variables}: {said.get(str(number), 'it was accepted')}"
        for number, (names, variables) in enumerate(cases)
        if not names_one(names, said.get(str(number), ""))
    ]
    assert not wrong, "\n".join(wrong)
    assert "Traceback" not in ended.output
    assert "MODULE FAILURE" not in ended.output
    assert state() == before


def names_one(names: str, message: str) -> bool:
    """Whether a message names one of these variables."""
    return any(name in message for name in names.split("|"))


def test_enough_cases() -> None:
    assert sum(len(cases) for cases in TABLE.values()) >= 100

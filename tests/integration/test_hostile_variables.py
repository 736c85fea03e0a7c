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


def one(option: str, *values: t.Any, said: str = "", **others: t.Any) -> list[tuple[str, Values]]:
    """A case for each value of a variable; the message has to name it, or else what is `said`."""
    return [(said or option, {option: value, **others}) for value in values]


TABLE: dict[str, list[tuple[str, Values]]] = {
    "main": [
        *one("repository", "", "relative", "~/x", "{where}"),
        *one("repository", "{repo}/new", repository_create=True),
        *one("id", "../x", CONTROL),
        *one("vms", []),
        *one("vms", [{"monitor": "relative"}], said="vms|monitor"),
        *one("vms", [{"monitor": "{monitor}", "name": CONTROL}], said="name"),
        *one("sockets", ["relative/*.qmp"], vms=[]),
        *one("max_chain", 0, HUGE),
        *one("speed", "nan", "-1"),
        *one("bandwidth", str(HUGE)),
        *one("max_vms", -1),
        *one("reserve", "nan%"),
        *one("timeout", "-1", "5\n", "9" * 30 + "d"),
        *one("stall_timeout", "inf"),
        *one("report_dir", "relative"),
        *one("metrics_dir", "relative", "{repo}/web01"),
        *one("level", "most"),
    ],
    "restore": [
        *one("restore_vm", "nosuch", CONTROL, said="vm"),
        *one("id", "nosuch"),
        *one("id", "s1", said="restore_before", restore_before="2026-11-22"),
        *one("restore_before", "yesterday", "1970-01-01", said="before"),
        *one("restore_directory", "", "relative", "{dir}/nosuch", "{repo}", said="directory"),
        *one("restore_disks", [{"name": "nosuch", "target": "{where}/d"}], restore_directory="", said="disks"),
        *one("restore_disks", [{"name": "drive0", "target": "{repo}/d"}], restore_directory="", said="target"),
    ],
    "verify": [
        *one("repository", "relative"),
        *one("names", ["nosuch"], [""]),
        *one("id", "../s1"),
        *one("id", "nosuch", said="nosuch"),
        *one("verify_boot", {"timeout": -1}, {"timeout": HUGE}, said="boot_timeout"),
        *one("verify_boot", {"tmpdir": "relative"}, {"tmpdir": "{repo}"}, verify="boot", said="tmpdir"),
    ],
    "prune": [
        *one("names", ["nosuch"], [CONTROL]),
        *one("keep", {}, "x"),
        *one("keep", {"last": -1}, {"last": HUGE}, said="keep_last"),
        *one("keep", {"within": "0d"}, said="keep_within"),
    ],
    "status": [
        *one("names", [NAME, "nosuch"], [""]),
        *one("max_age", "26", "26h\n", "9" * 30 + "w"),
        *one("sockets", ["relative"]),
    ],
    "cancel": [*one("repository", "{where}"), *one("names", [NAME, "nosuch"], [CONTROL])],
}
"""What the unit tests of the role's specification do not see."""

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
    # A loop tells of its items one by one.
    told = "(ansible_failed_result.results | default([ansible_failed_result])) | map(attribute='msg') | join('; ')"
    note = {"said": "{{ said | default({}) | combine({'" + str(number) + "': " + told + "}) }}"}
    return {
        "block": [{"ansible.builtin.include_role": role, "vars": given}],
        "rescue": [{"ansible.builtin.set_fact": note}],
    }


AT_ONCE = 8
"""Cases of one run of a playbook: each takes a second or more."""
PARTS = [(verb, start) for verb, cases in TABLE.items() for start in range(0, len(cases), AT_ONCE)]


@pytest.mark.parametrize(("verb", "start"), PARTS)
def test_refused(vms: Vms, directory: Path, verb: str, start: int) -> None:
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
    chosen = TABLE[verb][start : start + AT_ONCE]
    cases = [(said, placed({**NEEDED.get(verb, {}), **variables}, places)) for said, variables in chosen]
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

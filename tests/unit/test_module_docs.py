# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The documentation of the modules, as ansible-doc has it: its samples, and the groups of module_defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from ansible_collections.vmfleet.backup.tests.harness.modules import NAMES, ROOT

HERE = Path(__file__).parents[2]
GROUPS: dict[str, list[str]] = yaml.safe_load((HERE / "meta" / "runtime.yml").read_text(encoding="utf-8"))[
    "action_groups"
]
ALL = "backup"


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, t.Any]:
    """What ansible-doc knows of every module, by its short name."""
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-doc"), "--json", *(f"vmfleet.backup.{name}" for name in NAMES)],
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT),
            "ANSIBLE_HOME": str(tmp_path_factory.mktemp("ansible")),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.rpartition(".")[2]: told for name, told in json.loads(done.stdout).items()}


def test_a_group_is_all_modules_with_the_option_of_its_name(documented: dict[str, t.Any]) -> None:
    named = {group: members for group, members in GROUPS.items() if group != ALL}
    with_option = {
        group: [name for name in NAMES if group in (documented[name]["doc"].get("options") or {})] for group in named
    }
    assert set(named) == {"repository", "monitor"}
    assert {group: sorted(members) for group, members in named.items()} == with_option


def test_modules_say_which_groups_they_are_in(documented: dict[str, t.Any]) -> None:
    for name in NAMES:
        told = documented[name]["doc"].get("attributes", {}).get("action_group", {}).get("membership", [])
        assert sorted(told) == sorted(f"vmfleet.backup.{group}" for group, names in GROUPS.items() if name in names)


TYPES: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "dict": dict,
    "float": (float, int),
    "int": int,
    "list": list,
    "str": str,
}


def untrue(name: str, value: dict[str, t.Any], sample: t.Any) -> t.Iterator[str]:
    """Say where a sample is not what the documentation of a return value says."""
    if not isinstance(sample, TYPES[value["type"]]) or (value["type"] != "bool" and isinstance(sample, bool)):
        yield f"{name}: {sample!r} is no {value['type']}"
    elif value["type"] == "list":
        if not sample:
            yield f"{name}: the sample is empty"
        element = {"type": value["elements"], "contains": value.get("contains")}
        for each in sample:
            yield from untrue(f"{name}[]", element, each)
    elif value.get("contains"):
        for key in sample.keys() - value["contains"].keys():
            yield f"{name}.{key}: this is not documented"
        for key, contained in value["contains"].items():
            # What is not always returned need not be, and an empty list of things is one of the usual answers.
            if sample.get(key, []) not in ([], None):
                yield from untrue(f"{name}.{key}", contained, sample[key])
            elif key not in sample and "returned" not in contained:
                yield f"{name}.{key}: not in the sample"


@pytest.mark.parametrize("name", NAMES)
def test_return_values_have_samples(documented: dict[str, t.Any], name: str) -> None:
    returned: dict[str, t.Any] = documented[name]["return"] or {}
    assert [key for key, value in returned.items() if "sample" not in value] == []
    assert [text for key, value in returned.items() for text in untrue(key, value, value["sample"])] == []


def spec(options: dict[str, t.Any]) -> dict[str, t.Any]:
    """Return the argument spec that options are documented with; sanity tests hold it equal to that of the module."""
    kept = ("type", "elements", "choices", "aliases", "required")
    return {
        name: {
            **{key: value for key, value in option.items() if key in kept},
            **({"options": spec(option["suboptions"])} if option.get("suboptions") else {}),
        }
        for name, option in options.items()
    }


def fitting(value: t.Any, option: dict[str, t.Any]) -> t.Any:
    """Return a value in which a template stands for anything of the type of its option."""
    if isinstance(value, str) and "{{" in value:
        example = {"bool": True, "dict": {}, "float": 1.0, "int": 1, "list": []}.get(option.get("type", "str"), "x")
        return option["choices"][0] if option.get("choices") else example
    inner = option.get("suboptions") or {}
    if isinstance(value, dict):
        return {key: fitting(each, inner.get(key, {})) for key, each in value.items()}
    if isinstance(value, list):
        return [fitting(each, {"type": option.get("elements"), "suboptions": inner}) for each in value]
    return value


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_what_the_module_takes(documented: dict[str, t.Any], name: str) -> None:
    options = documented[name]["doc"].get("options") or {}
    shown = [task for task in yaml.safe_load(documented[name]["examples"]) if f"vmfleet.backup.{name}" in task]
    assert shown
    for task in shown:
        defaults = {
            key: value
            for group, given in (task.get("module_defaults") or {}).items()
            if name in GROUPS.get(group.rpartition(".")[2], [])
            for key, value in given.items()
        }
        given = {
            key: fitting(value, options.get(key, {}))
            for key, value in {**defaults, **(task[f"vmfleet.backup.{name}"] or {})}.items()
        }
        errors = ArgumentSpecValidator(spec(options)).validate(given).error_messages
        assert errors == [], task["name"]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What README and guides show is there: playbooks, roles, modules with these options, and variables of these names."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ansible_collections.vmfleet.backup.tests.harness import road_tables as tables
from ansible_collections.vmfleet.backup.tests.harness.documented import PAGES, blocks, walked

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).parents[2]
COLLECTION = "vmfleet.backup."
# A plugin that a module brings along goes by that name: `plugins/action` has none of its own.
PLUGINS = {"module": "modules", "lookup": "lookup", "filter": "filter", "inventory": "inventory"}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of Ansible, without what is piped elsewhere and comments."""
    for block in blocks(page):
        for command in block.commands:
            if command.startswith("ansible"):
                words = shlex.split(command, comments=True)
                yield words[: words.index("|")] if "|" in words else words


@functools.cache
def specs() -> dict[str, dict[str, Any]]:
    """Return the options of each role, all its entry points together."""
    found = {}
    for path in CHECKOUT.glob("roles/*/meta/argument_specs.yml"):
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"].values()
        found[path.parents[1].name] = {key: value for entry in entries for key, value in entry["options"].items()}
    return found


@functools.cache
def options(module: str) -> set[str]:
    text = (CHECKOUT / "plugins" / "modules" / f"{module}.py").read_text(encoding="utf-8")
    documentation = yaml.safe_load(re.findall(r'DOCUMENTATION = r"""(.*?)"""', text, re.DOTALL)[0])
    found = set(documentation.get("options", {}))
    for fragment in documentation.get("extends_documentation_fragment", ()):
        file, _dot, part = fragment.removeprefix(COLLECTION).partition(".")
        source = (CHECKOUT / "plugins" / "doc_fragments" / f"{file}.py").read_text(encoding="utf-8")
        wanted = part.upper() or "DOCUMENTATION"
        [content] = re.findall(rf'^    {wanted} = r"""(.*?)"""', source, re.MULTILINE | re.DOTALL)
        found |= set(yaml.safe_load(content).get("options") or {})
    return found


def check_variables(names: set[str]) -> list[str]:
    """Return the names that begin with that of a role, and are not its own."""
    return sorted(
        each
        for each in names
        for role, known in specs().items()
        if each.startswith(f"{role}_") and each not in known and each != "schedule_hosts"
    )


def extra_variables(words: list[str]) -> set[str]:
    """Return the names of the variables that a command gives."""
    given = [after for before, after in itertools.pairwise(words) if before in ("-e", "--extra-vars")]
    names: set[str] = set()
    for each in given:
        if each.startswith("{"):
            names |= set(json.loads(each))
        elif not each.startswith("@"):
            names |= set(re.findall(r"(\w+)=", each))
    return names


def mappings(found: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings within what a block of YAML holds."""
    if isinstance(found, dict):
        yield found
    for each in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from mappings(each)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_commands(page: Path) -> None:
    for words in commands(page):
        playbooks = [word for word in words if word.startswith(COLLECTION)]
        if words[0] == "ansible-playbook":
            for playbook in playbooks:
                assert (CHECKOUT / "playbooks" / f"{playbook.removeprefix(COLLECTION)}.yml").is_file(), words
        assert check_variables(extra_variables(words)) == [], words


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_blocks_of_yaml(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("yaml", "yaml+jinja"):
            continue
        for found in mappings(yaml.safe_load(block.text)):
            assert check_variables({key for key in found if isinstance(key, str)}) == [], block
            for key, value in found.items():
                if isinstance(key, str) and key.startswith(COLLECTION):
                    module = key.removeprefix(COLLECTION)
                    assert set(value or {}) <= options(module), (page, key)
                if key == "name" and isinstance(value, str) and value.startswith(COLLECTION):
                    role = value.removeprefix(COLLECTION)
                    assert (CHECKOUT / "roles" / role).is_dir(), block


def test_readme_lists_all_that_there_is() -> None:
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    missing = [
        f"{kind} {path.stem}"
        for kind, pattern in (
            ("playbook", "playbooks/*.yml"),
            ("role", "roles/*"),
            *((kind, f"plugins/{directory}/[a-z]*.py") for kind, directory in PLUGINS.items()),
        )
        for path in sorted(CHECKOUT.glob(pattern))
        if not re.search(rf"^\| [^|]*\b{kind}\b[^|]*`{COLLECTION}{path.stem}`", readme, re.MULTILINE)
    ]
    assert missing == []
    guides = [page.name for page in PAGES.values() if page.suffix == ".rst"]
    assert [name for name in guides if f"/docs/docsite/rst/{name}" not in readme] == []


def test_all_blocks_are_seen() -> None:
    # In the middle of a list, for example, a block of README would be indented.
    for page in PAGES.values():
        begun = re.findall(r"^ *(?:```(?=\w)|\.\. code-block:: )", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(begun) == len(list(blocks(page))), page


def test_the_tables_are_about_what_is_there() -> None:
    commands = {(name, command) for name, page in PAGES.items() for block in blocks(page) for command in block.commands}
    heads = {(name, block.text.splitlines()[0]) for name, page in PAGES.items() for block in blocks(page)}
    for table in (tables.NOT_RUN, tables.ELSEWHERE, tables.ENDS, tables.AGAIN):
        assert set(table) - commands == set()
    assert set(tables.BLOCKS_NOT_RUN) - heads == set()
    assert {(page, head.split()[0]) for page, head in heads if head} >= tables.SHOWN
    assert {*tables.BEFORE, *tables.VERBS, *tables.WHERE, *tables.TASKS_BEFORE, *tables.HOMES, *tables.THOROUGH} <= set(
        walked()
    )
    text = "\n".join(command for _page, command in commands)
    assert [given for given in tables.SUBSTITUTIONS if given not in text] == []


def test_something_is_found() -> None:
    # The patterns above may never match.
    assert sum(len(list(commands(page))) for page in PAGES.values()) > 40
    assert sum(block.language == "yaml" for page in PAGES.values() for block in blocks(page)) > 20
    assert check_variables({"vm_backup_nosuch", "vm_backup_id", "other"}) == ["vm_backup_nosuch"]
    assert {"names", "repository", "trust_others"} <= options("backup_verify")

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The packages in module_utils stand on floors, and imports run downwards.

What counts is what Python loads, and what Ansible packs. The two differ: Ansible also packs what is imported for types
only, or inside a function.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness import modules
from ansible_collections.vmfleet.backup.tests.harness.payload import COLLECTION, pack, packed_files

CHECKOUT = Path(__file__).parents[4]
ROOT = CHECKOUT.parents[2]
PLUGINS = CHECKOUT / "plugins"

BELOW_ALL = {"_common"}
GROUND = {*BELOW_ALL, "_host"}
MIDDLE = {*GROUND, "_qemu", "_repository"}

FLOORS: dict[str, set[str]] = {
    "_common": set(),
    "_host": BELOW_ALL,
    "_qemu": GROUND,
    "_repository": GROUND,
    "_plan": MIDDLE,
    "_drive_backup": MIDDLE,
    "_restore": MIDDLE,
    "_verify": MIDDLE,
    "_prune": MIDDLE,
    "_backup": {*MIDDLE, "_plan"},
    "_report": {*GROUND, "_repository", "_backup"},
}
"""Each package, and those that it may stand on."""

TOPS = {
    "backup_follow": "_backup",
    "backup_info": "_repository",
    "backup_metrics": "_report",
    "backup_plan": "_plan",
    "backup_prune": "_prune",
    "backup_report": "_report",
    "backup_restore": "_restore",
    "backup_set": "_backup",
    "backup_verify": "_verify",
    "block_job": "_qemu",
    "block_job_info": "_qemu",
    "drive_backup": "_drive_backup",
    "vm_info": "_qemu",
}
"""Each module, and the package that it is made of."""

SPARED = {
    "_common/fields": ("block_job", "block_job_info", "vm_info"),
    "_drive_backup/owners": ("backup_set",),
    "_plan/requests": ("backup_set",),
    "_qemu/domain_list": ("backup_set", "drive_backup"),
    "_qemu/image_files": ("drive_backup", "vm_info"),
    "_repository/catalog": ("backup_plan", "backup_set"),
    "_repository/description": ("backup_info", "backup_metrics", "backup_plan", "backup_prune"),
    "_repository/images": ("backup_plan", "backup_set"),
    "_repository/pins": ("backup_plan", "backup_set"),
    "_repository/published": ("backup_info", "backup_metrics", "backup_plan", "backup_set"),
}
"""Files, and modules that need nothing of them: what is packed is sent with every task, and compiled at every start."""

LATE = {
    "_backup/worker": ("backup_set",),
    "_backup/worker_end": ("backup_set",),
    "_backup/worker_place": ("backup_set",),
    "_host/priority": ("backup_set",),
    "_host/scope": ("backup_set",),
    "_backup/start_offline": ("backup_set",),
    "_qemu/data_map": ("backup_set", "drive_backup"),
    "_qemu/domain": ("backup_plan", "backup_set", "drive_backup", "vm_info"),
    "_qemu/domain_config": ("backup_set",),
    "_qemu/domain_files": ("backup_plan", "backup_set"),
    "_qemu/domain_list": ("backup_plan", "vm_info"),
    "_qemu/domain_xml": ("backup_plan", "backup_set", "drive_backup", "vm_info"),
    "_qemu/guest_freeze": ("backup_set",),
    "_qemu/image_files": ("backup_plan", "backup_set"),
    "_qemu/image_layout": ("backup_set", "drive_backup"),
    "_qemu/layer_tables": ("backup_plan",),
    "_qemu/libvirt_client": ("backup_plan", "backup_set", "block_job", "block_job_info", "drive_backup", "vm_info"),
    "_qemu/spare_clusters": ("backup_set", "drive_backup"),
    "_qemu/storage_daemon": ("backup_plan", "backup_set"),
}
"""Files that modules load when they meet what these are for.

That is a domain, a VM that is off, a disk of several layers or one that is copied whole, a guest that is to be frozen,
sets that nobody waits for.
"""

PURE = {
    "_backup": ("outcome", "results", "steps"),
    "_common": ("argument_specs", "device_names", "fields", "formats"),
    "_drive_backup": ("steps",),
    "_plan": ("decide", "disks", "model"),
    "_prune": ("retention",),
    "_qemu": ("domain_xml",),
    "_restore": ("definition",),
    "_report": (
        *("html", "html_charts", "html_failures", "html_runs", "html_style", "html_text"),
        *("prometheus", "run", "status"),
    ),
    "_repository": ("chain", "documents"),
    "_verify": ("command_line", "model"),
}
"""Files that compute and do nothing else, so that their tests need neither files nor processes."""

FILES = {"plugins": 400, "roles": 400, "tools": 400, "tests": 600}
"""The most lines of a file in a directory."""
LISTS = ("argument_specs.yml",)
"""Files that list options, as long as there are many."""
CLASSES = {"plugins": 200, "roles": 200, "tools": 200}
"""The most lines of a class in a directory."""

LOAD = """
import asyncio, importlib, json, os, sys
import ansible.module_utils.basic

PREFIX = "ansible_collections.vmfleet.backup.plugins."

for name in sys.argv[1:]:
    # A process of its own, in which nothing of the collection has been loaded yet.
    child = os.fork()
    if child == 0:
        module = importlib.import_module(PREFIX + name)
        loaded = [other[len(PREFIX):] for other in sys.modules if other.startswith(PREFIX)]
        held = [value.__name__ for value in vars(module).values() if type(value) is type(sys)]
        held += [value.__module__ for value in vars(module).values() if hasattr(value, "__module__")]
        classes = [
            value.__name__ for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        print(json.dumps([name, loaded, held, classes]), flush=True)
        os._exit(0)
    _child, status = os.waitpid(child, 0)
    assert status == 0, name
"""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a file has loaded, by the names below plugins: with all that comes with it; and what itself holds of it."""

    files: frozenset[str]
    held: frozenset[str]
    classes: tuple[str, ...]

    @property
    def packages(self) -> set[str]:
        return {name.split(".")[1] for name in self.files if name.startswith("module_utils.")}


@functools.cache
def loaded() -> dict[str, Loaded]:
    """What each file in module_utils and each module loads."""
    files = [*PLUGINS.glob("module_utils/*/*.py"), *PLUGINS.glob("modules/*.py")]
    names = [".".join(path.relative_to(PLUGINS).with_suffix("").parts) for path in sorted(files)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = (json.loads(line) for line in done.stdout.splitlines())
    return {name: Loaded(frozenset(files), frozenset(held), tuple(classes)) for name, files, held, classes in found}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The files in module_utils that Ansible packs for each module, by package and name."""
    own = f"{COLLECTION}/plugins/module_utils/"
    payloads = pack(ROOT, tmp_path_factory.mktemp("payloads"))
    found = {name: [file for file in packed_files(path) if file.startswith(own)] for name, path in payloads.items()}
    return {
        name: {file[len(own) : -len(".py")] for file in files if not file.endswith("/__init__.py")}
        for name, files in found.items()
    }


def test_every_package_has_its_floor() -> None:
    assert {path.parent.name for path in PLUGINS.glob("module_utils/*/*.py")} == set(FLOORS)
    assert not list(PLUGINS.glob("module_utils/*.py"))
    assert set(modules.NAMES) == set(TOPS)


@pytest.mark.parametrize("package", FLOORS)
def test_package_loads_lower_ones_only(package: str) -> None:
    files = {name: found for name, found in loaded().items() if name.startswith(f"module_utils.{package}.")}
    assert files
    for name, found in files.items():
        assert found.packages <= {package, *FLOORS[package]}, name


def test_report_stands_on_the_outcome_alone() -> None:
    files = (found.files for name, found in loaded().items() if name.startswith("module_utils._report."))
    engine = {name for names in files for name in names if name.startswith("module_utils._backup.")}
    assert engine == {"module_utils._backup.outcome"}


@pytest.mark.parametrize("module", TOPS)
def test_module_loads_and_packs_what_it_stands_on(module: str, packed: dict[str, set[str]]) -> None:
    allowed = {TOPS[module], *FLOORS[TOPS[module]]}
    assert loaded()[f"modules.{module}"].packages <= allowed
    packages = {file.split("/")[0] for file in packed[module]}
    assert packages <= allowed
    assert TOPS[module] in packages


@pytest.mark.parametrize(("file", "modules"), SPARED.items())
def test_a_file_is_packed_only_for_those_that_need_it(
    file: str, modules: tuple[str, ...], packed: dict[str, set[str]]
) -> None:
    assert any(file in files for files in packed.values())
    assert not [module for module in modules if file in packed[module]]


@pytest.mark.parametrize(("file", "modules"), LATE.items())
def test_a_file_is_loaded_only_where_it_is_needed(
    file: str, modules: tuple[str, ...], packed: dict[str, set[str]]
) -> None:
    assert not [module for module in modules if file not in packed[module]]
    name = f"module_utils.{file.replace('/', '.')}"
    assert not [module for module in modules if name in loaded()[f"modules.{module}"].files]


@pytest.mark.parametrize(("package", "file"), [(package, file) for package, files in PURE.items() for file in files])
def test_pure_file_imports_neither_os_nor_asyncio(package: str, file: str) -> None:
    held = {name.split(".")[0] for name in loaded()[f"module_utils.{package}.{file}"].held}
    assert not held & {"os", "posix", "posixpath", "asyncio"}


def lines(path: Path) -> int:
    """The lines of a file. What a module documents of itself is no code."""
    text = path.read_text(encoding="utf-8")
    if path.parent == CHECKOUT / "plugins" / "modules":
        text = re.sub(r'^[A-Z]+ = r"""$.*?^"""$', "", text, flags=re.DOTALL | re.MULTILINE)
    return len(text.splitlines())


def source_files(*directories: str) -> list[Path]:
    """The files in some directories of the checkout, without those that Python has written and what is generated."""
    found = (path for directory in directories for path in (CHECKOUT / directory).rglob("*") if path.is_file())
    return sorted(path for path in found if path.suffix not in (".pyc", ".xz"))


def is_python(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".py" or b"python" in file.readline()


@pytest.mark.parametrize(("directory", "most"), FILES.items())
def test_no_file_is_long(directory: str, most: int) -> None:
    files = source_files(directory)
    assert files
    counts = {str(path.relative_to(CHECKOUT)): lines(path) for path in files if path.name not in LISTS}
    assert {path: count for path, count in counts.items() if count > most} == {}


@pytest.mark.parametrize(("directory", "most"), CLASSES.items())
def test_no_class_is_long(directory: str, most: int) -> None:
    counts = {}
    for path in filter(is_python, source_files(directory)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.end_lineno:
                counts[f"{path.relative_to(CHECKOUT)}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert {name: count for name, count in counts.items() if count > most} == {}


def test_no_public_class_has_the_name_of_another() -> None:
    places = collections.defaultdict(list)
    for name, found in loaded().items():
        for each in found.classes:
            if not each.startswith("_"):
                places[each].append(name)
    assert {each: names for each, names in places.items() if len(names) > 1} == {}

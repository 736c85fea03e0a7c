# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Other versions than the machine's own: what is said of them is true, and nothing half made is used."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path
from types import SimpleNamespace

import pytest

from ansible_collections.vmfleet.backup.tests.harness import choice

REPOSITORY = Path(__file__).parents[2]
PROVIDE = REPOSITORY / "tools" / "provide"
TESTED = REPOSITORY / "docs" / "docsite" / "rst" / "tested_versions.rst"


def run(*command: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def half_made(cache: Path, version: str) -> Path:
    """What is left of a run that was killed."""
    recipe = PROVIDE.read_bytes() + (REPOSITORY / "requirements-dev.txt").read_bytes()
    directory = cache / "vmfleet" / f"{version}-{hashlib.sha256(recipe).hexdigest()[:8]}"
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").touch()
    return directory


def table(page: Path = TESTED) -> list[dict[str, str]]:
    """The table of the guide."""
    lines = page.read_text().split("make matrix.")[1].strip().splitlines()
    columns = [match.span() for match in re.finditer("=+", lines[0])]
    head, *rows = [[line[begin:end].strip() for begin, end in columns] for line in lines if not line.startswith("=")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def newest(column: str) -> tuple[int, ...]:
    return max(tuple(map(int, row[column].split(".")[:2])) for row in table())


def oldest(column: str) -> tuple[int, ...]:
    return min(tuple(map(int, row[column].split(".")[:2])) for row in table())


@pytest.mark.parametrize(
    ("column", "pattern"),
    [
        ("QEMU", r"QEMU ([\d.]+) or newer \(tested up to ([\d.]+)\)"),
        ("ansible-core", r"ansible-core ([\d.]+) or newer \(tested up to ([\d.]+)\)"),
        ("Python of modules", r"Python ([\d.]+) or newer \(tested up to ([\d.]+)\)"),
    ],
)
def test_the_readme_promises_what_was_tested(column: str, pattern: str) -> None:
    [promised] = re.findall(pattern, (REPOSITORY / "README.md").read_text())
    assert [tuple(map(int, version.split("."))) for version in promised] == [oldest(column), newest(column)]


def test_what_is_documented_has_passed() -> None:
    assert [row for row in table() if row["failed"] != "0" or not int(row["passed"])] == []


def test_what_was_not_finished_is_not_used(tmp_path: Path) -> None:
    directory = half_made(tmp_path, "hypervisor-3.0")
    done = run(PROVIDE, "hypervisor-3.0", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "tools/provide python-3.0: this version is not to be had here" in done.stderr
    assert not (directory / "bin" / "python").exists()
    assert not (directory / "finished").exists()


def test_what_was_finished_is_used(tmp_path: Path) -> None:
    directory = half_made(tmp_path, "hypervisor-3.0")
    (directory / "finished").touch()
    assert run(PROVIDE, "hypervisor-3.0", cache=tmp_path).stdout == f"{directory}/bin\n"
    # As when the Python that it was made with has been removed.
    (directory / "bin" / "python").unlink()
    (directory / "bin" / "python").symlink_to("gone")
    assert run(PROVIDE, "hypervisor-3.0", cache=tmp_path).returncode == 1


def test_a_version_that_is_not_to_be_had_has_a_status_of_its_own(tmp_path: Path) -> None:
    done = run(REPOSITORY / "tools" / "with", "hypervisor-3.0", "--", "true", cache=tmp_path)
    assert done.returncode == 77
    assert "VERSIONS" not in done.stdout


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> t.Any:
    """tools/check, and a copy of the page that it writes."""
    loader = importlib.machinery.SourceFileLoader("check", str(REPOSITORY / "tools" / "check"))
    spec = importlib.util.spec_from_loader("check", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check", module)
    loader.exec_module(module)
    page = tmp_path / TESTED.name
    page.write_text(TESTED.read_text())
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    monkeypatch.setattr(module, "TESTED", page)
    return module


def test_a_cell_takes_the_place_of_its_own_row_only(check: t.Any) -> None:
    cells = [cell for cell in check.CHECKS["matrix"] if "qemu-1" in cell.name][:2]
    versions = {"qemu": "10.0.1", "ansible-core": "2.19.1", "python": "3.11.1", "hypervisor": "3.11.1"}
    for passed, cell in [(1, cells[1]), (2, cells[0]), (3, cells[1])]:
        check.document(check.table_row(cell, check.Result(passed, 0, 4, versions=versions)))
    rows = {row["cell"]: row for row in table(check.TESTED)}
    assert [(rows[cell.name]["passed"], rows[cell.name]["skipped"]) for cell in cells] == [("2", "4"), ("3", "4")]
    assert [name for name in rows if name in [cell.name for cell in cells]] == [cell.name for cell in cells]
    head, _rows = TESTED.read_text().split(".. Written by make matrix.")
    assert check.TESTED.read_text().startswith(head)


def test_rows_of_another_form_are_not_kept(check: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = check.CHECKS["matrix"][:2]
    versions = {"qemu": "10.0.1", "ansible-core": "2.19.1", "python": "3.11.1", "hypervisor": "3.11.1"}
    check.document(check.table_row(one, check.Result(1, 0, 4, versions=versions)))
    row = check.table_row(other, check.Result(2, 0, 4, versions=versions))
    monkeypatch.setattr(check, "COLUMNS", check.COLUMNS[:-1])
    check.document(row[:-1])
    assert [(row["cell"], row["passed"]) for row in table(check.TESTED)] == [(other.name, "2")]
    assert "skipped" not in table(check.TESTED)[0]


def test_what_is_left_out_is_there() -> None:
    assert all((REPOSITORY / "tests" / "integration" / f"{name}.py").exists() for name in choice.FILES)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100])
def test_of_many_cases_the_first_and_the_last_are_taken(count: int) -> None:
    items = [case(f"tests/integration/test_a.py::test_b[{number}]") for number in range(count)]
    choice.leave_out(t.cast("list[pytest.Item]", items))
    taken = [item.nodeid for item in items if not item.marks]
    assert len(taken) == min(count, choice.CASES)
    assert {items[0].nodeid, items[-1].nodeid} <= set(taken)


def case(nodeid: str) -> t.Any:
    """What a case of a test is to those who mark it."""
    marks: list[t.Any] = []
    return SimpleNamespace(nodeid=nodeid, path=Path(nodeid.partition("::")[0]), marks=marks, add_marker=marks.append)

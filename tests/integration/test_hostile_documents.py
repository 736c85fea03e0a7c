# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Documents that are damaged, misplaced or made up cost their own VM, and nothing outside is touched."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.vmfleet.backup.tests.harness.backup import snapshot
from ansible_collections.vmfleet.backup.tests.harness.fixtures import Vms
from ansible_collections.vmfleet.backup.tests.harness.hostile import NEIGHBOUR, ODD, Pair, ask, said
from ansible_collections.vmfleet.backup.tests.harness.sets import result_of

TIME = "2026-11-22T01:00:00Z"
AWAY = "../../../outside/notes.txt"
"""Where the canary is, seen from a set."""
WRONG_TIMES = ("", "now", "2026-02-30T01:00:00Z", "2026-11-22 01:00:00", 1, None)
WRONG_IDS = ("", ".", "..", "s3", "../s1", "/s1", "s1\n", "s" * 65, 1, None, [])
WRONG_NUMBERS = (-1, 1.5, True, "1", None, 2**63, 2**64, 10**400, float("nan"))

# By the field, as the keys that lead to it: values that no honest writer writes.
MANIFEST: dict[tuple[str | int, ...], tuple[t.Any, ...]] = {
    ("id",): WRONG_IDS,
    ("vm", "name"): (NEIGHBOUR, "", "../db01", 1, None),
    ("vm",): (None, [], "web01"),
    ("sequence",): (*WRONG_NUMBERS, 0),
    ("schema",): (2, 0, True, "1", None, 10**30),
    ("repository",): ("", "r", 1),
    ("level",): (None, 1, "full\n"),
    ("attempt",): ("", "../a", "a.b", "*", 1),
    ("started",): WRONG_TIMES,
    ("duration",): (-1, float("nan"), float("inf"), "1"),
    ("consistency",): ("", "none", None),
    ("disks",): ([], None, {}, [None], [[]]),
    ("disks", 0, "name"): ("", None, "drive1", "drive\0"),
    ("disks", 0, "image"): (AWAY, "../s1/drive0.qcow2", "/etc/passwd", "", ".", "manifest.json", "drive1.qcow2", None),
    ("disks", 0, "format"): ("raw", "", None),
    ("disks", 0, "compression"): ("zlib,backing_file=/x", "", None),
    ("disks", 0, "virtual_size"): WRONG_NUMBERS,
    ("disks", 0, "bytes"): WRONG_NUMBERS,
    ("disks", 0, "sha256"): ("", "x" * 64, 1),
    ("disks", 0, "bitmap"): ("mine", "libvirt-1", "", 1),
    ("disks", 0, "layers"): (None, "x", [1], ["\ud800"]),
    ("disks", 0, "parent"): ("s1", [], {"id": "..", "sha256": None}, {"id": "s1"}),
}
CONTENTS = {
    "nothing": b"",
    "half of it": b'{"schema": 1, "id": "s2", ',
    "a list": b"[]",
    "null": b"null",
    "UTF-16": '{"schema": 1}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "deep": b'{"schema": 1, "disks": ' + b"[" * 100000,
    "long": b'{"schema": 1}' + b" " * (5 << 20),
    "digits": b'{"schema": ' + b"1" * 100000 + b"}",
}
MARKS: dict[str, dict[str, tuple[t.Any, ...]]] = {
    ".s1.protected.json": {"id": ("s2", "..", None), "since": WRONG_TIMES[:3]},
    ".s1.verified.json": {
        "id": ("s2", "../s1"),
        "attempt": ("", "../a"),
        "depth": (1, "x" * 40, "Deep"),
        "when": WRONG_TIMES[:3],
        "errors": (None, "bad", [1]),
    },
    ".s1.pin-01234567.json": {"id": ("s1", "s2", ".."), "path": ("", None), "machine_id": (1,)},
    ".s2.consolidation.json": {"id": ("s1", ".."), "image": (None, {}, []), "attempt": ("", None)},
}
INTENT: dict[tuple[str | int, ...], tuple[t.Any, ...]] = {
    ("id",): ("s8", "..", None),
    ("vm", "name"): (NEIGHBOUR, "../db01"),
    ("hypervisor",): (None, {}, "hv1"),
    ("process",): ([1], [1, 2, 3], [-1, 2], "1"),
    ("phase",): ("done", None),
    ("begun",): (float("nan"), -1),
    ("disks",): ([], None),
    ("disks", 0, "job"): ("mine", "vmfleet.00000000.0123456789ab.0", "vmfleet..0"),
    ("disks", 0, "image", "bitmap"): ("mine", "vmfleet-00000000-0123456789abcdef"),
    ("disks", 0, "image", "image"): (AWAY, ".."),
    ("schema",): (2,),
}


class Case(t.NamedTuple):
    """A file below the odd VM's directory, and what is changed in it, or all that stands in it."""

    file: str
    field: tuple[str | int, ...]
    value: t.Any

    def __str__(self) -> str:
        told = repr(self.value)
        return f"{self.file} {'.'.join(map(str, self.field))} {told if len(told) < 40 else told[:40]}"


def of(file: str, fields: t.Mapping[tuple[str | int, ...], tuple[t.Any, ...]]) -> list[Case]:
    return [Case(file, field, value) for field, values in fields.items() for value in values]


CASES = [
    *of("s2/manifest.json", MANIFEST),
    *of(".s9.staging/intent.json", INTENT),
    *(Case(file, (field,), value) for file, fields in MARKS.items() for field in fields for value in fields[field]),
    *(
        Case(file, (), content)
        for file in ("s1/manifest.json", ".s9.staging/intent.json", ".s1.protected.json")
        for content in CONTENTS.values()
    ),
]
FEW = 12
"""Cases in one repository, one after the other: what is wrong is put right before the next."""
BATCHES = [CASES[place : place + FEW] for place in range(0, len(CASES), FEW)]


def document(path: Path) -> dict[str, t.Any]:
    found: dict[str, t.Any] = json.loads(path.read_text())
    return found


def honest(pair: Pair, file: str) -> dict[str, t.Any]:
    """What could stand in a file."""
    if file.endswith("manifest.json"):
        return document(pair.odd / file)
    set_id = file.split(".")[1]
    made = document(pair.odd / "s2" / "manifest.json")
    if file.endswith("intent.json"):
        attempt, tag = "0123456789ab", made["repository"][:8]
        here = {**made["hypervisor"], "machine_id": "f" * 32, "name": "hv9", "boot_id": "other"}
        image = {**made["disks"][0], "bitmap": f"vmfleet-{tag}-0123456789abcdef"}
        kept = ("run", "vm", "level", "consistency", "qemu", "started", "schema")
        more = {"monitor": "unix:/x", "process": [1, 2], "guest": "running", "begun": 1.0, "deadline": None}
        disks = [{"image": image, "job": f"vmfleet.{tag}.{attempt}.0", "expected": 1}]
        given = {name: made[name] for name in kept}
        return {**given, **more, "id": set_id, "attempt": attempt, "hypervisor": here, "checksum": True, "disks": disks}
    marks: dict[str, dict[str, t.Any]] = {
        "protected": {"since": TIME},
        "verified": {"attempt": made["attempt"], "depth": "image", "when": TIME, "errors": []},
        "pin-01234567": {"disk": "drive0", "path": "/x", "host": "hv9", "machine_id": "f" * 32, "since": TIME},
        "consolidation": {"attempt": made["attempt"], "image": {**made["disks"][0], "parent": None, "level": "full"}},
    }
    return {"schema": 1, "id": set_id, **marks[file.split(".")[2]]}


def odd_content(pair: Pair, case: Case) -> bytes:
    if not case.field:
        content: bytes = case.value
        return content
    found = copy.deepcopy(honest(pair, case.file))
    at: t.Any = found
    for key in case.field[:-1]:
        at = at[key]
    at[case.field[-1]] = case.value
    return json.dumps(found).encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def odd(pair: Pair, case: Case) -> t.Iterator[Path]:
    """A repository with an odd file, which is put right in the end."""
    path = pair.odd / case.file
    before = path.read_bytes() if path.exists() else None
    content = odd_content(pair, case)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    yield path
    path.unlink()
    if before is not None:
        path.write_bytes(before)
        path.chmod(0o440)
    elif path.parent != pair.odd:
        path.parent.rmdir()


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("cases", BATCHES, ids=range(len(BATCHES)))
def test_an_odd_document_costs_its_own_vm(pair: Pair, directory: Path, cases: list[Case]) -> None:
    repository = str(pair.library.path)
    for number, case in enumerate(cases):
        with odd(pair, case) as path:
            before = snapshot(pair.odd)
            listed = ask("backup_info", {"repository": repository})
            sets = {(one["vm"], one["id"]) for one in listed["sets"]}
            assert {(NEIGHBOUR, "s1"), (NEIGHBOUR, "s2")} <= sets, case
            assert str(path) in said(listed), (case, listed)
            if case.file.endswith("manifest.json"):
                assert (ODD, case.file[:2]) not in sets, case
            # Nothing of the VM is removed, whatever is asked for; nobody knows what the odd document keeps.
            pruned = ask("backup_prune", {"repository": repository, "names": [ODD], "forget": True})
            assert pruned["rc"], case
            assert str(path) in said(pruned), (case, pruned)
            target = directory / f"restored-{number}"
            target.mkdir()
            restored = ask("backup_restore", {"repository": repository, "vm": ODD, "directory": str(target)})
            if case.file.endswith("manifest.json"):
                assert restored["rc"], case
                assert str(path) in said(restored), (case, restored)
                assert not os.listdir(target), case
            else:
                assert restored["id"] == "s2", case
            after = snapshot(pair.odd)
            locks = {name for name in {*after, *before} if name.endswith(".lock")}
            assert {k: v for k, v in after.items() if k not in locks} == {
                k: v for k, v in before.items() if k not in locks
            }, case
    pair.assert_neighbour_served()


@pytest.fixture(scope="module")
def running() -> t.Iterator[tuple[Pair, Vms]]:
    with tempfile.TemporaryDirectory(prefix="vmfleet-test-") as path, contextlib.ExitStack() as stack:
        vms = Vms(Path(path), stack)
        yield Pair.made(vms, Path(path)), vms


@pytest.mark.parametrize(
    ("file", "field", "value", "refused"),
    [
        (".s9.staging/intent.json", "schema", 2, True),
        (".s9.staging/intent.json", "id", "s8", True),
        (".s9.staging/intent.json", "phase", "done", True),
        ("s2/manifest.json", "schema", 2, True),
        # A guest whose old set is damaged is backed up all the same.
        ("s2/manifest.json", "sequence", -1, False),
        (".s1.protected.json", "since", "now", False),
        (".s1.verified.json", "when", "now", False),
    ],
)
def test_the_next_backup(running: tuple[Pair, Vms], file: str, field: str, value: t.Any, refused: bool) -> None:
    pair, vms = running
    set_id = f"after-{file.split('.')[1].replace('/', '-')}-{field}-{refused}".lower()
    with odd(pair, Case(file, (field,), value)) as path:
        plan = ask("backup_plan", pair.library.arguments(*vms.started, id=set_id))
        assert str(path) in said(plan)
        done = ask("backup_set", {"plan": plan["plan"]})
        assert result_of(done, NEIGHBOUR)["state"] == "published"
        mine = result_of(done, ODD)
        assert mine["state"] == ("failed" if refused else "published"), mine
        if refused:
            assert str(path) in mine["error"]
            cancelled = ask("backup_set", {"repository": str(pair.library.path), "names": [ODD], "state": "cancelled"})
            assert not path.name.startswith("intent") or cancelled["rc"], cancelled

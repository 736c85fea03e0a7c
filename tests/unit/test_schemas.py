# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The JSON Schemas in docs/schema describe what is written into a repository or a report: all of it, and no more."""

from __future__ import annotations

import asyncio
import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.fields import (
    RULE,
    FieldRule,
    Flag,
    Maybe,
    Names,
    Newer,
    Number,
    OneOf,
    Part,
    Said,
    Several,
    Text,
    Time,
    Whole,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._qemu.vm_config import describe_vm
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.access import create_repository
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.annotations import (
    Pin,
    Protection,
    Verification,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.description import parse_description
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.documents import (
    Consolidation,
    DiskImage,
    Failure,
    Hypervisor,
    Intent,
    Level,
    Manifest,
    Marker,
    Parent,
    Phase,
    StagedDisk,
    VmName,
)
from ansible_collections.vmfleet.backup.plugins.module_utils._restore.receipt import Restoration
from ansible_collections.vmfleet.backup.tests.harness.reports import a_vm, failed, report, told
from ansible_collections.vmfleet.backup.tests.unit.plugins.builders import UUID, disk, vm
from ansible_collections.vmfleet.backup.tests.unit.plugins.doubles import FakeMonitor, monitor, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"
NAMES = sorted(path.name.partition(".")[0] for path in SCHEMAS.glob("*.schema.json"))

TIME = "2026-11-22T01:30:00Z"
ATTEMPT = "0123456789ab"
VM = VmName("web01", UUID, UUID)
HYPERVISOR = Hypervisor("hv1", "0123456789abcdef0123456789abcdef", "01234567-89ab-4cde-8f01-23456789abcd")
FULL = DiskImage(
    name="vda",
    node="#block101",
    qdev="/machine/peripheral/vd0/virtio-backend",
    source="/images/web01.qcow2",
    source_format="qcow2",
    virtual_size=1 << 30,
    level="full",
    reason="it is the VM's first set",
    parent=None,
    image="vda.qcow2",
    format="qcow2",
    compression="none",
)
INCREMENT = replace(
    FULL,
    level="incremental",
    parent=Parent("2026-11-21", "0" * 64, ATTEMPT),
    bytes=196608,
    sha256="f" * 64,
    bitmap="vmfleet-671a3da2-80306f9d42ee92c0",
)
MANIFEST = Manifest(
    repository=UUID,
    vm=VM,
    id="2026-11-22",
    sequence=2,
    level="incremental",
    run="033ba100fa7bedfd",
    attempt=ATTEMPT,
    started=TIME,
    finished=TIME,
    duration=0.471,
    consistency="filesystem",
    qemu="7.2.22",
    disks=(INCREMENT, replace(FULL, name="vdb", image="vdb.qcow2")),
    hypervisor=HYPERVISOR,
    monitor="unix:/run/qemu/web01.qmp",
    frozen_ms=98,
)
INTENT = Intent(
    run="033ba100fa7bedfd",
    attempt=ATTEMPT,
    id="2026-11-22",
    vm=VM,
    hypervisor=HYPERVISOR,
    monitor="unix:/run/qemu/web01.qmp",
    process=(4711, 123456),
    level="incremental",
    consistency="crash",
    qemu="7.2.22",
    guest="running",
    started=TIME,
    begun=1234.5,
    deadline=None,
    checksum=True,
    disks=(StagedDisk(INCREMENT, f"vmfleet.671a3da2.{ATTEMPT}.0", 1 << 20),),
)
FAILURE = Failure("033ba100fa7bedfd", "", "2026-11-22", "failed", "disk vda: No space left on device", TIME, TIME)
PROTECTION = Protection("2026-11-22", TIME)
PIN = Pin("2026-11-22", "vda", "/var/tmp/look/vda.qcow2", "hv1", HYPERVISOR.machine_id, TIME)
VERIFICATION = Verification("2026-11-22", ATTEMPT, "checksum", TIME)
CONSOLIDATION = Consolidation("2026-11-22", ATTEMPT, replace(INCREMENT, level="full", parent=None))
RESTORATION = Restoration(
    repository=UUID,
    vm="web01",
    id="2026-11-22",
    attempt=ATTEMPT,
    disk="vda",
    method="copy",
    format="qcow2",
    inode=4711,
    size=196608,
    mtime=1795311000000000000,
    when=TIME,
)

# The classes whose fields an object of a schema has, by the name of the schema and of the definition in it.
CLASSES = {
    ("manifest", ""): Manifest,
    ("manifest", "vm"): VmName,
    ("manifest", "disk"): DiskImage,
    ("manifest", "parent"): Parent,
    ("manifest", "hypervisor"): Hypervisor,
    ("intent", ""): Intent,
    ("intent", "vm"): VmName,
    ("intent", "disk"): DiskImage,
    ("intent", "parent"): Parent,
    ("intent", "hypervisor"): Hypervisor,
    ("intent", "growing"): StagedDisk,
    ("failure", ""): Failure,
    ("protection", ""): Protection,
    ("pin", ""): Pin,
    ("verification", ""): Verification,
    ("consolidation", ""): Consolidation,
    ("consolidation", "disk"): DiskImage,
    ("consolidation", "parent"): Parent,
    ("repository", ""): Marker,
    ("restoration", ""): Restoration,
}

# Those of other origin: they have their own tests.
OTHERS = ("vm", "report")


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    return found


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """All objects with fields that a schema describes, itself first."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield schema
        for below in schema.values():
            yield from objects(below)
    if isinstance(schema, list):
        for below in schema:
            yield from objects(below)


def strict(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """What this release writes has every field, and none that is not described."""
    for each in objects(schema):
        each["additionalProperties"] = False
        each["required"] = list(each["properties"])
    return jsonschema.Draft202012Validator(schema)


def describe(**answers: Any) -> dict[str, Any]:
    commands = (
        "query-kvm",
        "query-memory-size-summary",
        "query-cpus-fast",
        "query-chardev",
        "qom-get",
        "qom-list",
        "query-tpm",
    )
    fake = FakeMonitor({**dict.fromkeys((*commands, "qom-list"), refusal()), **answers})
    return asyncio.run(describe_vm(monitor(fake), vm(disk(), process=None)))


@pytest.mark.parametrize("name", NAMES)
class TestSchema:
    def test_is_one(self, name: str) -> None:
        jsonschema.Draft202012Validator.check_schema(load(name))

    def test_says_what_every_field_is(self, name: str) -> None:
        bare = [
            field
            for each in objects(load(name))
            for field, what in each["properties"].items()
            if "description" not in what
        ]
        assert not bare

    def test_requires_nothing_that_it_does_not_describe(self, name: str) -> None:
        for each in objects(load(name)):
            assert set(each["required"]) <= set(each["properties"])

    def test_is_all_in_one_file(self, name: str) -> None:
        assert '"$ref": "#/' in json.dumps(load(name)) or "$ref" not in json.dumps(load(name))


@pytest.mark.parametrize(("name", "part"), CLASSES, ids=lambda name: name or "document")
def test_fields_are_those_of_the_class(name: str, part: str) -> None:
    schema = load(name)
    described = schema["$defs"][part] if part else schema
    known = fields(CLASSES[name, part])
    assert set(described["properties"]) == {field.name for field in known}
    # `schema` has a default, and yet nothing is read without it. The others may be missing in what was written earlier.
    optional = {field.name for field in known if (field.default, field.default_factory) != (MISSING, MISSING)}
    needed = {field.name for field in known if field.name not in optional or field.name == "schema"}
    assert set(described["required"]) == needed


def maybe(rule: Maybe) -> dict[str, Any]:
    found = described(rule.rule)
    return {**found, "type": [found["type"], "null"]} if "type" in found else {"anyOf": [found, {"type": "null"}]}


def several(rule: Several) -> dict[str, Any]:
    least = {"minItems": rule.least} if rule.least else {}
    return {"type": "array", "items": described(rule.rule), **least, "maxItems": rule.most}


def one_of(rule: OneOf) -> dict[str, Any]:
    words = list(rule.words)
    return {"type": "string", "enum": words} if len(words) > 1 else {"const": words[0]}


def text(rule: Text) -> dict[str, Any]:
    if rule.pattern:
        return {"type": "string", "pattern": f"^{rule.pattern}$"}
    return {"type": "string", **({"minLength": rule.least} if rule.least else {}), "maxLength": rule.most}


def a_part(rule: Part) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{next(part for (_name, part), kind in CLASSES.items() if kind is rule.cls)}"}


DESCRIBED: dict[type[FieldRule], Callable[[Any], dict[str, Any]]] = {
    Flag: lambda _rule: {"type": "boolean"},
    Maybe: maybe,
    Names: lambda _rule: {"type": "object", "additionalProperties": {"type": "string"}},
    # A reader takes other words, too, which are those of a later release.
    Newer: lambda rule: {"type": "string", "enum": [str(word) for word in rule.kind if word != Level.AUTO]},
    Number: lambda _rule: {"type": "number", "minimum": 0},
    OneOf: one_of,
    Part: a_part,
    Several: several,
    Said: text,
    Text: text,
    Time: lambda rule: {"type": "string", "format": "date-time", "pattern": f"^{rule.pattern}$"},
    Whole: lambda rule: {"type": "integer", "minimum": rule.least},
}


def described(rule: FieldRule) -> dict[str, Any]:
    """Return what a schema says of a field with this rule, besides its description."""
    return DESCRIBED[type(rule)](rule)


@pytest.mark.parametrize(("name", "part"), CLASSES, ids=lambda name: name or "document")
def test_fields_are_described_as_they_are_checked(name: str, part: str) -> None:
    schema = load(name)
    properties = (schema["$defs"][part] if part else schema)["properties"]
    for field in fields(CLASSES[name, part]):
        found = {word: value for word, value in properties[field.name].items() if word != "description"}
        expected = {"const": 1} if field.name == "schema" else described(field.metadata[RULE])
        assert found == expected, field.name


def test_every_definition_has_its_class() -> None:
    parts = {(name, part) for name in NAMES if name not in OTHERS for part in ("", *load(name).get("$defs", {}))}
    assert parts == set(CLASSES)


@pytest.mark.parametrize("name", ["intent", "consolidation"])
def test_all_files_say_the_same_of_a_disk(name: str) -> None:
    ours, theirs = load("manifest")["$defs"], load(name)["$defs"]
    assert all(theirs[part] == ours[part] for part in ours if part in theirs)
    assert "disk" in theirs


@pytest.mark.parametrize(
    ("name", "document"),
    [
        pytest.param("manifest", MANIFEST, id="manifest"),
        pytest.param(
            "manifest", replace(MANIFEST, hypervisor=None, consistency_reason="no agent"), id="manifest, little"
        ),
        pytest.param("intent", INTENT, id="intent"),
        pytest.param(
            "intent", replace(INTENT, process=(), deadline=5.0, phase=Phase.COPYING, agent="/x"), id="intent, TCP"
        ),
        pytest.param("failure", FAILURE, id="failure"),
        pytest.param("failure", replace(FAILURE, state="cancelled", attempt=ATTEMPT), id="failure, cancelled"),
        pytest.param("protection", PROTECTION, id="protection"),
        pytest.param("pin", PIN, id="pin"),
        pytest.param("verification", VERIFICATION, id="verification"),
        pytest.param("verification", replace(VERIFICATION, errors=("disk vda: damaged",)), id="verification, bad"),
        pytest.param("consolidation", CONSOLIDATION, id="consolidation"),
        pytest.param("restoration", RESTORATION, id="restoration"),
        pytest.param("restoration", replace(RESTORATION, method="overlay"), id="restoration, overlay"),
    ],
)
def test_what_is_written_is_described(name: str, document: Any) -> None:
    written = json.loads(json.dumps(asdict(document)))
    jsonschema.Draft202012Validator(load(name)).validate(written)
    strict(load(name)).validate(written)
    assert type(document).parse(written) == document


def test_repository(tmp_path: Path) -> None:
    create_repository(str(tmp_path / "repository"))
    strict(load("repository")).validate(json.loads((tmp_path / "repository" / "vmfleet.json").read_text()))


def test_vm_of_which_qemu_tells_all() -> None:
    told = describe(
        **{
            "query-kvm": {"enabled": True, "present": True},
            "query-memory-size-summary": {"base-memory": 1 << 30},
            "query-cpus-fast": [{"qom-path": "/machine/unattached/device[0]"}],
            "query-chardev": [{"label": "agent", "filename": "unix:/run/web01.qga,server=on", "frontend-open": True}],
            "qom-get": "pc-q35-7.2-machine",
            "qom-list": [{"name": "vd0", "type": "child<virtio-blk-pci>"}],
            "query-tpm": [{"model": "tpm-crb", "options": {"type": "passthrough", "data": {}}}],
        }
    )
    told["domain"] = {"uri": "qemu:///system", "xml": "<domain/>", "snapshots": ["s1"], "checkpoints": []}
    strict(load("vm")).validate(told)
    assert parse_description(json.dumps(told).encode()) == told


def test_vm_of_which_qemu_tells_nothing() -> None:
    strict(load("vm")).validate(describe())
    assert parse_description(json.dumps(describe()).encode()) == describe()


def test_report() -> None:
    found = report({"hv3": "no route to host"}, hv1=told(a_vm(warnings=["slow"])), hv2=told(failed()), hv3={})
    strict(load("report")).validate(json.loads(json.dumps(found)))
    strict(load("report")).validate(report())


@pytest.mark.parametrize(
    ("name", "document", "field", "value"),
    [
        ("manifest", MANIFEST, "schema", 2),
        ("manifest", MANIFEST, "id", "../up"),
        ("manifest", MANIFEST, "id", "a..b"),
        ("manifest", MANIFEST, "level", "auto"),
        ("manifest", MANIFEST, "sequence", 0),
        ("manifest", MANIFEST, "started", "yesterday"),
        ("manifest", MANIFEST, "disks", []),
        ("intent", INTENT, "phase", "done"),
        ("failure", FAILURE, "state", "published"),
        ("protection", PROTECTION, "since", "yesterday"),
        ("pin", PIN, "path", ""),
        ("verification", VERIFICATION, "depth", "deep"),
        ("consolidation", CONSOLIDATION, "image", None),
        ("restoration", RESTORATION, "method", "move"),
    ],
)
def test_what_is_never_written_is_refused(name: str, document: Any, field: str, value: Any) -> None:
    written = json.loads(json.dumps(asdict(document)))
    assert not jsonschema.Draft202012Validator(load(name)).is_valid({**written, field: value})


def test_a_field_that_a_later_release_adds_is_no_fault() -> None:
    written = {**json.loads(json.dumps(asdict(MANIFEST))), "labels": {}}
    jsonschema.Draft202012Validator(load("manifest")).validate(written)
    assert not strict(load("manifest")).is_valid(written)


@pytest.mark.parametrize("known", [None, False, True])
def test_sets_of_a_release_that_did_not_look_for_encryption_are_read(known: bool | None) -> None:
    manifest = replace(MANIFEST, disks=tuple(replace(each, source_encrypted=known) for each in MANIFEST.disks))
    written = json.loads(json.dumps(asdict(manifest)))
    for each in written["disks"]:
        if known is None:
            del each["source_encrypted"]
    jsonschema.Draft202012Validator(load("manifest")).validate(written)
    assert [each.source_encrypted for each in Manifest.parse(written).disks] == [known] * len(manifest.disks)

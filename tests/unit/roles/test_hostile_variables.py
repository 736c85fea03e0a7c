# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bad values of variables that Ansible refuses by the role's specification, before the first task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

SPECS = yaml.safe_load((Path(__file__).parents[3] / "roles/vm_backup/meta/argument_specs.yml").read_text())
GOOD: dict[str, dict[str, Any]] = {"restore": {"restore_vm": "web01"}}
MONITOR = "unix:/run/vmfleet-monitors/web01.qmp"

BAD: list[tuple[str, str, list[Any]]] = [
    ("main", "repository_create", ["perhaps", "", 5, [1]]),
    ("main", "vms", [{"a": 1}, [5], [{}], [{"name": "x"}], [{"monitor": MONITOR, "nosuch": 1}]]),
    ("main", "vms", [[{"monitor": MONITOR, "level": "most"}], [{"monitor": MONITOR, "quiesce": ""}]]),
    ("main", "sockets", [{"a": 1}]),
    ("main", "include_disks", [{"a": 1}]),
    ("main", "exclude_disks", [{"a": 1}]),
    ("main", "level", ["", "most", "FULL", 5, []]),
    ("main", "max_chain", ["", "x", "nan", 1.5, [1], {}]),
    ("main", "tracking", ["perhaps", ""]),
    ("main", "quiesce", ["", "always", True]),
    ("main", "compression", ["", "lzma"]),
    ("main", "max_vms", ["", "x", "nan", 1.5, "1e400x"]),
    ("main", "checksum", ["perhaps"]),
    ("main", "offline", ["", "ignore"]),
    ("main", "encrypted_source", ["", "keep"]),
    ("main", "progress", ["", "loud"]),
    ("main", "takeover", ["perhaps"]),
    ("main", "supersede", [5]),
    ("main", "adopt", ["x"]),
    ("restore", "restore_disks", ["", [5], [{}], [{"name": "d"}], [{"target": "/d"}]]),
    ("restore", "restore_disks", [[{"name": "d", "target": "/d", "format": "vmdk"}]]),
    ("restore", "restore_method", ["", "clone"]),
    ("restore", "restore_overwrite", ["perhaps"]),
    ("restore", "restore_state", ["", "gone"]),
    ("verify", "names", [{"a": 1}]),
    ("verify", "verify", ["", "deep"]),
    ("verify", "verify_boot", ["x", [], {"nosuch": 1}, {"timeout": "soon"}, {"timeout": "nan"}, {"agent": "perhaps"}]),
    ("prune", "keep", ["x", [], {"nosuch": 1}, {"last": "x"}, {"weekly": 1.5}, {"yearly": "nan"}]),
    ("prune", "consolidate", ["perhaps"]),
    ("status", "vms", [[{"name": "x"}], [5]]),
    ("cancel", "names", [{"a": 1}]),
]


@pytest.mark.parametrize(
    ("verb", "name", "value"), [(verb, name, value) for verb, name, values in BAD for value in values], ids=str
)
def test_refused(verb: str, name: str, value: Any) -> None:
    options = SPECS["argument_specs"][verb]["options"]
    good = {"repository": "/srv/backup", **GOOD.get(verb, {})}
    given = {f"vm_backup_{key}": each for key, each in {**good, name: value}.items()}
    start = {f"vm_backup_{key}": each for key, each in good.items()}
    assert ArgumentSpecValidator(options).validate(start).error_messages == []
    said = ArgumentSpecValidator(options).validate(given).error_messages
    assert said
    assert "Traceback" not in " ".join(said)
    # Of what is wrong within a list, Ansible tells the option there.
    inner = ("monitor", "target", "level", "quiesce", "format", "name", "nosuch", "dictionary")
    assert any(f"vm_backup_{name}" in text for text in said) or any(word in said[0] for word in inner), said

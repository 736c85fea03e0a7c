# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import yaml  # type: ignore[import-untyped]
from ansible.errors import AnsibleFilterError
from ansible.module_utils.common.yaml import yaml_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

DOCUMENTATION = r"""
name: unknown_variables
short_description: Find variables that a role does not know
version_added: 0.1.0
author:
  - vmfleet contributors (@vmfleet)
description:
  - Compares names of variables with those that a role documents in its C(meta/argument_specs.yml), for all of its entry
    points.
  - A variable that was mistyped is not an error for Ansible. The role then does what it does without it.
positional: _input, role
options:
  _input:
    description: Names of variables that begin with the name of the role.
    type: list
    elements: str
    required: true
  role:
    description: The directory of the role, which is C(role_path) in its tasks.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Refuse variables that would not be heard
  vmfleet.backup.show:
    error: "{{ query('ansible.builtin.varnames', '^vm_backup_') | vmfleet.backup.unknown_variables(role_path) }}"
"""

RETURN = r"""
_value:
  description: A sentence for each name that is not known. Empty if all are.
  type: str
"""


def unknown_variables(names: Iterable[str], role: str) -> str:
    """Return a sentence for each of the names that no entry point of the role has."""
    path = Path(role) / "meta" / "argument_specs.yml"
    try:
        specs: dict[str, Any] = yaml_load(path.read_text(encoding="utf-8"))["argument_specs"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise AnsibleFilterError(f"{path} does not say what variables the role has: {error}") from error
    known = sorted({name for spec in specs.values() for name in spec.get("options", {})})
    prefix = f"{Path(role).name}_"
    return " ".join(_objection(str(name), known, prefix) for name in sorted(names) if name not in known)


def _objection(name: str, known: list[str], prefix: str) -> str:
    # The prefix would make any two of them alike.
    rests = [one[len(prefix) :] for one in known]
    rest = name[len(prefix) :]
    near = difflib.get_close_matches(rest.lower(), rests, n=1) or [one for one in rests if one.startswith(rest)][:3]
    names = " or ".join(prefix + one for one in near)
    meant = f"did you mean {names}?" if near else "remove it, or give it another name."
    return f"{name} is not a variable of this role: {meant}"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file by their names."""
        return {"unknown_variables": unknown_variables}

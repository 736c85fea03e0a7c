# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The example of a job template asks for variables that the role has, and offers what they can be."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parents[2]
GUIDE = HERE / "docs" / "docsite" / "rst" / "fleets.rst"
SPECS = HERE / "roles" / "vm_backup" / "meta" / "argument_specs.yml"


def test_the_survey_is_about_variables_of_the_role() -> None:
    blocks = re.findall(
        r"^\.\. code-block:: yaml\n\n((?:   .*\n|\n)+)", GUIDE.read_text(encoding="utf-8"), re.MULTILINE
    )
    [example] = [block for block in blocks if "survey_spec" in block]
    [play] = yaml.safe_load(textwrap.dedent(example))
    template = next(task["awx.awx.job_template"] for task in play["tasks"] if "awx.awx.job_template" in task)
    schedule = next(task["awx.awx.schedule"] for task in play["tasks"] if "awx.awx.schedule" in task)
    options: dict[str, Any] = yaml.safe_load(SPECS.read_text(encoding="utf-8"))["argument_specs"]["main"]["options"]

    for name, value in template["extra_vars"].items():
        assert value in options[name].get("choices", [value])
    for question in template["survey_spec"]["spec"]:
        option = options[question["variable"]]
        assert question.get("choices") == option.get("choices")
        assert question["default"] == option["default"]
    assert schedule["unified_job_template"] == template["name"]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the table of steps in the guide "How it works" of the rules in the code.

Run with the checkout as its argument, it writes the table.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from pathlib import Path

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.steps import RULES, Step

GUIDE = "docs/docsite/rst/how_it_works.rst"
BEGIN = ".. The rules of plugins/module_utils/_backup/steps.py; make format writes them here.\n"
END = ".. The end of the rules.\n"


def sentences() -> dict[str, str]:
    """Return what is done in each step, by the step's name: the sentence below it in the code."""
    tree = ast.parse(inspect.getsource(Step))
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {}
    for entry, sentence in itertools.pairwise(body):
        if isinstance(entry, ast.Assign) and isinstance(sentence, ast.Expr):
            [name] = [target.id for target in entry.targets if isinstance(target, ast.Name)]
            found[name] = str(ast.literal_eval(sentence.value))
    return found


def table() -> str:
    done = sentences()
    rows = [("What is found", "What is done"), *((_upper(rule.name), done[rule.step.name]) for rule in RULES)]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 50 50", ""]
    for row in rows:
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def _upper(name: str) -> str:
    return f"{name[0].upper()}{name[1:]}."


def renewed(guide: str) -> str:
    """Return the text of the guide with the table as it has to be."""
    before, begin, rest = guide.partition(BEGIN)
    _old, end, after = rest.partition(END)
    assert end, f"{GUIDE} has no place for the table"
    return f"{before}{begin}\n{table()}\n{end}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1]) / GUIDE
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What README and guides show: their blocks of code in the order of the text, and the commands in these."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing as t
from pathlib import Path

TREE = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(TREE)): page
    for page in (
        TREE / "README.md",
        *sorted(TREE.glob("roles/*/README.md")),
        *sorted((TREE / "docs" / "docsite" / "rst").glob("*.rst")),
    )
}

DONE = ("console", "yaml", "yaml+jinja")
"""The languages of blocks that are commands, or for Ansible."""

_MARKDOWN = re.compile(r"^```(?P<language>\S+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
_GUIDE = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>\S+)\n\n(?P<text>(?:(?P=indent) +.*\n|\n)+)", re.MULTILINE
)
_FILE = re.compile(r"`([\w.-]+\.yml)`")


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of code."""

    language: str
    text: str
    before: str
    """The paragraph before it, if that ends with a colon."""

    @property
    def file(self) -> str:
        """The file that it is, as in "Write `web01.yml`:"; empty where that is not said."""
        return "".join(_FILE.findall(self.before)[-1:])

    @property
    def of_inventory(self) -> bool:
        """Whether these are variables of the inventory."""
        return "in the inventory:" in self.before.lower()

    @property
    def commands(self) -> list[str]:
        """The commands of a console, each on one line; what a guide shows without a prompt is what they print."""
        if self.language != "console":
            return []
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [re.sub(r"\s{2,}# .*", "", line) for line in prompted or lines if line]


def blocks(page: Path) -> t.Iterator[Block]:
    """Yield all blocks of code of a page."""
    text = page.read_text(encoding="utf-8")
    for match in (_MARKDOWN if page.suffix == ".md" else _GUIDE).finditer(text):
        before = " ".join(text[: match.start()].rstrip().rpartition("\n\n")[2].split())
        yield Block(
            match["language"],
            textwrap.dedent(match["text"]).strip("\n") + "\n",
            before if before.endswith(":") else "",
        )


def walked() -> list[str]:
    """Return the pages that have something to be done."""
    return [name for name, page in PAGES.items() if any(block.language in DONE for block in blocks(page))]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every link from one page of the documentation to another leads to a place that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LABEL = "ansible_collections.vmfleet.backup.docsite"
HERE = re.compile(r"https://github[.]com/vmfleet/backup/(?:blob|tree|raw)/main/")

MARKDOWN = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "roles/*/README.md", "docs/*/README.md", "findings/README.md")
    for path in ROOT.glob(pattern)
)
GUIDES = sorted((ROOT / "docs" / "docsite" / "rst").glob("*.rst"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".rst":
        titles = re.findall(r"^(.+)\n(?:=|-){4,}$", text, re.MULTILINE)
        return {re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in titles}
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: str, target: str) -> bool:
    """Say whether a link of a page leads into this repository, and to nothing there."""
    inside = HERE.match(target)
    if "://" in target and not inside:
        return False
    path, _hash, anchor = target[inside.end() if inside else 0 :].partition("#")
    found = ROOT / path if inside else (ROOT / page).parent / path if path else ROOT / page
    return not found.exists() or (bool(anchor) and anchor not in anchors(found))


@pytest.mark.parametrize("page", MARKDOWN)
def test_a_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    targets = [*defined.values(), *re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [target for target in targets if broken(page, target)] == []

    named = {label.lower() for label in re.findall(r"\]\[([^\]]+)\]", text)}
    short = {words.lower() for words in re.findall(r"\[([^\]]+)\](?![\[(:])", text)}
    assert named - set(defined) == set()
    assert set(defined) - named - short == set()


def test_a_reference_leads_to_a_label() -> None:
    labels = {
        label
        for page in GUIDES
        for label in re.findall(rf"^[.][.] _({LABEL}[.]\w[\w.]*):$", page.read_text(), re.MULTILINE)
    }
    assert len(labels) >= len(GUIDES)

    places = [*GUIDES, *(ROOT / "plugins").glob("*/*.py"), *ROOT.glob("roles/*/meta/argument_specs.yml")]
    named = {name for place in places for name in re.findall(rf"{LABEL}[.]\w+(?:[.]\w+)*", place.read_text())}
    assert named - labels == set()


def test_a_reference_without_words_leads_to_a_heading() -> None:
    """Sphinx takes the heading for the words, and has none for a label that stands elsewhere."""
    pages = "\n".join(page.read_text() for page in GUIDES)
    headed = set(re.findall(rf"^[.][.] _({LABEL}[.][\w.]+):\n\n.+\n(?:=|-){{4,}}$", pages, re.MULTILINE))
    assert set(re.findall(rf":ref:`({LABEL}[.][\w.]+)`", pages)) - headed == set()

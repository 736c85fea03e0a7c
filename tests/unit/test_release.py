# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""tools/release: one command sets the version in all places, or none; the tag of a release has to be that version."""

from __future__ import annotations

import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parents[2]
FORMATS = Path("plugins/module_utils/_common/formats.py")
FRAGMENT = Path("changelogs/fragments/one.yml")


class Checkout:
    """A repository with what a release changes, and no plugins that would be asked for their documentation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("tools/release", "galaxy.yml", "changelogs/config.yaml", str(FORMATS)):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, path / name)
        (path / "changelogs" / "changelog.yaml").write_text("ancestor: null\nreleases: {}\n")
        (path / FRAGMENT).parent.mkdir()
        (path / FRAGMENT).write_text("minor_changes:\n  - >-\n    one C(thing\n    (too)).\n")
        self.set("0.1.0")
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit()

    def git(self, *arguments: str) -> str:
        command = ["git", "-c", "user.name=Tester", "-c", "user.email=tester@example.com", *arguments]
        return subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=True).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=x")

    def set(self, version: str) -> None:
        """Have this version stand in galaxy.yml."""
        path = self.path / "galaxy.yml"
        path.write_text(path.read_text().replace(f"version: {self.galaxy}", f"version: {version}"))

    @property
    def galaxy(self) -> str:
        return str(yaml.safe_load((self.path / "galaxy.yml").read_text())["version"])

    @property
    def formats(self) -> str:
        return (self.path / FORMATS).read_text()

    def release(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command: t.Sequence[str | Path] = [self.path / "tools" / "release", *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    def refuse(self, *arguments: str) -> str:
        """Return why it is refused, after it was seen that nothing was done."""
        before = self.git("status", "--porcelain")
        done = self.release(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert self.git("status", "--porcelain") == before
        return done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_release(checkout: Checkout) -> None:
    done = checkout.release("1.2.3")
    assert done.returncode == 0, done.stderr
    assert "git tag -a v1.2.3" in done.stdout
    assert checkout.galaxy == "1.2.3"
    assert 'COLLECTION_VERSION = "1.2.3"\n' in checkout.formats
    assert not (checkout.path / FRAGMENT).exists()
    told = checkout.release("notes", "v1.2.3")
    assert told.returncode == 0, told.stderr
    assert "* one <code>thing \\(too\\)</code>\\." in told.stdout
    assert "## v1" not in told.stdout


def test_what_is_no_release(checkout: Checkout) -> None:
    assert "'1.2' is no version of three numbers" in checkout.refuse("1.2")
    assert "0.0.9 is older than 0.1.0" in checkout.refuse("0.0.9")
    checkout.git("tag", "v0.2.0")
    assert "there is a tag v0.2.0 already" in checkout.refuse("0.2.0")
    (checkout.path / "new").touch()
    assert "not committed" in checkout.refuse("0.3.0")


def test_a_tag_that_is_not_the_version(checkout: Checkout) -> None:
    assert "0.1.0 is no tag of a release" in checkout.refuse("notes", "0.1.0")
    assert "which is 0.1.0" in checkout.refuse("notes", "v0.2.0")
    changelog = checkout.path / "CHANGELOG.md"
    changelog.write_text("## v0\\.2\\.0\n\nnewer\\.\n")
    assert "CHANGELOG.md says nothing of v0.1.0" in checkout.refuse("notes", "v0.1.0")
    changelog.write_text(changelog.read_text() + '<a id="v0-1-0"></a>\n## v0\\.1\\.0\n\nolder\\.\n')
    assert checkout.release("notes", "v0.1.0").stdout == "\nolder\\.\n"
    checkout.set("0.2.0")
    assert "which is 0.1.0 0.2.0" in checkout.refuse("notes", "v0.2.0")

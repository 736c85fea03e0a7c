# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the collection's modules as Ansible does: each call a process of its own, arguments in, one JSON object out.

An interpreter of its own would take longer to start than most modules take to work, so that the process is a fork of
this one, which has imported them all.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import typing as t
from pathlib import Path

from ansible_collections.vmfleet.backup.plugins.module_utils._host import process
from ansible_collections.vmfleet.backup.tests.harness import binding, crash
from ansible_collections.vmfleet.backup.tests.harness.forks import Fork, Timeout
from ansible_collections.vmfleet.backup.tests.harness.qemu import PATIENCE

if t.TYPE_CHECKING:
    from ansible_collections.vmfleet.backup.tests.harness.name_spaces import NameSpaces

sys.path.append(str(binding.directory()))

# .../ansible_collections/vmfleet/backup/tests/harness/modules.py: the directory that PYTHONPATH has to name.
ROOT = Path(__file__).parents[5]

PLUGINS = Path(__file__).parents[2] / "plugins"
PACKAGE = "ansible_collections.vmfleet.backup.plugins.modules"
# What is an action plugin only has its documentation there.
FILES = [path for path in sorted((PLUGINS / "modules").glob("[a-z]*.py")) if "def main(" in path.read_text()]
NAMES = [path.stem for path in FILES]
PARTS = sorted(
    f"{PACKAGE[: -len('modules')]}module_utils.{path.parent.name}.{path.stem}"
    for path in PLUGINS.glob("module_utils/*/*.py")
)
"""What they are made of. Modules load some of it late; here, each process would do that for itself."""


def be_no_controller() -> None:
    """Forget that a test has imported Ansible's controller: ansible-core 2.19 shows what a module warns of there."""
    internal = sys.modules.get("ansible.module_utils._internal")
    if hasattr(internal, "is_controller"):
        internal.is_controller = False


class ModuleProcess:
    """A module that runs."""

    def __init__(
        self,
        name: str,
        args: dict[str, t.Any],
        check: bool = False,
        diff: bool = False,
        crash_at: int | crash.Point = 0,
        victims: t.Sequence[int | Path] = (crash.MODULE,),
        record: Path | None = None,
        inside: NameSpaces | None = None,
        deed: t.Callable[[], object] | None = None,
    ) -> None:
        """`crash_at` kills it, or else the `victims`, and `record` gets all points where that is possible.

        `deed` is what is done in it before that.

        It runs in the name spaces `inside`, or where this process runs.
        """
        self.name = name
        for each in (*PARTS, *(f"{PACKAGE}.{name}" for name in NAMES)):
            importlib.import_module(each)
        module = sys.modules[f"{PACKAGE}.{name}"]

        def main() -> None:
            sys.argv = [str(module.__file__)]
            be_no_controller()
            if inside:
                # This process may have looked already, out here.
                process.spaces.cache_clear()
            if crash_at or record:
                crash.arm(crash_at, victims, record, deed)
            module.main()

        self._process = Fork(main, module_input(args, check, diff).encode(), inside)
        self._said: tuple[str, str] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def killed(self) -> bool:
        """Whether it has ended by SIGKILL."""
        return self._process.poll() == -signal.SIGKILL

    @property
    def children(self) -> list[int]:
        """The child that does the work, and others that come and go."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    @property
    def open_files(self) -> set[Path]:
        """What it, or its child that does the work, has open in this moment."""
        found = set()
        for pid in (self.pid, *self.children):
            # Some are closed, and some children gone, before we get to them.
            with contextlib.suppress(FileNotFoundError):
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        found.add(fd.readlink())
        return found

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> None:
        """Wait for its end, whatever that is."""
        if self._said is None:
            self._said = self._process.communicate(timeout)

    def kill(self) -> None:
        """SIGKILL: nothing of the module gets a chance to clean up."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def result(self, timeout: float = PATIENCE) -> dict[str, t.Any]:
        """Wait for the end; returns what the module says, with its exit status as `rc`."""
        try:
            self.wait(timeout)
        except Timeout:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {timeout:.0f} s") from None
        assert self._said
        output, errors = self._said
        result: t.Any = None
        with contextlib.suppress(ValueError):
            result = json.loads(output)
        assert isinstance(result, dict), f"{self.name} gave no result: {output}{errors}"
        assert "Traceback" not in errors, errors
        warnings = [_text(warning) for warning in result.get("warnings", [])]
        return {**result, "warnings": warnings, "rc": self._process.poll()}


def module_input(args: dict[str, t.Any], check: bool = False, diff: bool = False) -> str:
    """What a module gets on its stdin."""
    return json.dumps(
        {"ANSIBLE_MODULE_ARGS": {**args, "_ansible_check_mode": check, "_ansible_diff": diff}}, default=str
    )


def _text(warning: t.Any) -> str:
    # A plain string until ansible-core 2.18, an object since.
    return warning if isinstance(warning, str) else str(warning["event"]["msg"])


def run_module(
    name: str,
    args: dict[str, t.Any],
    check: bool = False,
    diff: bool = False,
    timeout: float = PATIENCE,
    inside: NameSpaces | None = None,
) -> dict[str, t.Any]:
    """Run a module to its end, whatever that is."""
    return ModuleProcess(name, args, check, diff, inside=inside).result(timeout)


def succeed(
    name: str,
    args: dict[str, t.Any],
    check: bool = False,
    diff: bool = False,
    inside: NameSpaces | None = None,
) -> dict[str, t.Any]:
    """Run a module that has to succeed."""
    result = run_module(name, args, check, diff, inside=inside)
    assert result["rc"] == 0, result.get("msg", result)
    assert not result.get("failed"), result
    return result


def fail(
    name: str,
    args: dict[str, t.Any],
    check: bool = False,
    diff: bool = False,
    inside: NameSpaces | None = None,
) -> dict[str, t.Any]:
    """Run a module that has to fail, with a message and not with a traceback."""
    result = run_module(name, args, check, diff, inside=inside)
    assert result["rc"] != 0, result
    assert result.get("failed") is True, result
    assert "exception" not in result, result["exception"]
    assert result["msg"], result
    return result

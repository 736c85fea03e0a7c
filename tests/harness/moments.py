# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Moments in a module's life at which a test does something to the world."""

from __future__ import annotations

import contextlib
import time
import typing as t

from ansible_collections.vmfleet.backup.tests.harness.qemu import wait_until

if t.TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pytest


class Moment:
    """Right before the first call of a function for which `when` is true; modules are forks of this process."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        directory: Path,
        place: t.Any,
        name: str,
        when: Callable[..., bool] = lambda *_args: True,
    ) -> None:
        self._reached, self._over = directory / "reached", directory / "over"
        self._what = name
        function = getattr(place, name)

        def wait_and_call(*args: t.Any, **kwargs: t.Any) -> t.Any:
            if not self._over.exists() and when(*args):
                self._reached.touch()
                while not self._over.exists():
                    time.sleep(0.01)
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, wait_and_call)

    @contextlib.contextmanager
    def reached(self, change: contextlib.AbstractContextManager[t.Any]) -> Iterator[None]:
        """Wait until a module has come there, and let it go on in a changed world."""
        wait_until(self._reached.exists, f"the call of {self._what}")
        with change:
            self._over.touch()
            yield

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Nobody runs the benchmarks every day: that what they import is still there is seen here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"
BENCHMARKS = [path for path in HERE.iterdir() if path.is_file() and not path.suffix]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda path: path.name)
def test_it_starts(benchmark: Path) -> None:
    done = subprocess.run([sys.executable, benchmark, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--against" in done.stdout


def test_there_are_some() -> None:
    assert {path.name for path in BENCHMARKS} >= {"control", "copy", "fleet", "info", "libvirt", "restore", "start"}

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a program, and write down what it and all its descendants have cost: `meter.py FILE COMMAND [ARGUMENT...]`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the program to its end; return its exit status."""
    report, *command = sys.argv[1:]
    # Nobody else waits for those whose parents have ended, and what they cost would be lost.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    begin = time.monotonic()
    status = subprocess.run(command, check=False).returncode
    seconds = time.monotonic() - begin
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss << 10}
    Path(report).write_text(json.dumps(figures))
    return status


if __name__ == "__main__":
    sys.exit(main())

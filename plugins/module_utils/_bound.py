# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: this file is not part of the public interface of the collection; it can change without notice.
"""Programs that die with the process that has started them, however that ends."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# What is to be killed with its parent has to say so itself (PR_SET_PDEATHSIG), and the parent may be dead by then.
LAUNCHER = """
import ctypes, os, signal, sys
os.nice(int(sys.argv[2]))
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[3], sys.argv[3:])
"""


def bound(command: Sequence[str], niceness: int = 0) -> list[str]:
    """A command that becomes another one, bound to this process; FileNotFoundError where that is not installed.

    C(niceness) is added to this process's own (nice(2)).
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(command[0])
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(niceness), program, *command[1:]]

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Chain torture: random sequences of all that happens to a VM and its sets. `make torture` runs many of them.

Each prints its seed; VMFLEET_TORTURE_SEED with VMFLEET_TORTURE_SEQUENCES=1 repeats it, as far as the kernel's and
QEMU's timing allow.
"""

from __future__ import annotations

import os
import random
import typing as t

import pytest

from ansible_collections.vmfleet.backup.tests.harness.torture.sequence import of_qemu

if t.TYPE_CHECKING:
    from pathlib import Path

    from ansible_collections.vmfleet.backup.tests.harness.fixtures import Storage, Vms
    from ansible_collections.vmfleet.backup.tests.harness.modules import ModuleProcess

SEQUENCES = int(os.environ.get("VMFLEET_TORTURE_SEQUENCES", "25"))


@pytest.mark.parametrize("number", range(SEQUENCES))
def test_every_listed_set_is_right(
    number: int, directory: Path, storage: Storage, vms: Vms, start_module: t.Callable[..., ModuleProcess]
) -> None:
    first = os.environ.get("VMFLEET_TORTURE_SEED")
    seed = int(first) + number if first else random.SystemRandom().randrange(1 << 32)
    again = f"VMFLEET_TORTURE_SEED={seed} VMFLEET_TORTURE_SEQUENCES=1"
    print(again)
    try:
        of_qemu(str(seed), directory, storage, vms, start_module).run()
    except BaseException as error:
        # What was printed is not kept where a second try passes.
        error.add_note(again)
        raise

# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What several processes know of a fleet together."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

from ansible_collections.vmfleet.backup.plugins.module_utils._backup.outcome import STATES
from ansible_collections.vmfleet.backup.plugins.plugin_utils._fleet import Fleet, Phase
from ansible_collections.vmfleet.backup.plugins.plugin_utils._progress import Standing

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
HOSTS = [f"hv{number}" for number in range(200)]


def standing(copied: int = 0, total: int = 0, guessed: bool = False, **states: int) -> Standing:
    """How far VMs are, in MiB."""
    return Standing(tuple(states.get(state, 0) for state in STATES), copied * MIB, total * MIB, guessed)


def fleet(directory: Path, host: str) -> Fleet:
    return Fleet(str(directory / "fleet"), HOSTS, host)


def test_all_there_is_to_tell(tmp_path: Path) -> None:
    fleet(tmp_path, "hv0").note(Phase.FOLLOWED, standing(30, 40, published=2, running=1))
    fleet(tmp_path, "hv3").note(Phase.BEGUN, standing(0, 60, guessed=True, queued=2))
    fleet(tmp_path, "hv199").note(Phase.FOLLOWED, standing(20, 20, published=1, failed=1, skipped=1))
    fleet(tmp_path, "hv7").begin(standing(0, 0, running=1))
    fleet(tmp_path, "hv7").lose()
    assert fleet(tmp_path, "hv1").line(5.0, 10.0) == (
        "3 of 9 VMs done, 2 running, 2 queued, 1 failed, 1 skipped; 50.0 MiB of about 120.0 MiB (41 %);"
        " 1 of 4 hypervisors done, 1 lost, 1 not followed yet"
    )


def test_nothing_to_copy_is_no_amount(tmp_path: Path) -> None:
    for host in HOSTS[:2]:
        fleet(tmp_path, host).note(Phase.FOLLOWED, standing(published=1))
    assert fleet(tmp_path, "hv0").line(5.0, 10.0) == "2 of 2 VMs done; 2 of 2 hypervisors done"


def test_what_is_known_is_not_planned_again(tmp_path: Path) -> None:
    fleet(tmp_path, "hv1").note(Phase.BEGUN, standing(running=1))
    for host in HOSTS[:2]:
        fleet(tmp_path, host).begin(standing(queued=1))
    assert fleet(tmp_path, "hv0").line(5.0, 10.0).startswith("0 of 2 VMs done, 1 running, 1 queued; ")


def test_one_of_them_speaks(tmp_path: Path) -> None:
    both = [fleet(tmp_path, host) for host in HOSTS[:2]]
    assert both[0].line(0.0, 10.0) == ""
    both[0].begin(standing(queued=1))
    # Nobody has spoken as long as there is nothing to say.
    assert both[0].line(1.0, 10.0) == ""
    both[1].begin(standing(queued=1))
    assert [bool(each.line(now, 10.0)) for now in (2.0, 11.9, 12.0, 13.0) for each in both] == (
        [True, False, False, False, True, False, False, False]
    )


def test_many_processes_at_the_same_time(tmp_path: Path) -> None:
    children = []
    for host in HOSTS:
        child = os.fork()
        if child == 0:
            try:
                mine = fleet(tmp_path, host)
                for copied in random.sample(range(100), 20):
                    mine.note(Phase.FOLLOWED, standing(copied, 100, running=1))
                    mine.line(float(copied), 0.0)
                mine.note(Phase.FOLLOWED, standing(100, 100, published=1))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert fleet(tmp_path, "hv0").line(1e9, 0.0) == (
        "200 of 200 VMs done; 19.5 GiB of 19.5 GiB (100 %); 200 of 200 hypervisors done"
    )


def test_estimates_of_any_size(tmp_path: Path) -> None:
    for host in HOSTS[:2]:
        fleet(tmp_path, host).note(Phase.FOLLOWED, standing(1, 1 << 50, guessed=True, running=1))
    assert fleet(tmp_path, "hv0").line(5.0, 10.0).startswith("0 of 2 VMs done, 2 running; 2.0 MiB of about ")

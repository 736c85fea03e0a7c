# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lines on terminals of any width, and which of them tell of a failure."""

from __future__ import annotations

import pytest

from ansible_collections.vmfleet.backup.plugins.plugin_utils._layout import lay_out

ROW = "published  db01   incremental, filesystem consistent (frozen for 41 ms), 212.1 MiB in 1.9 s, /srv/backup/db01/s1"
NOTE = "                  the guest's file systems were not frozen: no agent has opened its channel"


def laid_out(*lines: str, width: int) -> list[str]:
    return [line.text for line in lay_out(lines, width)]


def test_what_is_too_long_goes_on_below_its_last_column() -> None:
    assert laid_out(ROW, NOTE, width=80) == [
        "published  db01   incremental, filesystem consistent (frozen for 41 ms),",
        "                  212.1 MiB in 1.9 s, /srv/backup/db01/s1",
        "                  the guest's file systems were not frozen: no agent has opened",
        "                  its channel",
    ]


@pytest.mark.parametrize("width", [0, len(ROW), 200])
def test_what_fits_stays_as_it_is(width: int) -> None:
    assert laid_out(ROW, width=width) == [ROW]


@pytest.mark.parametrize("width", [30, 40, 60, 79, 80, 100, 119])
def test_no_line_is_longer_than_the_terminal_and_no_word_is_lost(width: int) -> None:
    lines = laid_out(ROW, NOTE, width=width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == f"{ROW} {NOTE}".split()


TABLE = [
    "  VM           newest set     age  level         sets        size  verified   hypervisor",
    "! new01        none                                 0                         hv02.example.com",
    "! accounting1  2026-11-25    27 h  incremental     30   201.3 GiB  NOT GOOD   hv01.example.com, hv02.example.com",
]


def test_the_last_columns_of_a_table_go_on_below_the_second_one() -> None:
    assert laid_out(*TABLE, width=80) == [
        "  VM           newest set     age  level         sets        size  verified",
        "               hypervisor",
        "! new01        none                                 0",
        "               hv02.example.com",
        "! accounting1  2026-11-25    27 h  incremental     30   201.3 GiB  NOT GOOD",
        "               hv01.example.com, hv02.example.com",
    ]
    assert laid_out(TABLE[2], width=60) == [
        "! accounting1  2026-11-25    27 h  incremental     30",
        "               201.3 GiB  NOT GOOD  hv01.example.com,",
        "               hv02.example.com",
    ]
    assert laid_out(*TABLE, width=120) == TABLE
    # All rows are cut at the same place.
    assert laid_out(*TABLE, width=79) == [
        "  VM           newest set     age  level         sets        size  verified",
        "               hypervisor",
        "! new01        none                                 0",
        "               hv02.example.com",
        "! accounting1  2026-11-25    27 h  incremental     30   201.3 GiB  NOT GOOD",
        "               hv01.example.com, hv02.example.com",
    ]
    assert laid_out(*TABLE, width=74)[:2] == [
        "  VM           newest set     age  level         sets        size",
        "               verified  hypervisor",
    ]
    assert laid_out(*TABLE, width=74)[4:] == [
        "! accounting1  2026-11-25    27 h  incremental     30   201.3 GiB",
        "               NOT GOOD  hv01.example.com, hv02.example.com",
    ]
    assert {line.tone for line in list(lay_out(TABLE, 80))[2:]} == {"bad"}


@pytest.mark.parametrize("width", [25, 40, 60, 79, 80, 100])
def test_no_row_of_a_table_is_longer_than_the_terminal_and_no_word_is_lost(width: int) -> None:
    lines = laid_out(*TABLE, width=width)
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == " ".join(TABLE).split()


def test_a_sentence_goes_on_with_an_indent() -> None:
    sentence = "This file system cannot reserve space for a copy: the reserve counts twice, which is rather much of it."
    first, second = laid_out(sentence, width=80)
    assert sentence.startswith(first)
    assert second.startswith("    ")


def test_a_command_can_be_copied() -> None:
    command = "ansible-playbook -i inventory.yml vmfleet.backup.backup -e vm_backup_id=s2 --limit hv07.example.com"
    assert laid_out("Run it again:", command, width=80) == ["Run it again:", command]


def test_a_word_is_not_broken() -> None:
    path = "/srv/" + "x" * 90
    assert laid_out(f"published  web01  {path}", width=60)[-1].strip().endswith(path)


@pytest.mark.parametrize(
    ("line", "tone"),
    [
        ("failed     web01  target full", "bad"),
        ("cancelled  web01  cancelled on request", "bad"),
        ("fail    web01  it has no medium", "bad"),
        ("FAILED  hv01: it was lost before", "bad"),
        ("NOT GOOD  web01/s1  vda: its checksum differs", "bad"),
        ("! web01  none", "bad"),
        ("Warning: /srv is nearly full", "warning"),
        ("published  failed  a VM of that name", ""),
        ("failed-over  web01", ""),
        ("good      web01/s1  vda", ""),
        ("", ""),
    ],
)
def test_failures_and_warnings_are_seen(line: str, tone: str) -> None:
    assert [one.tone for one in lay_out([line], 0)] == [tone]


def test_what_belongs_to_a_line_has_its_tone() -> None:
    lines = ["failed     web01  target full", "                  a warning", "published  db01  full"]
    assert [line.tone for line in lay_out(lines, 0)] == ["bad", "bad", ""]

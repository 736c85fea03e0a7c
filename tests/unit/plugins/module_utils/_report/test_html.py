# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The page of a run: nothing in it but text, and all of it."""

from __future__ import annotations

import re
import typing as t
from html.parser import HTMLParser

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._common.printable import printable
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html import page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_charts import BARS
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_text import rate, span, text
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run
from ansible_collections.vmfleet.backup.tests.harness.reports import (
    MIB,
    a_vm,
    failed,
    of_a_fleet,
    report,
    runs,
    told,
)

EVIL = "</b></td></table><script>alert(\"1\")</script><img src=x onerror='x'>&amp;\x00\x1b[31m\ud800\u202e"
VOID = {"meta", "rect", "br"}


class Reader(HTMLParser):
    """Reads a page as a browser does, and insists that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.said = ""
        self.unfolded: list[bool] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(dict(attrs))
        self.links |= {value or "" for name, value in attrs if name in {"href", "src"}}
        if tag == "details":
            self.unfolded.append("open" in dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.attributes |= set(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said += data


def read(found: dict[str, t.Any], history: list[Run] | None = None) -> Reader:
    html = page(found, [Run.from_report(found)] if history is None else history)
    html.encode("utf-8")
    assert html == page(found, [Run.from_report(found)] if history is None else history)
    return Reader(html)


def test_nothing_of_a_name_becomes_part_of_the_page() -> None:
    harmless = read(report(hv1=told(failed("a", warnings=["b"], damage="c"), a_vm("d", damage="e"), error="f")))
    evil = failed(EVIL, EVIL, warnings=[EVIL], damage=EVIL, reason=EVIL)
    found = report({"hv2": EVIL}, **{EVIL: told(evil, a_vm(EVIL, damage=EVIL), error=EVIL, repository=EVIL), "hv2": {}})
    reader = read(found)
    assert reader.tags == harmless.tags
    assert reader.attributes == harmless.attributes
    assert "script" not in reader.tags
    shown = printable(EVIL)
    assert shown != EVIL
    assert reader.said.count(shown) >= 8


def test_it_asks_for_nothing() -> None:
    html = page(of_a_fleet(2, 2), runs(5))
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", html)
    assert Reader(html).links == {"2026-11-22.json", *(f"r{number:03}.html" for number in range(5))}


def test_the_verdict_comes_first() -> None:
    assert "All 4 VMs have their set" in read(of_a_fleet(2, 2)).said
    assert "The VM has its set" in read(report(hv1=told(a_vm()))).said
    assert "There was no VM to back up" in read(report(hv1=told())).said
    assert "1 of 2 VMs has no set" in read(report(hv1=told(a_vm(), failed()))).said
    assert "1 hypervisor without a result" in read(report(hv1=told(a_vm()), hv2={})).said
    assert "The newest set of 1 VM is damaged" in read(report(hv1=told(a_vm(damage="x")))).said
    assert "1 of 2 VMs have their set, 1 left out" in read(report(hv1=told(a_vm(), a_vm("b", state="skipped")))).said


def test_failures_come_first_with_the_way_out() -> None:
    found = report({"hv9": "no route to host"}, hv1=told(a_vm("a"), failed("z")), hv9={})
    said = read(found).said
    assert said.index("no route to host") < said.index("No space left on device") < said.index("Hypervisors", 600)
    assert "Last good set: 2026-11-21" in said
    assert "ansible-playbook -i INVENTORY vmfleet.backup.backup -e vm_backup_id=2026-11-22" in said
    # In the table as well.
    table = said[said.rindex("VerifiedzFailed") :]
    assert table.index("zFailed") < table.index("aPublished")


def test_where_nothing_failed_nothing_is_said_of_it() -> None:
    html = page(of_a_fleet(1, 2), runs(3))
    assert "What went wrong" not in html
    assert 'class="word bad"' not in html
    assert "red foot" not in html


def test_all_have_failed() -> None:
    reader = read(report(hv1=told(failed("a"), failed("b")), hv2=told(failed("c"))))
    assert "3 of 3 VMs have no set" in reader.said
    assert reader.unfolded == [True, True]


def test_all_about_a_vm() -> None:
    vm = a_vm("web01", frozen_ms=42, warnings=["it was slow"], changed=False)
    vm["set"] = {**vm["set"], "consistency": "filesystem", "chain": 7, "verified": "image", "level": "differential"}
    said = read(report(hv1=told(vm))).said
    assert "web01Was theredifferential600.0 MiB1 min 00 s10.0 MiB/sfilesystem, 42 ms7imageit was slow" in said


def test_the_charts_show_the_last_runs() -> None:
    html = page(of_a_fleet(1, 1), runs(BARS + 5, bad=[BARS]))
    assert f"The last {BARS} runs" in html
    assert html.count('<rect class="b"') == 2 * BARS
    assert html.count('y="106"') == 2
    assert "r004" not in html
    assert f"r{BARS:03}: {span(BARS + 1)}, 1 failed" in html
    # The highest is as high as the chart, and half of it half as high.
    heights = [float(found) for found in re.findall(r'class="b"[^>]*height="([0-9.]+)"', html)]
    assert max(heights) == 100
    assert heights[BARS // 2 - 5 + 2] == pytest.approx(100 * (BARS // 2 + 3) / (BARS + 5), abs=0.1)


def test_one_run_makes_no_chart() -> None:
    assert "figure" not in read(of_a_fleet(1, 1)).tags


def test_few_vms_are_unfolded_and_many_only_where_something_is_wrong() -> None:
    assert read(of_a_fleet(2, 3)).unfolded == [True, True]
    found = of_a_fleet(3, 30)
    found["hypervisors"][1]["vms"][4] = failed()
    # Those with something wrong stand first.
    assert read(found).unfolded == [True, False, False]


def test_a_large_fleet_is_no_large_page() -> None:
    found = of_a_fleet(300, 10)
    html = page(found, runs(BARS))
    Reader(html)
    assert html.count("-vm") == 3000
    assert len(html) < 1000 * 1000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (3.14, "3.1 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_spans(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_rates() -> None:
    assert rate(100 * MIB, 10) == "10.0 MiB/s"
    assert rate(0, 10) == rate(10, 0) == ""


def test_text_is_text() -> None:
    assert text("<a href='x'>\"&\n") == "&lt;a href=&#x27;x&#x27;&gt;&quot;&amp;\\n"
    assert text(None) == "None"


def test_an_error_of_two_lines_has_two_lines() -> None:
    html = page(report(hv1=told(a_vm("a"), error="1 of 2 failed\n<b>full</b>")), [])
    assert "<p>1 of 2 failed<br>&lt;b&gt;full&lt;/b&gt;</p>" in html

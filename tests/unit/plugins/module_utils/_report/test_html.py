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
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_runs import LIST, runs_page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.html_text import rate, span, text
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run
from ansible_collections.vmfleet.backup.plugins.module_utils._repository.names import ID_PATTERN
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
    harmless = read(
        report(hv1=told(failed("a", warnings=["b"], damage="c", reason="g"), a_vm("d", damage="e"), error="f"))
    )
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
    assert Reader(html).links == {"2026-11-22.json", LIST, *(f"r{number:03}.html" for number in range(5))}


def test_the_verdict_comes_first() -> None:
    assert "All 4 VMs are backed up" in read(of_a_fleet(2, 2)).said
    assert "The VM is backed up" in read(report(hv1=told(a_vm()))).said
    assert "There was no VM to back up" in read(report(hv1=told())).said
    assert "1 of 2 VMs not backed up" in read(report(hv1=told(a_vm(), failed()))).said
    assert "1 hypervisor without a result" in read(report(hv1=told(a_vm()), hv2={})).said
    assert "The newest set of 1 VM is damaged" in read(report(hv1=told(a_vm(damage="x")))).said
    assert "1 of 2 VMs backed up, 1 skipped" in read(report(hv1=told(a_vm(), a_vm("b", state="skipped")))).said
    going_on = told(a_vm(), a_vm("b", state="running"), a_vm("c", state="queued"))
    assert "1 of 3 VMs backed up, 2 not finished" in read(report(hv1=going_on)).said


def test_failures_come_first_with_the_way_out() -> None:
    found = report({"hv9": "no route to host"}, hv1=told(a_vm("a"), failed("z")), hv9={})
    said = read(found).said
    assert said.index("no route to host") < said.index("No space left on device") < said.index("Hypervisors", 600)
    assert "Last good set: 2026-11-21" in said
    assert "ansible-playbook -i INVENTORY vmfleet.backup.backup -e vm_backup_id=2026-11-22" in said
    # In the table as well.
    table = said[said.rindex("VerifiedzFailed") :]
    assert table.index("zFailed") < table.index("aBacked up")


def test_a_reason_is_given_once_for_all_vms_that_have_it() -> None:
    full = [failed(f"vm{number:02}", f"/srv/backup/vm{number:02}/vda.qcow2: No space left") for number in range(30)]
    silent = [failed(f"old{number}", "QEMU does not answer", last=None) for number in range(2)]
    single = failed("web", "/srv/backup/web-2/vda.qcow2: No space left")
    html = page(report(hv1=told(*full[:20], *silent), hv2=told(*full[20:], single)), [])
    said = Reader(html).said
    assert said.count("No space left") == 2
    assert said.count("QEMU does not answer") == 1
    # What hits most VMs comes first, with one of them as an example where the errors differ by their names.
    assert "30 VMs on 2 hypervisors FailedFor example, of vm00: /srv/backup/vm00/vda.qcow2: No space left" in said
    assert "All 30 namesvm00 on hv1, last good set 2026-11-21" in said
    assert "2 VMs on hv1 FailedQEMU does not answerNone of them has a good set.old0 on hv1, no good set" in said
    assert said.index("30 VMs") < said.index("2 VMs on") < said.index("web on hv2 Failed")
    # The name of another VM that begins or goes on in the same way is no reason to take both for the same.
    assert "/srv/backup/web-2/vda.qcow2" in said
    assert "1 of them has no good set." in read(report(hv1=told(full[0], {**full[1], "last": None}))).said


def test_what_failed_in_different_ways_is_no_group() -> None:
    said = read(
        report({"hv8": "down", "hv9": "down"}, hv1=told(a_vm("a", damage="x"), failed("b", "x")), hv8={}, hv9={})
    ).said
    assert "2 hypervisors No resultdownhv8 (hypervisor)hv9 (hypervisor)" in said
    assert "a on hv1 Damagedx" in said
    assert "b on hv1 Failedx" in said


def test_what_concerns_many_vms_of_a_hypervisor_is_said_once() -> None:
    warned = [a_vm(f"vm{number}", warnings=["not frozen", "slow"][: 1 + (number < 3)]) for number in range(4)]
    skipped = [a_vm(f"off{number}", state="skipped", set=None, reason="it is off") for number in range(5)]
    said = read(report(hv1=told(*warned, *skipped))).said
    assert said.count("not frozen") == said.count("it is off") == 1
    assert "4 of 9 VMs: not frozen" in said
    assert "5 of 9 VMs: it is off" in said
    assert said.count("slow") == 3


def test_a_vm_that_failed_with_a_reason_only() -> None:
    said = read(report(hv1=told(failed("a", "", reason="it is busy")))).said
    assert said.count("it is busy") == 1
    assert read(report(hv1=told(failed("a", "no", reason="it is busy")))).said.count("it is busy") == 1


def test_numbers_that_mean_nothing_are_left_out() -> None:
    def tiles(found: dict[str, t.Any]) -> list[str]:
        return re.findall("<dt>([^<]*)", page(found, []))

    assert tiles(report()) == []
    assert tiles(report(hv1=told(failed("a")))) == ["Backed up", "Failed"]
    assert tiles(of_a_fleet(1, 1)) == ["Backed up", "Failed", "Backup size", "Copy time", "Copy speed"]
    assert "Hypervisors" in tiles(of_a_fleet(2, 1))
    assert "Hypervisors" in tiles(report({"hv1": "down"}, hv1={}))
    vm = a_vm()
    vm["set"] = {**vm["set"], "consistency": "filesystem", "verified": "image"}
    assert tiles(report(hv1=told(vm)))[-2:] == ["File systems frozen", "Verified"]
    # A copy of an instant has no speed.
    vm["set"] = {**vm["set"], "duration": 0.2}
    assert "Copy speed" not in tiles(report(hv1=told(vm)))


def test_columns_that_mean_nothing_are_left_out() -> None:
    def left_out(*vms: dict[str, t.Any]) -> set[str]:
        [found] = re.findall('<table class="vms([^"]*)"', page(report(hv1=told(*vms)), []))
        return set(found.split())

    first = a_vm()
    first["set"] = {**first["set"], "chain": 1, "duration": 0.1}
    assert left_out(first) == {"no-speed", "no-images", "no-verified"}
    verified = a_vm("b")
    verified["set"] = {**verified["set"], "verified": "image"}
    assert left_out(first, verified) == set()
    assert "no-set" in left_out(failed())


def test_where_nothing_failed_nothing_is_said_of_it() -> None:
    html = page(of_a_fleet(1, 2), runs(3))
    assert "What went wrong" not in html
    assert 'class="word bad"' not in html
    assert "with failures" not in html


def test_all_have_failed() -> None:
    reader = read(report(hv1=told(failed("a"), failed("b")), hv2=told(failed("c"))))
    assert "3 of 3 VMs not backed up" in reader.said
    assert reader.unfolded == [True, True]


def test_all_about_a_vm() -> None:
    vm = a_vm("web01", frozen_ms=42, warnings=["it was slow"], changed=False)
    vm["set"] = {**vm["set"], "consistency": "filesystem", "chain": 7, "verified": "image", "level": "differential"}
    said = read(report(hv1=told(vm))).said
    assert "web01Existed beforedifferential600.0 MiB1 min 00 s10.0 MiB/sfilesystem, 42 ms7imageit was slow" in said


def test_the_charts_show_the_last_runs() -> None:
    html = page(of_a_fleet(1, 1), runs(BARS + 5, bad=[BARS]))
    assert f"The last {BARS} runs" in html
    assert html.count("<i style") == 2 * BARS
    assert html.count('class="bad "') == 2
    assert "A red bar marks a run with failures." in html
    assert "r004" not in html
    assert f"r{BARS:03}: {span(BARS + 1)}, 1 failed" in html
    # The axis ends at a round number, and each bar is as high as it is there.
    heights = [float(found) for found in re.findall(r"height:([0-9.]+)%", html)]
    assert heights[:BARS] == [pytest.approx(100 * (number + 6) / 40, abs=0.1) for number in range(BARS)]
    assert axes(html) == [["40 s", "20 s", "0"], ["40 MiB", "20 MiB", "0"]]


def axes(html: str) -> list[list[str]]:
    return [re.findall("<span>([^<]*)", found) for found in re.findall(r'class="axis">(.*?)</div>', html)]


@pytest.mark.parametrize(
    ("most", "axis"),
    [
        ((0.4, 700), [["1 s", "0.5 s", "0"], ["1 KiB", "512 B", "0"]]),
        ((59, 1025), [["1 min", "30 s", "0"], ["2 KiB", "1 KiB", "0"]]),
        ((61, 3 << 30), [["2 min", "1 min", "0"], ["4 GiB", "2 GiB", "0"]]),
        ((1500, 900 << 30), [["40 min", "20 min", "0"], ["1 TiB", "512 GiB", "0"]]),
        ((3601, 5 << 40), [["2 h", "1 h", "0"], ["10 TiB", "5 TiB", "0"]]),
        ((86400 * 30, 5 << 60), [["720 h", "360 h", "0"], ["5242880 TiB", "2621440 TiB", "0"]]),
    ],
)
def test_an_axis_ends_at_a_round_number(most: tuple[float, int], axis: list[list[str]]) -> None:
    shown = [Run("a", "2026-11-20T01:30:00Z", 1, 0, 0, 0.0), Run("b", "2026-11-21T01:30:00Z", 1, 0, most[1], most[0])]
    assert axes(page(of_a_fleet(1, 1), shown)) == axis


def test_runs_that_copied_nothing_make_no_chart() -> None:
    shown = [Run(name, "2026-11-20T01:30:00Z", 1, 1, 0, 0.0) for name in ("a", "b")]
    reader = read(of_a_fleet(1, 1), shown)
    assert "figure" not in reader.tags
    assert "The last 2 runs" in reader.said


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (2, ["r000", "r001"]),
        (3, ["r000", "r001", "r002"]),
        (4, ["r000", "", "r003"]),
        (30, ["r000", "r015", "r029"]),
    ],
)
def test_bars_have_the_ids_of_their_runs_below(number: int, named: list[str]) -> None:
    html = page(of_a_fleet(1, 1), runs(number))
    found = re.findall(r'class="ids[^"]*">(.*?)</div>', html)
    assert [re.findall("<span>([^<]*)", one) for one in found] == [named] * 2


def test_this_run_is_marked_among_the_others() -> None:
    found = of_a_fleet(1, 1)
    html = page(found, [*runs(4), Run.from_report(found)])
    assert re.findall(r'href="([^"]*)" class="now"', html) == ["2026-11-22.html"] * 2
    assert html.count("this run: ") == 2
    assert "A line below a bar marks this run." in html


def test_links_lead_to_the_runs_before_and_after() -> None:
    found = of_a_fleet(1, 1)
    this, one, other = Run.from_report(found), *runs(2)
    for history, links in (
        ([this], []),
        ([one, this], ["r000.html", LIST]),
        ([this, other], [LIST, "r001.html"]),
        ([one, this, other], ["r000.html", LIST, "r001.html"]),
    ):
        html = page(found, history)
        assert re.findall(r'href="([^"]*)"', html.partition("<nav>")[2].partition("</nav>")[0]) == links


def test_the_list_of_runs() -> None:
    html = runs_page([*runs(2, bad=[1]), Run("none", "2026-11-20T01:30:00Z", 0, 0, 0, 0.0)], ["old-2", "old-1"])
    reader = Reader(html)
    assert reader.links == {"none.html", "r001.html", "r000.html", "old-2.html", "old-1.html"}
    # The newest one first, and no numbers where nothing was copied.
    assert "none2026-11-20 01:30 UTC00r001" in reader.said
    assert "r0012026-11-02 01:30 UTC1012.0 s2.0 MiB" in reader.said
    assert "Older runs" not in Reader(runs_page(runs(2), [])).said
    assert LIST.startswith("_")
    assert not re.fullmatch(ID_PATTERN, LIST[: -len(".html")])


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
    assert rate(0, 10) == rate(10, 0) == rate(100 * MIB, 0.9) == rate(MIB - 1, 10) == ""


def test_text_is_text() -> None:
    assert text("<a href='x'>\"&\n") == "&lt;a href=&#x27;x&#x27;&gt;&quot;&amp;\\n"
    assert text(None) == "None"


def test_an_error_of_two_lines_has_two_lines() -> None:
    html = page(report(hv1=told(a_vm("a"), error="1 of 2 failed\n<b>full</b>")), [])
    assert "<p>1 of 2 failed<br>&lt;b&gt;full&lt;/b&gt;</p>" in html

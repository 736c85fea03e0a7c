# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The page of a run, as a real browser shows it."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.vmfleet.backup.plugins.module_utils._report.html import page
from ansible_collections.vmfleet.backup.plugins.module_utils._report.run import Run
from ansible_collections.vmfleet.backup.tests.harness.browser import Browser, Picture
from ansible_collections.vmfleet.backup.tests.harness.reports import a_vm, failed, of_a_fleet, report, runs, told

if t.TYPE_CHECKING:
    from pathlib import Path

DESKTOP, PHONE, SMALL = (1200, 800), (390, 844), (320, 568)
DEVICES = {"desktop": DESKTOP, "phone": PHONE, "small phone": SMALL}

LONG = "a-name-without-any-place-to-break-it-" * 6


@pytest.fixture(scope="module")
def browser() -> t.Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def show(browser: Browser, directory: Path) -> t.Callable[..., Browser]:
    def shown(
        found: dict[str, t.Any], size: tuple[int, int] = DESKTOP, dark: bool = False, history: int = 1
    ) -> Browser:
        path = directory / f"{found['id']}.html"
        path.write_text(page(found, [*runs(history - 1, bad=[3]), Run.from_report(found)]))
        browser.open(path, *size, dark=dark, phone=size != DESKTOP)
        assert browser.fetched == [path.as_uri()]
        assert browser.complaints == []
        return browser

    return shown


def eventful() -> dict[str, t.Any]:
    """A run with all that a page can show."""
    evil = '<script>document.title="caught"</script><img src=x>'
    warned = a_vm("web02", warnings=["the file systems were not frozen: " + LONG], frozen_ms=24)
    return report(
        {"hv2": f"no route to host\n{evil}"},
        hv1=told(*(a_vm(f"vm{number:02}") for number in range(9)), failed(LONG, LONG), failed(evil, evil), warned),
        hv2={},
        **{LONG: told(a_vm("web03", damage=LONG))},
    )


def luminance(colour: tuple[int, int, int]) -> float:
    """How bright a colour is (WCAG 2)."""
    red, green, blue = (part / 255 / 12.92 if part < 11 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_light_or_dark_as_its_reader_is(
    show: t.Callable[..., Browser], size: tuple[int, int], dark: bool
) -> None:
    picture = Picture.decode(show(eventful(), size, dark, history=30).screenshot(380, 300))
    assert (picture.width, picture.height) == (380, 300)
    ground = picture.at(2, 2)
    assert luminance(ground) < 0.02 if dark else luminance(ground) > 0.9
    # Something is on it, in shades that are much darker or brighter.
    shades = {luminance((one[0], one[1], one[2])) for one in picture.colours}
    assert max(shades) - min(shades) > 0.7
    assert len(picture.colours) > 100


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("content", ["eventful", "all well", "large", "empty"])
def test_nothing_stands_out_at_the_side(show: t.Callable[..., Browser], device: str, content: str) -> None:
    found = {
        "eventful": eventful,
        "all well": lambda: of_a_fleet(2, 3),
        "large": lambda: of_a_fleet(50, 10),
        "empty": report,
    }[content]()
    browser = show(found, DEVICES[device], history=30)
    browser.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    width = DEVICES[device][0]
    assert browser.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [width, width]
    # Nor is anything cut off.
    outside = "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > innerWidth)"
    assert browser.evaluate(f"{outside}.map(one => one.outerHTML.slice(0, 200))") == []


def test_on_a_phone_a_vm_is_a_card(show: t.Callable[..., Browser]) -> None:
    # Columns that say nothing are hidden.
    shown = "[...document.querySelector('.vms tbody tr').cells].filter(one => one.getClientRects().length)"
    shape = f"{shown}.map(one => one.getBoundingClientRect().top)"
    assert len(set(show(of_a_fleet(1, 1)).evaluate(shape))) == 1
    assert len(set(show(of_a_fleet(1, 1), PHONE).evaluate(shape))) == 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [2, 3, 30])
def test_the_bars_of_any_number_of_runs_take_the_whole_chart(
    show: t.Callable[..., Browser], device: str, number: int
) -> None:
    browser = show(of_a_fleet(1, 1), DEVICES[device], history=number)
    assert browser.evaluate("document.querySelector('.bars').children.length") == number
    edges = """(() => {
      const all = document.querySelector('.bars'), box = all.getBoundingClientRect();
      const [first, last] = [all.firstChild, all.lastChild].map(one => one.getBoundingClientRect());
      return [first.left - box.left, box.right - last.right] })()"""
    assert browser.evaluate(edges) == pytest.approx([0, 0], abs=1)
    # Each bar is as high as its number asks for, and the labels of the axis stand beside its lines.
    heights = "[...document.querySelectorAll('.bars i')].map(one => one.getBoundingClientRect().height)"
    asked = "[...document.querySelectorAll('.bars i')].map(one => parseFloat(one.style.height) * 1.2)"
    assert browser.evaluate(heights) == pytest.approx([max(one, 2) for one in browser.evaluate(asked)], abs=1.5)
    middles = """[...document.querySelector('.axis').children].map(one => {
      const box = one.getBoundingClientRect();
      return (box.top + box.bottom) / 2 - document.querySelector('.bars').getBoundingClientRect().top })"""
    assert browser.evaluate(middles) == pytest.approx([0, 60, 120], abs=1.5)


def test_names_do_nothing(show: t.Callable[..., Browser]) -> None:
    browser = show(eventful())
    assert "caught" not in browser.evaluate("document.title")
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object').length") == 0
    assert "<script>" in browser.evaluate("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_word_can_be_read(show: t.Callable[..., Browser], dark: bool) -> None:
    """A contrast of at least 4.5, as WCAG 2 asks for."""
    browser = show(eventful(), dark=dark, history=30)
    colours = browser.evaluate("""[...document.querySelectorAll('main *')].filter(one =>
        [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(one => {
          let ground = one, back;
          do { back = getComputedStyle(ground).backgroundColor; ground = ground.parentElement }
          while (back === 'rgba(0, 0, 0, 0)' && ground);
          return [getComputedStyle(one).color, back].map(colour => colour.match(/\\d+/g).slice(0, 3).map(Number)) })""")
    assert len(colours) > 100
    for ink, ground in {(tuple(one), tuple(other)) for one, other in colours}:
        brighter, darker = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (ink, ground)


def test_failures_are_seen_without_scrolling(show: t.Callable[..., Browser]) -> None:
    for size in DEVICES.values():
        browser = show(eventful(), size, history=30)
        top = browser.evaluate("document.querySelector('.failures').getBoundingClientRect().top")
        assert top < 844

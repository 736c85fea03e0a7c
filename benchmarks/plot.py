# Copyright (c) 2026, vmfleet contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Plots of measured figures as SVG, readable on a light and on a dark page."""

from __future__ import annotations

import dataclasses
import html
import typing as t

if t.TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 48, 48
COLOURS = ("#2f9e6e", "#d9663a")

LICENCE = """<!--
Copyright (c) 2026, vmfleet contributors
GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
SPDX-License-Identifier: GPL-3.0-or-later
-->
"""

STYLE = """<style>
text { font: 12px sans-serif; fill: #57606a }
.title { font-weight: bold }
.axis { stroke: #8b949e; stroke-width: 1 }
.grid { stroke: #8b949e; stroke-width: 0.5; opacity: 0.35 }
@media (prefers-color-scheme: dark) { text { fill: #b1bac4 } }
</style>
"""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves over one axis; `curves` holds points (x, y) by the name of the curve."""

    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[tuple[float, float]]]

    def draw(self, left: int) -> str:
        """The panel, moved to the right by `left`."""
        points = [point for curve in self.curves.values() for point in curve]
        most_x, most_y = max(x for x, _y in points), _round_up(max(y for _x, y in points))

        def place(x: float, y: float) -> tuple[float, float]:
            across = LEFT + x / most_x * (WIDTH - LEFT - RIGHT)
            return round(across, 1), round(HEIGHT - BOTTOM - y / most_y * (HEIGHT - TOP - BOTTOM), 1)

        parts = [_text(self.title, WIDTH / 2, 18, "middle", "title"), _text(self.y, 8, 38)]
        parts.append(_text(self.x, WIDTH / 2, HEIGHT - 10, "middle"))
        for share in range(5):
            value = most_y * share / 4
            x, y = place(0, value)
            parts.append(f'<path class="{"grid" if share else "axis"}" d="M{x} {y}H{WIDTH - RIGHT}"/>')
            parts.append(_text(f"{value:g}", x - 6, y + 4, "end"))
        for value in sorted({x for x, _y in points}):
            x, y = place(value, 0)
            # Labels that would lie upon each other are left out.
            if value / most_x > 0.08 or value == min(x for x, _y in points):
                parts.append(_text(f"{value:g}", x, y + 16, "middle"))
        for colour, (name, curve) in zip(COLOURS, self.curves.items(), strict=True):
            line = "L".join("{} {}".format(*place(*point)) for point in curve)
            parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for point in curve:
                x, y = place(*point)
                parts.append(
                    f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"><title>{point[1]:.1f}</title></circle>'
                )
            x, y = place(*curve[-1])
            # A short curve has its room for words behind it.
            parts.append(_text(name, x - 8, y - 10, "end") if x > WIDTH / 2 else _text(name, x + 8, y + 4))
        return f'<g transform="translate({left} 0)">\n' + "\n".join(parts) + "\n</g>\n"


def _round_up(value: float) -> float:
    """The next larger number that is easy to read in quarters."""
    size = 10.0 ** (len(str(int(value))) - 1)
    return next(size * step for step in (1, 2, 4, 6, 8, 10, 20) if size * step >= value)


def _text(text: str, x: float, y: float, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


def svg(panels: Sequence[Panel]) -> str:
    """The panels beside each other."""
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    drawn = "".join(panel.draw(WIDTH * number) for number, panel in enumerate(panels))
    return f'{LICENCE}<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{STYLE}{drawn}</svg>\n'

"""Plots as SVG text: sharp at any size, small enough to stand in the page, light or dark as the reader has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 540, 390
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 50  # margins, in pixels
CHARACTER, LINE = 7.0, 16  # of a label, in pixels

STYLE = """
.plot text{font:13px system-ui,sans-serif;fill:#52525b}.plot .name{fill:#18181b}.plot .axis{font-weight:600}
.plot .grid{stroke:#e4e4e7}.plot .bar{stroke:#a1a1aa;stroke-width:1.2}.plot .dot{fill:#a1a1aa}
.plot .front .dot{fill:#2563eb}.plot .front .bar{stroke:#93b4f5}.plot .base .dot{fill:#18181b}
.plot .front .name{font-weight:600}.plot .line{fill:none;stroke:#2563eb;stroke-width:1.5;stroke-dasharray:5 4}
.plot .ring{fill:none;stroke:#2563eb;stroke-width:2}
@media (prefers-color-scheme:dark){.plot text{fill:#a1a1aa}.plot .name{fill:#f4f4f5}.plot .grid{stroke:#33333a}
.plot .bar{stroke:#71717a}.plot .front .dot{fill:#7aa2ff}.plot .front .bar{stroke:#3f5fa8}.plot .base .dot{fill:#f4f4f5}
.plot .line,.plot .ring{stroke:#7aa2ff}}
@media print{.plot text{fill:#52525b}.plot .name{fill:#18181b}}
"""


@dataclass(frozen=True)
class Point:
    """One column: its name, (value, low, high) on either axis, and what it is."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    on_front: bool = False
    is_base: bool = False
    recommended: bool = False


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points with intervals and names, the Pareto front as a dashed line. An `<svg>` element that stands alone."""
    x_axis = _Axis([v for p in points for v in p.x], _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis([v for p in points for v in p.y], HEIGHT - _BOTTOM, _TOP)
    label = f"{escape(y_label)} against {escape(x_label)}"
    parts = [
        f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ',
        f'aria-label="{label}"><style>{STYLE}</style>',
    ]
    for value in x_axis.ticks:
        at = x_axis(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x_axis.text(value)}</text>')
    for value in y_axis.ticks:
        at = y_axis(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y_axis.text(value)}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" transform="translate(14 {(_TOP + HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        'text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x[0])
    if len(front) > 1:
        line = "L".join(f"{x_axis(p.x[0]):.1f} {y_axis(p.y[0]):.1f}" for p in front)
        parts.append(f'<path class="line" d="M{line}"/>')
    places = [(x_axis(p.x[0]), y_axis(p.y[0])) for p in points]
    labels = _place([p.name for p in points], places)
    for point, (x, y), (left, baseline) in zip(points, places, labels, strict=True):
        kind = " ".join(
            word for word, yes in (("point", True), ("front", point.on_front), ("base", point.is_base)) if yes
        )
        parts.append(f'<g class="{kind}"><title>{escape(_in_words(point))}</title>')
        if not math.isnan(sum(point.x)):
            parts.append(f'<path class="bar" d="M{x_axis(point.x[1]):.1f} {y:.1f}H{x_axis(point.x[2]):.1f}"/>')
        if not math.isnan(sum(point.y)):
            parts.append(f'<path class="bar" d="M{x:.1f} {y_axis(point.y[1]):.1f}V{y_axis(point.y[2]):.1f}"/>')
        if point.recommended:
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        parts.append(f'<text class="name" x="{left:.1f}" y="{baseline:.1f}">{escape(point.name)}</text></g>')
    return "".join([*parts, "</svg>"])


def forest(value: float, low: float, high: float, reach: float, kind: str) -> str:
    """A difference and its interval around 0 as a small `<svg>`, from -reach to +reach; `kind` is its CSS class."""
    width, middle = 88, 8

    def at(number: float) -> float:
        return width / 2 + max(-1.0, min(1.0, number / reach if reach else 0.0)) * (width / 2 - 4)

    return (
        f'<svg class="forest {kind}" viewBox="0 0 {width} 16" width="{width}" height="16" aria-hidden="true">'
        f'<path class="zero" d="M{width / 2} 0V16"/>'
        f'<path class="bar" d="M{at(low):.1f} {middle}H{at(high):.1f}"/>'
        f'<circle class="dot" cx="{at(value):.1f}" cy="{middle}" r="3.2"/></svg>'
    )


class _Axis:
    """A linear scale from values to pixels, with some room on either side and round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        known = [value for value in values if math.isfinite(value)]
        low, high = min(known), max(known)
        room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        rough = (self.high - self.low) / 6
        unit = 10 ** math.floor(math.log10(rough))
        self.step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        self.ticks = [i * self.step for i in range(first, last + 1)]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, value: float) -> str:
        return f"{value:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}".replace("-", "−")


def _place(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Left end and baseline of each label: of eight places around its point the one that covers least."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    chosen = []
    for name, (x, y) in zip(names, places, strict=True):
        wide = CHARACTER * len(name)
        spots = [
            (x + dx if dx > 0 else x - wide / 2 if dx == 0 else x + dx - wide, y + dy)
            for dx, dy in ((10, -8), (10, 15), (-10, -8), (-10, 15), (12, 4), (-12, 4), (0, -14), (0, 24))
        ]

        def cost(spot: tuple[float, float], wide: float = wide) -> float:
            box = (spot[0], spot[1] - LINE + 3, spot[0] + wide, spot[1] + 3)
            outside = max(0.0, _LEFT - box[0]) + max(0.0, box[2] - WIDTH + 4) + max(0.0, _TOP - 8 - box[1])
            return sum(_overlap(box, other) for other in taken) + 50 * outside

        left, baseline = min(spots, key=cost)
        taken.append((left, baseline - LINE + 3, left + wide, baseline + 3))
        chosen.append((left, baseline))
    return chosen


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _in_words(point: Point) -> str:
    return f"{point.name}: {point.y[0]:.4g} at diversity {point.x[0]:.4g}"

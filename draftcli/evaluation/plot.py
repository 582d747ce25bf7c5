"""The plots of the report: a reward against diversity, and small intervals in its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from draftcli.pages.chart import Frame
from draftcli.pages.numbers import significant

WIDTH, HEIGHT = 600, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 14, 50  # margins, in pixels
CHARACTER, LINE = 7.0, 16  # of a label, in pixels


@dataclass(frozen=True)
class Point:
    """One column: its name, (value, low, high) on either axis, and what it is."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    on_front: bool = False
    is_base: bool = False
    recommended: bool = False


def scatter(points: Sequence[Point], x_label: str, y_label: str, base_lines: bool = False) -> str:
    """Points with intervals and names, the Pareto front as a dashed line where it is more than noise.

    Args:
        points: at least one.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, likewise.
        base_lines: whether lines go through the base on both axes.

    Returns:
        an `<svg>` element that stands alone.
    """
    frame = Frame(
        (WIDTH, HEIGHT), (_LEFT, _RIGHT, _TOP, _BOTTOM), [v for p in points for v in p.x],
        [v for p in points for v in p.y], (x_label, y_label),
    )  # fmt: skip
    x_axis, y_axis = frame.x, frame.y
    parts = [frame.opened(f"{y_label} against {x_label}: {'; '.join(map(_in_words, points))}")]
    base = next((p for p in points if p.is_base), None)
    if base_lines and base is not None:
        parts.append(frame.zero_line(base.x[0], base.y[0]))
    front = clear_front(points)
    if front:
        line = "L".join(f"{x_axis(p.x[0]):.1f} {y_axis(p.y[0]):.1f}" for p in front)
        parts.append(f'<path class="line" d="M{line}"/>')
    places = [(x_axis(p.x[0]), y_axis(p.y[0])) for p in points]
    labels = _place([p.name for p in points], places)
    for point, (x, y), (left, baseline) in zip(points, places, labels, strict=True):
        kind = "base" if point.is_base else "front" if point in front else ""
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


def clear_front(points: Sequence[Point]) -> list[Point]:
    """The points of the Pareto front by x, where two of them differ on both axes by more than their intervals; else
    none: such a front would be noise. The base is what others are measured from, and has no interval.
    """
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x[0])
    pairs = [(a, b) for i, a in enumerate(front) for b in front[i + 1 :]]
    return front if any(_apart(a.x, b.x) and _apart(a.y, b.y) for a, b in pairs) else []


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether two intervals do not touch."""
    (a_low, a_high), (b_low, b_high) = (
        (value, value) if math.isnan(low + high) else (low, high) for value, low, high in (a, b)
    )
    return a_high < b_low or b_high < a_low


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
    return f"{point.name}: {significant(point.y[0])} at {significant(point.x[0])}"

"""A chart of one quantity over the steps of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftcli.pages.chart import Frame
from draftcli.pages.numbers import significant

CURVE_SIZE = (540, 250)


@dataclass(frozen=True)
class StepCurve:
    """One quantity over the steps.

    Attributes:
        steps: where it is known, ascending.
        values: one a step; NaN leaves a gap.
        low: lower bounds of their intervals; empty where there are none.
        high: upper bounds.
        level: a value to compare with, such as the base's, drawn as a line; None: none.
        marked: whether each value is shown as a dot, as where there are few.
    """

    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    level: float | None = None
    marked: bool = False

    @property
    def words(self) -> str:
        """Its first and its last value, for those who cannot see the chart."""
        known = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        (first, was), (last, now) = known[0], known[-1]
        return f"{significant(was)} at step {first}, {significant(now)} at step {last}"


def curve_chart(curve: StepCurve, label: str) -> str:
    """A curve as an `<svg>` element; empty where no value is finite."""
    if not any(map(math.isfinite, curve.values)):
        return ""
    level = [] if curve.level is None else [curve.level]
    frame = Frame(
        CURVE_SIZE, (80, 14, 14, 50), curve.steps, [*curve.values, *curve.low, *curve.high, *level],
        ("step", label), whole=True,
    )  # fmt: skip
    parts = [frame.opened(f"{label} over the steps: {curve.words}"), frame.zero_line(at_y=curve.level)]
    for run in _known_runs(curve):
        at = [(frame.x(curve.steps[i]), frame.y(curve.values[i])) for i in run]
        if curve.low and all(math.isfinite(curve.low[i] + curve.high[i]) for i in run) and len(run) > 1:
            edge = [(frame.x(curve.steps[i]), frame.y(curve.low[i])) for i in run]
            edge += [(frame.x(curve.steps[i]), frame.y(curve.high[i])) for i in reversed(run)]
            parts.append(f'<path class="band" d="M{_path(edge)}Z"/>')
        parts.append(f'<path class="curve" d="M{_path(at)}"/>')
        if curve.marked or len(run) == 1:
            parts += [f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in at]
    return "".join([*parts, "</svg>"])


def _known_runs(curve: StepCurve) -> list[list[int]]:
    """The numbers of the values between two gaps."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(curve.values):
        if math.isfinite(value):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

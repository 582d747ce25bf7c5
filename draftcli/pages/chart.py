"""What all charts share: their style, their axes. A chart is an `<svg>` element that stands alone, sharp at any size,
light or dark as the reader has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

STYLE = """
.plot text{font:13px system-ui,sans-serif;fill:#52525b}.plot .name{fill:#18181b}.plot .axis{font-weight:600}
.plot .grid{stroke:#e4e4e7}.plot .zero{stroke:#71717a;stroke-width:1.2}.plot .bar{stroke:#52525b;stroke-width:1.6}
.plot .dot{fill:#52525b}.plot .front .dot{fill:#2563eb}.plot .front .bar{stroke:#2563eb}.plot .base .dot{fill:#18181b}
.plot .front .name{font-weight:600}.plot .line{fill:none;stroke:#2563eb;stroke-width:1.5;stroke-dasharray:5 4}
.plot .ring{fill:none;stroke:#2563eb;stroke-width:2}.plot .curve{fill:none;stroke:#2563eb;stroke-width:2}
.plot .band{fill:#2563eb;opacity:.16}.plot .mark{fill:#2563eb}
@media (prefers-color-scheme:dark){.plot text{fill:#b4b4bd}.plot .name{fill:#f4f4f5}.plot .grid{stroke:#33333a}
.plot .zero{stroke:#9b9ba5}.plot .bar,.plot .base .bar{stroke:#b4b4bd}.plot .dot{fill:#b4b4bd}
.plot .front .dot,.plot .mark,.plot .band{fill:#7aa2ff}.plot .front .bar{stroke:#7aa2ff}.plot .base .dot{fill:#f4f4f5}
.plot .line,.plot .ring,.plot .curve{stroke:#7aa2ff}}
@media print{.plot text{fill:#52525b}.plot .name{fill:#18181b}.plot .grid{stroke:#e4e4e7}.plot .bar{stroke:#52525b}}
"""


class Axis:
    """A linear scale from values to pixels, with some room on either side and round ticks.

    Args:
        values: what it must reach; at least one is finite.
        start: pixel of its low end.
        end: pixel of its high end.
        ticks: at most about so many.
        whole: whether ticks are whole numbers.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, ticks: int = 6, whole: bool = False) -> None:
        known = [value for value in values if math.isfinite(value)]
        low, high = min(known), max(known)
        room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        rough = (self.high - self.low) / ticks
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * (1 - 1e-9))
        self.step = max(1.0, step) if whole else step
        first, last = math.ceil(self.low / self.step), math.floor(self.high / self.step)
        self.ticks = [i * self.step for i in range(first, last + 1)]

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, value: float) -> str:
        """A tick's label."""
        return f"{value:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}".replace("-", "−")


class Frame:
    """The plot area of a chart, with its two axes.

    Args:
        size: width and height of the chart, in pixels.
        margins: left, right, top, bottom, in pixels; the left one grows with the numbers that stand there.
        x: values that the horizontal axis must reach.
        y: values that the vertical axis must reach.
        labels: of the two axes.
        whole: whether the horizontal ticks are whole numbers.
    """

    def __init__(
        self,
        size: tuple[int, int],
        margins: tuple[int, int, int, int],
        x: Sequence[float],
        y: Sequence[float],
        labels: tuple[str, str],
        whole: bool = False,
    ) -> None:
        self.width, self.height = size
        left, right, self.top, bottom = margins
        self.right, self.bottom = self.width - right, self.height - bottom
        self.labels = labels
        self.y = Axis(y, self.bottom, self.top, max(3, (self.bottom - self.top) // 40))
        widest = max((len(self.y.text(value)) for value in self.y.ticks), default=0)
        self.left = max(left, 34 + 8 * widest)  # the numbers stand between the axis and its label
        self.x = Axis(x, self.left, self.right, max(3, (self.right - self.left) // 75), whole)

    def opened(self, label: str) -> str:
        """The beginning of the chart: the element, its style, the grid with its numbers, and the axes' labels."""
        x, y = self.x, self.y
        view = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}"'
        parts = [f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" {view}><style>{STYLE}</style>']
        for value in x.ticks:
            at = x(value)
            parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{self.bottom}"/>')
            parts.append(f'<text x="{at:.1f}" y="{self.bottom + 18}" text-anchor="middle">{x.text(value)}</text>')
        for value in y.ticks:
            at = y(value)
            parts.append(f'<path class="grid" d="M{self.left} {at:.1f}H{self.right}"/>')
            parts.append(f'<text x="{self.left - 8}" y="{at + 4:.1f}" text-anchor="end">{y.text(value)}</text>')
        across, down = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        parts.append(
            f'<text class="axis" x="{across}" y="{self.height - 10}" text-anchor="middle">'
            f"{escape(self.labels[0])}</text>"
            f'<text class="axis" transform="translate(14 {down}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.labels[1])}</text>"
        )
        return "".join(parts)

    def zero_line(self, at_x: float | None = None, at_y: float | None = None) -> str:
        """A line through a value of either axis that stands out from the grid; nothing where it is not in view."""
        parts = []
        if at_x is not None and self.x.low <= at_x <= self.x.high:
            parts.append(f'<path class="zero" d="M{self.x(at_x):.1f} {self.top}V{self.bottom}"/>')
        if at_y is not None and self.y.low <= at_y <= self.y.high:
            parts.append(f'<path class="zero" d="M{self.left} {self.y(at_y):.1f}H{self.right}"/>')
        return "".join(parts)

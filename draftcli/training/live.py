"""What people see while a run goes on: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from draftcli.progress import duration

PLAIN_LINES = 20  # how many progress lines a run prints where the output is no terminal
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "._-=+*%#"
ENDINGS = {"finished": ("✓", "*", "green"), "stopped": ("■", "=", "yellow"), "failed": ("✗", "x", "red")}
CURVE = 24  # characters
RECENT_STEPS = 20  # whose mean says how long a step takes


class LiveView:
    """Context manager; `step` after every step, `note` while something else goes on, `print` for lines that stay.

    Args:
        console: where people look; quiet consoles show nothing.
        name: of the run.
        first: the step that the session starts from.
        last: the step that it ends at.
        rewards: of the steps taken before, for the curve.
        validate_every: steps between validations; 0: there are none.
        coefficient: of the KL penalty at the start; None: it is not shown.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        first: int,
        last: int,
        rewards: Sequence[float] = (),
        validate_every: int = 0,
        coefficient: float | None = None,
    ) -> None:
        self.console, self.name, self.first, self.last = console, name, first, last
        self.is_live = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._at, self._rewards, self._figures, self._note = first, list(rewards), "", ""
        self._saved: int | None = first or None
        self._began = time.monotonic()
        self._validate_every, self._validation_seconds, self._validated_at = validate_every, 0.0, first
        self._validation, self._alarm = "", None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._coefficient = "" if coefficient is None else f"kl_coeff {coefficient:.3g}"
        self._unicode = console.encoding.startswith("utf")
        self._ending = ""
        self._spinner = Spinner("dots" if self._unicode else "line")
        self._stack = ExitStack()

    def __enter__(self) -> LiveView:
        self._began = time.monotonic()
        if self.is_live:
            self._stack.enter_context(Live(self, console=self.console, refresh_per_second=8))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_failure = kind is not None and kind is not KeyboardInterrupt
        self._ending = "failed" if is_failure else "finished" if self._at >= self.last else "stopped"
        self._note = "" if self._ending == "finished" else f"{self._ending} after step {self._at}"
        self._stack.__exit__(kind, error, trace)

    def print(self, text: str) -> None:
        """Print a line that stays, above the live view."""
        self.console.print(text)

    def note(self, text: str) -> None:
        """Show what goes on beside training, until the next step."""
        self._note = text

    def saved(self, step: int) -> None:
        """Show that there is a checkpoint of `step`."""
        self._saved = step

    def validated(self, seconds: float, figures: str = "", alarm: str | None = None) -> None:
        """Take note of a validation.

        Args:
            seconds: that it took: those to come are expected to take as long.
            figures: what it found, in one row.
            alarm: what looks like reward hacking, in words; None: nothing does.
        """
        self._validation_seconds, self._validated_at = seconds, self._at
        self._validation, self._alarm = figures, alarm

    def step(self, metrics: dict[str, Any], skipped: int) -> None:
        """Show a finished step: its line of metrics.jsonl, and how many steps of the run were skipped."""
        self._at, self._note = metrics["step"], ""
        self._step_seconds.append(metrics["seconds"])
        if "skipped" not in metrics:
            self._rewards.append(metrics["reward"])
        parts = [f"kl {metrics['kl_penalty']:.4f}"] if metrics["kl_penalty"] is not None else []
        steered = [f"kl_coeff {metrics['kl_coeff']:.3g}"] if "kl_coeff" in metrics else []
        self._coefficient = steered[0] if steered else self._coefficient
        parts += steered
        parts += [
            f"grad {metrics['grad_norm']:.2f}",
            f"{metrics['images_per_second']:.2g} images/s",
            f"{metrics['memory_gib']:.1f} GiB",
        ]
        parts += [f"skipped {skipped}"] if skipped else []
        self._figures = "  ".join(parts)
        every = max(1, (self.last - self.first) // PLAIN_LINES)
        if not self.is_live and (self._at % every == 0 or self._at == self.last):
            self.print(f"step {self._at}/{self.last}  reward {metrics['reward']:.3f}  {self._figures}  {self._left()}")

    def _left(self) -> str:
        """How long the run will take yet, from the recent steps and the last validation; at the end, what it took."""
        if not self._step_seconds:
            return ""
        if self._at == self.last:
            return f"took {duration(time.monotonic() - self._began)}"
        steps = (self.last - self._at) * sum(self._step_seconds) / len(self._step_seconds)
        return f"about {duration(steps + self._validations_left() * self._validation_seconds)} left"

    def _validations_left(self) -> int:
        """After every so many steps there is one, and one at the end."""
        every, done = self._validate_every, self._at if self._validated_at == self._at else self._at - 1
        return -(-self.last // every) - done // every if every else 0

    def _sign(self) -> RenderableType:
        """A spinner, and at the end what happened."""
        if not self._ending:
            return self._spinner if self._at < self.last or self._note else Text(" ")
        sign, in_ascii, colour = ENDINGS[self._ending]
        return Text(sign if self._unicode else in_ascii, style=colour)

    def __rich__(self) -> RenderableType:
        """What the terminal shows now."""
        elapsed = duration(time.monotonic() - self._began)
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            self._sign(),
            Text(self.name, style="bold", no_wrap=True),
            ProgressBar(total=self.last, completed=self._at, width=30),
            Text(f"step {self._at}/{self.last}", no_wrap=True),
            Text(f"{elapsed}  {self._left()}" if self._at < self.last else self._left(), style="dim", no_wrap=True),
        )
        figures = Text("  ", no_wrap=True, overflow="ellipsis" if self._unicode else "crop")
        if self._rewards:
            figures.append(f"reward {self._rewards[-1]:.3f} ")
            figures.append(curve(self._rewards, CURVE, BARS if self._unicode else ASCII_BARS), style="cyan")
            figures.append(f"  {self._figures}")
        if self._saved is not None:
            figures.append(f"  saved at {self._saved}", style="dim")
        overflow = "ellipsis" if self._unicode else "crop"
        rows: list[RenderableType] = [bar, figures] if len(figures) > 2 else [bar]
        if self._validation:
            row = f"  {self._validation}  {self._coefficient}"
            rows.append(Text(row, no_wrap=True, overflow=overflow, style="red" if self._alarm else ""))
        if self._alarm:
            rows.append(Text(f"  ALARM  {self._alarm}", style="bold red"))
        return Group(*rows, Text(f"  {self._note}", style="yellow")) if self._note else Group(*rows)


def curve(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """`values` as a line of bars, at most `width` long: means of equal stretches, from the lowest to the highest."""
    width = min(width, len(values))
    cuts = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    return "".join(bars[round((m - low) / (high - low) * (len(bars) - 1)) if high > low else 0] for m in means)

"""What a run tells: metrics.jsonl, TensorBoard, and the live line in the terminal."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from draftcli.runs import Run, disk_errors

PLAIN_LINES = 20  # how many progress lines a run prints where the output is no terminal


class RunLog:
    """Context manager; use `step`, `validation` and `say` inside.

    Args:
        run: whose files are appended to.
        console: where people look; quiet consoles print nothing.
        first: the step that the session starts from.
        last: the step that it ends at.
        tensorboard: write event files beside metrics.jsonl.
    """

    def __init__(self, run: Run, console: Console, first: int, last: int, tensorboard: bool) -> None:
        self.run, self.console, self.first, self.last = run, console, first, last
        self.tensorboard = tensorboard
        self._stack = ExitStack()
        self._writer: Any = None

    def __enter__(self) -> RunLog:
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(self.run.folder):
                self._writer = SummaryWriter(self.run.folder / "tensorboard", purge_step=self.first + 1)
            self._stack.callback(self._writer.close)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        self._began = time.monotonic()
        self._progress = self._stack.enter_context(Progress(*columns, console=self.console, disable=not live))
        self._bar = self._progress.add_task("training", total=self.last, completed=self.first, figures="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def step(self, metrics: dict[str, Any]) -> None:
        """One finished optimizer step; `metrics` has at least step, reward, kl_penalty and grad_norm."""
        step = metrics["step"]
        self._append(self.run.metrics, metrics)
        self._scalars("train", {k: v for k, v in metrics.items() if k != "step"}, step)
        figures = f"reward {metrics['reward']:.3f}  grad {metrics['grad_norm']:.2f}"
        if metrics["kl_penalty"] is not None:
            figures += f"  kl {metrics['kl_penalty']:.4f}"
        self._progress.update(self._bar, completed=step, figures=figures)
        every = max(1, (self.last - self.first) // PLAIN_LINES)
        if not self.console.is_terminal and (step % every == 0 or step == self.last):
            left = (self.last - step) * (time.monotonic() - self._began) / (step - self.first)
            speed = metrics["images_per_second"]
            self.say(f"step {step}/{self.last}  {figures}  {speed:.2f} images/s  about {left:.0f} s left")

    def validation(self, result: dict[str, Any]) -> None:
        """One validation: `rewards` maps a name to figures by name."""
        self._append(self.run.validation, result)
        for name, figures in result["rewards"].items():
            self._scalars(
                f"validation/{name}", {k: v for k, v in figures.items() if isinstance(v, float)}, result["step"]
            )

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(line), allow_nan=False) + "\n")

    def _scalars(self, group: str, values: dict[str, Any], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{group}/{name}", value, step)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""How a session of a run ended, and what people are shown of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from draftcli.metrics.statistics import has_interval
from draftcli.runs import Run, ValidationLine


class Ending(Enum):
    """Why a session takes no further step."""

    FINISHED = auto()
    """trainer.max_steps are taken."""
    ALREADY_DONE = auto()
    """They were taken before, and final/ is there."""
    INTERRUPTED = auto()
    """A signal asked to stop."""


@dataclass
class TrainingResult:
    """How a session of a run ended.

    Attributes:
        step: the last finished step.
        ending: why it was the last.
        validation: the last validation, if there was one.
        skipped: steps of the run that changed nothing, as something in them was not finite.
        seconds: how long the session took.
        written: files and folders that people will want to open, by what they are.
    """

    step: int
    ending: Ending = Ending.INTERRUPTED
    validation: ValidationLine | None = None
    skipped: int = 0
    seconds: float = 0.0
    written: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether trainer.max_steps are taken."""
        return self.ending in (Ending.FINISHED, Ending.ALREADY_DONE)

    @property
    def interrupted(self) -> bool:
        """Whether a signal asked to stop."""
        return self.ending is Ending.INTERRUPTED

    @property
    def already_done(self) -> bool:
        """Whether there was nothing to do."""
        return self.ending is Ending.ALREADY_DONE


def written_files(run: Run) -> dict[str, list[Path]]:
    """The files and folders of a run that people will want to open, by what they are."""
    sheets = sorted(run.samples.glob("step-*-sheet.png"))
    expected: dict[str, list[Path]] = {
        "weights": [run.final / "pytorch_lora_weights.safetensors", run.final / "unet"],
        "card": [run.final / "README.md"],
        "pictures": sheets[-1:],
        "figures": [run.metrics, run.validation],
        "tensorboard": [run.folder / "tensorboard"],
        "checkpoints": run.checkpoints()[::-1],
        "settings": [run.config],
    }
    existing = {what: [path for path in paths if path.exists()] for what, paths in expected.items()}
    return {what: paths for what, paths in existing.items() if paths}


def validation_in_words(line: ValidationLine) -> str:
    """A validation as one line for people."""
    figures = {**line["rewards"], "diversity": line["diversity"]}
    changes = "; ".join(_change(name, figures) for name, figures in figures.items())
    return f"validation after step {line['step']}, {line['images']} pictures, base -> tuned: {changes}"


def _change(name: str, figures: dict[str, float]) -> str:
    interval = f", 95 % {figures['low']:+.3f} to {figures['high']:+.3f}"
    known = interval if has_interval(figures["low"], figures["high"]) else ""
    return f"{name} {figures['base']:.3f} -> {figures['tuned']:.3f} ({figures['difference']:+.3f}{known})"

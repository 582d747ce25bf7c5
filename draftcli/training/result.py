"""How a session of a run ended, and what people are shown of a run."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from draftcli.config import Config
from draftcli.metrics.diversity import DiversityKept
from draftcli.metrics.statistics import has_interval, or_nan
from draftcli.runs import Run, StopRecord, ValidationLine
from draftcli.training.monitor import far_signs


class Ending(Enum):
    """Why a session takes no further step."""

    FINISHED = auto()
    """trainer.max_steps are taken."""
    ALREADY_DONE = auto()
    """They were taken before, and final/ is there."""
    INTERRUPTED = auto()
    """A signal asked to stop."""
    STOPPED = auto()
    """The monitor ended the run."""


@dataclass
class TrainingResult:
    """How a session of a run ended.

    Attributes:
        step: the last finished step.
        ending: why it was the last.
        validation: the last validation, if there was one.
        stop: why the monitor ended the run, and which step final/ is of; None: it did not.
        skipped: steps of the run that changed nothing, as something in them was not finite.
        seconds: how long the session took.
        written: files and folders that people will want to open, by what they are.
    """

    step: int
    ending: Ending = Ending.INTERRUPTED
    validation: ValidationLine | None = None
    stop: StopRecord | None = None
    skipped: int = 0
    seconds: float = 0.0
    written: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether trainer.max_steps are taken."""
        return self.ending in (Ending.FINISHED, Ending.ALREADY_DONE)

    @property
    def ended_early(self) -> str | None:
        """For people, without a full stop: why the monitor ended the run; None: it did not."""
        if self.stop is None:
            return None
        return (
            f"ended by its monitor after step {self.step}, final/ is of step {self.stop['final']}: {self.stop['why']}"
        )

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
        "for ComfyUI, A1111 and Forge": sorted(run.final.glob("*-kohya.safetensors")),
        "card": [run.final / "README.md"],
        "page": [run.page],
        "pictures": sheets[-1:],
        "figures": [run.metrics, run.validation],
        "tensorboard": [run.folder / "tensorboard"],
        "checkpoints": run.checkpoints()[::-1],
        "settings": [run.config],
    }
    existing = {what: [path for path in paths if path.exists()] for what, paths in expected.items()}
    return {what: paths for what, paths in existing.items() if paths}


def validation_in_words(line: ValidationLine, held_out: Collection[str] = ()) -> str:
    """A validation for people: a headline, then a row for each reward and one for diversity.

    Args:
        line: of validation.jsonl.
        held_out: rewards that are not trained on; one that has fallen is marked.
    """
    rows = [("reward", "base", "tuned", "change (95 % interval)")]
    rows += [(name, *_row(figures, name in held_out)) for name, figures in line["rewards"].items()]
    diversity, kept = line["diversity"], diversity_kept(line)
    share = "" if kept is None or not line["step"] else f"{kept.words} of the base's"
    rows.append(("diversity in pixels", f"{diversity['base']:.3f}", f"{diversity['tuned']:.3f}", share))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:3], widths[1:]), row[3]]) for row in rows]
    if far := far_signs(line):
        lines.append(f"far from the base: {', '.join(far)}")
    headline = f"validation after step {line['step']}, {line['images']} images"
    return "\n  ".join([headline, *(text.rstrip() for text in lines)])


def side_by_side(line: ValidationLine, cfg: Config) -> str:
    """A validation in one row for the live view: held-out rewards first, then those that are trained on."""
    names = sorted(line["rewards"], key=lambda name: name in cfg.trained)
    figures = line["rewards"]
    each = [
        f"{'trained' if name in cfg.trained else 'held out'} {name} {figures[name]['tuned']:.3f} "
        f"({figures[name]['difference']:+.3f})"
        for name in names
    ]
    return f"at {line['step']}: {'  '.join(each)}"


def sheet_caption(line: ValidationLine) -> str:
    """What stands under a validation's sheet where a tracker shows it: the mean of every reward, base and tuned."""
    each = ", ".join(f"{name} {f['base']:.3f} -> {f['tuned']:.3f}" for name, f in line["rewards"].items())
    return f"after step {line['step']}, base beside tuned: {each}"


def diversity_kept(line: ValidationLine) -> DiversityKept | None:
    """How much of the base's diversity a validation found: the mean distance of two pictures' thumbnails, in pixels.

    None where it could not be measured, and in lines of older versions.
    """
    figures: dict[str, float | None] = {**line["diversity"]}  # in the file null stands for NaN
    share, low, high = (figures.get(key) for key in ("kept", "kept_low", "kept_high"))
    if share is None or math.isnan(share):
        return None
    return DiversityKept(share, or_nan(low), or_nan(high))


def diversity_warning(line: ValidationLine) -> str | None:
    """What a run says where a validation found that much of the base's diversity is lost for certain."""
    kept = diversity_kept(line)
    if kept is None or not kept.lost_much:
        return None
    return (
        f"step {line['step']}: {kept.words} of the base's diversity is left, measured in pixels; raise "
        "draftp.kl_coeff, or generate with draftp anneal"
    )


def _row(figures: dict[str, float], is_held_out: bool) -> tuple[str, str, str]:
    """Base, tuned and the change with its interval, of one reward."""
    low, high = figures["low"], figures["high"]
    known = has_interval(low, high)
    change = f"{figures['difference']:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if known else "")
    if is_held_out:
        falls = "" if figures["difference"] >= 0 else ", falls" if known and high < 0 else ", falls (not certain)"
        change += f"  held out{falls}"
    return f"{figures['base']:.3f}", f"{figures['tuned']:.3f}", change

"""final/: the trained weights as diffusers loads them, with a model card."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from draftcli.runs import FINAL_STEP, Run, ValidationLine, disk_errors, write_aside
from draftcli.training.card import model_card
from draftcli.training.checkpoint import save_weights
from draftcli.training.prompt_sets import PromptSets
from draftcli.training.step import Trainer


def write_final(run: Run, step: int, trainer: Trainer, prompts: PromptSets, validation: ValidationLine | None) -> None:
    """Write final/, aside and then renamed.

    Where the network is split over processes all of them call it, else the main one alone.

    Args:
        run: where to.
        step: the last one of the run.
        trainer: its weights are written, or their moving average, as ema.in_final has it.
        prompts: named in the model card.
        validation: the last one, for the model card.

    Raises:
        DraftpError: the disk refuses.
    """
    cfg, ema, ranks = trainer.cfg, trainer.ema, trainer.ranks

    def weights(folder: Path) -> None:
        with ema.in_place() if ema is not None and cfg.ema.in_final else nullcontext():
            save_weights(trainer.model, folder, write=ranks.is_main)

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        weights(folder)
        (folder / "README.md").write_text(model_card(cfg, validation, prompts.facts), encoding="utf-8")
        (folder / FINAL_STEP).write_text(f"{step}\n", encoding="utf-8")

    with disk_errors(run.final):
        if ranks.is_main:
            write_aside(run.final, write)
        else:
            weights(run.final)

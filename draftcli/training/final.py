"""final/: the trained weights as diffusers loads them, a LoRA by kohya's names as well, with a model card."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import weight_shapes
from draftcli.errors import DraftpError, warn
from draftcli.export.formats import write_as_kohya
from draftcli.export.lineage import Lineage, date_of, short_name, trained_resolution
from draftcli.runs import FINAL_STEP, Run, ValidationLine, disk_errors, write_aside
from draftcli.training.card import model_card
from draftcli.training.checkpoint import save_weights
from draftcli.training.prompt_sets import PromptSets
from draftcli.training.step import Trainer

SHEET = "sheet.png"  # in final/: base beside tuned


def write_final(
    run: Run,
    step: int,
    trainer: Trainer,
    prompts: PromptSets,
    validation: ValidationLine | None,
    ended_early: str | None = None,
) -> None:
    """Write final/, aside and then renamed.

    Where the network is split over processes all of them call it, else the main one alone.

    Args:
        run: where to.
        step: what `trainer` holds the weights of: the last one of the run, or the one that its monitor chose.
        trainer: its weights are written, or their moving average, as ema.in_final has it.
        prompts: named in the model card.
        validation: the last one up to `step`, for the model card.
        ended_early: why the run ended before its last step, in words; None: it did not.

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
        kohya = _write_kohya_file(folder, run, step, trainer) if cfg.peft.peft_scheme == "lora" else None
        sheet = _copy_sheet(folder, run, validation)
        title = run.folder.resolve().name
        card = model_card(cfg, title, step, validation, prompts.facts, kohya, sheet, ended_early)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / FINAL_STEP).write_text(f"{step}\n", encoding="utf-8")

    with disk_errors(run.final):
        if ranks.is_main:
            write_aside(run.final, write)
        else:
            weights(run.final)


def _copy_sheet(folder: Path, run: Run, validation: ValidationLine | None) -> str | None:
    """The sheet of a validation beside the card that shows it; returns its name, or None where there is none."""
    sheet = None if validation is None else run.sheet(validation["step"])
    if sheet is None or not sheet.is_file():
        return None
    shutil.copyfile(sheet, folder / SHEET)
    return SHEET


def _write_kohya_file(folder: Path, run: Run, step: int, trainer: Trainer) -> str | None:
    """The LoRA in `folder` once more by kohya's names; returns the file's name, or None where there is none.

    What is wrong with this file is a warning: the run's own weights are written already.
    """
    parts, unet = trainer.model.parts, weight_shapes(trainer.model.unet)
    lineage = Lineage(
        title=run.folder.resolve().name,
        family=parts.family,
        edition=parts.family.edition(unet, parts.prediction),
        base=short_name(trainer.cfg.model.pretrained),
        prediction=parts.prediction,
        zero_terminal_snr=parts.zero_terminal_snr,
        resolution=trained_resolution(trainer.cfg),
        steps=step,
        rewards=tuple(trainer.cfg.trained),
        date=date_of(folder / LORA_FILE),
    )
    file = folder / run.kohya_file.name
    try:
        write_as_kohya(folder / LORA_FILE, file, {"unet": unet}, lineage)
    except DraftpError as error:
        file.unlink(missing_ok=True)
        warn(f"{run.kohya_file} is not written: {error}")
        return None
    return file.name

"""Where pictures come from: a run, or any model with any number of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcli.config import Config, load_config, without_effect
from draftcli.core.models.places import base_lora, check_model_files
from draftcli.core.weighings import between_base_and_tuned, named_weighing
from draftcli.errors import InputError
from draftcli.prompts import find_prompts
from draftcli.runs import find_run, split_scale, unfinished_note
from draftcli.sampling.embedded import FORMATS

# Sections that say how to train: drawing does not look at them.
TRAINING_ONLY = ("draftp.", "peft.", "optim.", "trainer.", "ema.", "logging.")
SEED = "trainer.seed"  # of the pictures too


@dataclass(frozen=True)
class DrawingSource:
    """A base and what is tuned on it.

    Attributes:
        cfg: the settings to draw with.
        name: for people: the run's folder, or the model.
        folder: where its pictures go unless somebody says otherwise: the run's folder, or the working directory.
        unet: folder of a UNet that was trained in full, or None.
        loras: LoRA files or folders, each with its scale.
        from_run: whether it is a run, or the recipe of one, whose settings give size and prompts.
        warnings: what people should know about it.
    """

    cfg: Config
    name: str
    folder: Path
    unet: Path | None
    loras: list[tuple[Path, float]]
    from_run: bool
    warnings: tuple[str, ...] = ()

    @property
    def base_loras(self) -> list[tuple[Path, float]]:
        """LoRA files or folders of model.loras, each with its scale."""
        return [base_lora(text) for text in self.cfg.model.loras]

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything beside the base."""
        return self.unet is not None or bool(self.loras)

    def columns(self, base: bool) -> list[str]:
        """What is drawn of it: the tuned network where there is one, and the base where it is asked for or alone."""
        return [*(["base"] if base or not self.is_tuned else []), *(["tuned"] if self.is_tuned else [])]

    def annealed_columns(self, weights: Sequence[str], only: bool) -> list[str]:
        """What annealing draws: the weights, and unless `only` or there is nothing to anneal to, base and tuned beside
        them.
        """
        return list(weights) if only or not self.is_tuned else between_base_and_tuned(list(weights))


def find_source(
    run: str | None,
    model: str | None,
    loras: Sequence[str],
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> DrawingSource:
    """Find what to draw with.

    Args:
        run: see `runs.find_run`; None and no `model`: the newest run.
        model: as `model.pretrained` takes it, instead of a run.
        loras: PATH or PATH=SCALE, on top of the run's own or on the model.
        overrides: KEY=VALUE, laid over the run's settings or the defaults.
        values: likewise, by dotted key.
        preset: a recipe's name or file, instead of a run: its model before any training, with its sampling.

    Raises:
        InputError: no such run, recipe or LoRA, several of run, model and recipe, a setting that is not allowed.
    """
    if preset is not None and (run is not None or model is not None):
        other = f"the run {run}" if run is not None else f"--model {model}"
        raise InputError(f"both --preset {preset} and {other} were given; give one of them")
    if run is not None and model is not None:
        raise InputError(
            f"both the run {run} and --model {model} were given; give one of them. For a run's LoRA on another model: "
            f"--model {model} --lora {run}"
        )
    files = [parse_lora(text) for text in loras]
    values, warnings = values or {}, _idle_overrides(overrides)
    if model is not None:
        cfg = load_config(None, overrides, {"model.pretrained": model, **values}, purpose="drawing")
        warnings += without_effect(cfg, "drawing")
        return DrawingSource(cfg, model, Path(), None, files, from_run=False, warnings=tuple(warnings))
    if preset is not None:
        cfg = load_config(preset, overrides, values, purpose="drawing")
        warnings += without_effect(cfg, "drawing")
        return DrawingSource(cfg, preset, Path(), None, files, from_run=True, warnings=tuple(warnings))
    found, weights = find_run(run)
    cfg = load_config(found.config, overrides, values, purpose="drawing")
    if "model.loras" not in {text.partition("=")[0].strip() for text in overrides} | {*values}:
        found.check_base_loras(cfg)
    note = unfinished_note(found, weights, run)
    in_full = cfg.peft.peft_scheme == "none"
    return DrawingSource(
        cfg,
        name=str(found.folder),
        folder=found.folder,
        unet=weights / "unet" if in_full else None,
        loras=files if in_full else [(weights, 1.0), *files],
        from_run=True,
        warnings=(*([note] if note else []), *warnings, *without_effect(cfg, "drawing")),
    )


def with_precision(source: DrawingSource) -> Config:
    """The settings to draw with: where it is a model and nobody gave a precision, that of this machine."""
    model = source.cfg.model
    if source.from_run or "precision" in model.model_fields_set:
        return source.cfg
    return source.cfg.model_copy(update={"model": model.model_copy(update={"precision": _precision()})})


def check_drawing(
    source: DrawingSource, kinds: Sequence[str], prompts: Sequence[str], prompt_file: str | None, suffix: str = "png"
) -> None:
    """See that there is something to draw, before torch is imported for it.

    Args:
        source: the model.
        kinds: annealing weights.
        prompts: texts.
        prompt_file: a file, built-in set or dataset; with neither, the run's validation prompts.
        suffix: of the pictures' files.

    Raises:
        InputError: nothing to anneal, no prompts, an unknown weight or kind of file, or a file that is not there.
    """
    if suffix not in FORMATS:
        raise InputError(f"--format {suffix}: allowed are {', '.join(FORMATS)}")
    names = [named_weighing(kind)[0] for kind in kinds]
    if not source.is_tuned and any(name != "base" for name in names):
        raise InputError(
            f"{source.name} alone has nothing to anneal to: add --lora PATH, or name a run instead of --model"
        )
    check_model_files(source.cfg.model)
    validation = source.cfg.data.validation_prompts
    if prompt_file is not None:
        find_prompts(prompt_file, "--prompts")
    elif not prompts and source.from_run and validation:
        if isinstance(validation, str):
            find_prompts(validation, "data.validation_prompts")
    elif not prompts:
        what = f"{source.name} has no validation prompts" if source.from_run else "no prompt was given"
        raise InputError(f"{what}; give --prompt TEXT or --prompts FILE")


def parse_lora(text: str) -> tuple[Path, float]:
    """PATH or PATH=SCALE.

    Raises:
        InputError: nothing is there, or the scale is no number.
    """
    name, scale = split_scale(text, lambda name: Path(name).exists(), f"--lora {text}")
    if not Path(name).exists():
        raise InputError(f"--lora {name}: there is no such file or folder")
    return Path(name), scale


def _idle_overrides(overrides: Sequence[str]) -> list[str]:
    """What is to be said of settings that were given and that have no part in drawing."""
    keys = [text.partition("=")[0].strip() for text in overrides]
    idle = [key for key in keys if key.startswith(TRAINING_ONLY) and key != SEED]
    return [f"{key} has no effect on generation: it is a setting of training" for key in idle]


def _precision() -> str:
    """bf16 where a GPU computes it, as weights of SDXL's size are not worth float32 there."""
    import torch

    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"

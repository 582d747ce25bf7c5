"""Where weights came from, as the metadata of their file tells other programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from draftcli import __version__
from draftcli.config import Config
from draftcli.core.lora.files import Shapes
from draftcli.core.models.family import Edition, Family
from draftcli.core.models.meta import read_json
from draftcli.core.models.original_layout import ORIGINAL_CODE
from draftcli.export.base import Base
from draftcli.export.inputs import MergeInput
from draftcli.export.tensors import file_metadata
from draftcli.runs import FINAL_STEP, STEP_FOLDER


@dataclass(frozen=True)
class Lineage:
    """Facts about weights. What nobody knows is None, and is left out of a file.

    Attributes:
        title: what people call them: the name of the run, or of the output.
        family: of the model that they are, or are for.
        edition: what metadata call that model.
        base: the model that they were trained on or merged into, as its owner gave it; of a path, its last part.
        merged_from: the LoRAs and runs that were merged; empty: the weights were trained.
        prediction: epsilon, v_prediction or sample, for which other programs have no name.
        zero_terminal_snr: whether the base was trained with rescaled betas.
        resolution: (width, height) in pixels that they were trained at, or else their model.
        steps: optimizer steps that they were trained for.
        rewards: that they were trained on.
        date: when they were trained, or what they were merged from was; UTC, in whole seconds.
    """

    title: str
    family: Family
    edition: Edition
    base: str | None = None
    merged_from: tuple[str, ...] = ()
    prediction: str | None = None
    zero_terminal_snr: bool = False
    resolution: tuple[int, int] | None = None
    steps: int | None = None
    rewards: tuple[str, ...] = ()
    date: datetime | None = None


def modelspec(lineage: Lineage, *, lora: bool = False) -> dict[str, str]:
    """The metadata by which programs recognise what a file is (https://github.com/Stability-AI/ModelSpec)."""
    predictions, edition = {"epsilon": "epsilon", "v_prediction": "v"}, lineage.edition
    known = {
        "sai_model_spec": "1.0.0",
        "architecture": edition.architecture + ("/lora" if lora else ""),
        "implementation": edition.lora_implementation if lora else ORIGINAL_CODE,
        "title": lineage.title,
        "description": describe_training(lineage) + f"made by draftp {__version__}",
        "date": lineage.date and lineage.date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": lineage.resolution and "{}x{}".format(*lineage.resolution),
        "prediction_type": lineage.prediction and predictions.get(lineage.prediction),
        "merged_from": ", ".join(lineage.merged_from),
    }
    return {f"modelspec.{key}": value for key, value in known.items() if value}


def lineage_of_merge(
    title: str, inputs: Sequence[MergeInput], base: Base | None, family: Family, shapes: Shapes
) -> Lineage:
    """What is known of the result of a merge. The runs among its inputs know most; the date is that of the newest.

    Args:
        title: of the result.
        inputs: what was merged.
        base: the model merged into; None: there is none.
        family: of it, or of the model that the inputs are for.
        shapes: of the weights of that model, by network and module.
    """
    prediction = base.prediction if base else None
    settings = [i.cfg for i in inputs if i.cfg]
    return Lineage(
        title,
        family,
        family.edition(shapes["unet"], prediction),
        base=short_name(base.name) if base else None,
        merged_from=tuple(i.text for i in inputs),
        prediction=prediction,
        zero_terminal_snr=base is not None and base.zero_terminal_snr,
        resolution=trained_resolution(settings[0]) if settings else native_resolution(base, family),
        steps=steps_taken(inputs[0].path) if len(inputs) == 1 else None,
        rewards=tuple(settings[0].trained) if len(inputs) == 1 and settings else (),
        date=max((date_of(i.path) for i in inputs), default=None),
    )


def describe_training(lineage: Lineage) -> str:
    """What weights were trained on and for how long, with what separates it from further text; empty if not known."""
    if not lineage.rewards:
        return ""
    steps = f", {lineage.steps} steps" if lineage.steps is not None else ""
    return f"fine-tuned with DRaFT+ on {', '.join(lineage.rewards)}{steps}; "


def short_name(model: str) -> str:
    """A model's name without the folders that it is in on this computer."""
    return Path(model).resolve().name if Path(model).exists() else model


def trained_resolution(cfg: Config) -> tuple[int, int]:
    """(width, height) in pixels that a run draws pictures of."""
    return cfg.sampling.width, cfg.sampling.height


def native_resolution(base: Base | None, family: Family) -> tuple[int, int] | None:
    """(width, height) that a model is for, as its file says or else its configuration; without a model the family's."""
    said = file_metadata(base.location.path) if base and base.location.single_file else {}
    if match := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", said.get("modelspec.resolution", "")):
        return int(match[1]), int(match[2])
    config = base.location.config if base else family.config_folder
    latent = read_json(config / "unet" / "config.json").get("sample_size")
    if not isinstance(latent, int):
        return None
    edge = latent * 2 ** (len(read_json(config / "vae" / "config.json").get("block_out_channels", "SDXL")) - 1)
    return edge, edge


def steps_taken(weights: Path) -> int | None:
    """How many steps were taken to the weights in a run's folder (final/, a checkpoint, or unet/ in one of them)."""
    for folder in (weights, weights.parent):
        if (folder / FINAL_STEP).is_file():
            text = (folder / FINAL_STEP).read_text(encoding="utf-8", errors="replace").strip()
            return int(text) if text.isdecimal() else None
        if match := re.fullmatch(STEP_FOLDER, folder.name):
            return int(match[1])
    return None


def date_of(weights: Path) -> datetime:
    """When a file of weights, or the newest in a folder, was written."""
    files = [weights] if weights.is_file() else [*weights.glob("*.safetensors")]
    return datetime.fromtimestamp(int(max((file.stat().st_mtime for file in files), default=0)), UTC)

"""What is to be merged: runs and LoRA files with scales, resolved against the base."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from draftcli.config import Config, load_config
from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import Lora, Shapes, refuse_stacked_dora
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import Family
from draftcli.core.models.places import base_lora
from draftcli.errors import InputError
from draftcli.export.arguments import parse_input
from draftcli.export.base import Base
from draftcli.export.second_reading import compare_reading
from draftcli.export.tensors import StoredTensor, stored_tensors
from draftcli.runs import Run, find_run, unet_files, unfinished_note


@dataclass(frozen=True)
class MergeInput:
    """One argument of the command.

    Attributes:
        text: as given, or the run's folder.
        path: the LoRA's file or folder, or the folder of a UNet trained in full.
        scale: how much of it is taken.
        run: the run that it belongs to, if any.
        cfg: that run's settings.
    """

    text: str
    path: Path
    scale: float = 1.0
    run: Run | None = None
    cfg: Config | None = None

    @property
    def in_full(self) -> bool:
        """Whether it is a whole UNet rather than a LoRA."""
        return self.cfg is not None and self.cfg.peft.peft_scheme == "none"


@dataclass
class Changes:
    """What is done to the base's tensors.

    Attributes:
        loras: their scales are in their updates.
        full: a UNet trained in full, by key.
        full_scale: how far the base's UNet goes towards it; 1 is all the way.
        readings: lines on how the LoRAs' files were read, for people.
    """

    loras: list[Lora] = field(default_factory=list)
    full: dict[str, StoredTensor] = field(default_factory=dict)
    full_scale: float = 1.0
    readings: list[str] = field(default_factory=list)

    def touched(self) -> set[tuple[str, str]]:
        """(part, key) of each tensor that changes."""
        updates = [found for lora in self.loras for found in lora.updates()]
        keys = {(part, f"{module}.weight") for part, module, _ in updates}
        biases = {(part, f"{module}.bias") for part, module, update in updates if update.bias is not None}
        return keys | biases | {("unet", key) for key in self.full}

    def apply(self, part: str, key: str, tensor: Tensor) -> Tensor:
        """The changed tensor in float64."""
        result = tensor.double()
        if part == "unet" and key in self.full:
            result = torch.lerp(result, self.full[key].load().double(), self.full_scale)
        before = result
        module, _, kind = key.rpartition(".")
        for lora in self.loras:
            update = lora.parts.get(part, {}).get(module)
            if update is not None and kind == "weight":
                result = result + update.change(before)
            elif update is not None and kind == "bias" and update.bias is not None:
                result = result + update.scale * update.bias.double()
        return result


def find_inputs(texts: Sequence[str]) -> list[MergeInput]:
    """Resolve `RUN`, `LORA` and `LORA=SCALE`; nothing means the newest run.

    Raises:
        InputError: nothing of that name, a scale that is no number, a run without weights.
    """
    return [_input(text) for text in texts] or [_of_run(None, 1.0)]


def _input(text: str) -> MergeInput:
    name, scale = parse_input(text)
    path = Path(name)
    # A LoRA's folder may be inside a run's without being a checkpoint of it: its exports do.
    of_run = not path.is_dir() or (path / "config.yaml").is_file() or (path.parent / "config.yaml").is_file()
    return _of_run(name, scale) if of_run and not path.is_file() else MergeInput(text, path, scale)


def _of_run(name: str | None, scale: float) -> MergeInput:
    run, weights = find_run(name)
    cfg = load_config(run.config)
    if note := unfinished_note(run, weights, name):
        warnings.warn(note, stacklevel=2)
    path = weights / "unet" if cfg.peft.peft_scheme == "none" else weights
    return MergeInput(str(run.folder if weights == run.final else weights), path, scale, run, cfg)


def base_of(inputs: Sequence[MergeInput]) -> tuple[str, str | None, str | None] | None:
    """(pretrained, config, variant) that the runs among `inputs` were trained on, or None where there is no run.

    Raises:
        InputError: they were trained on different ones.
    """
    found = {(s.cfg.model.pretrained, s.cfg.model.config, s.cfg.model.variant) for s in inputs if s.cfg}
    if len(found) > 1:
        named = ", ".join(sorted(pretrained for pretrained, *_ in found))
        raise InputError(f"the runs were trained on different models ({named}); say which to merge into with --base")
    return next(iter(found), None)


def vae_of(inputs: Sequence[MergeInput]) -> tuple[str, str | None] | None:
    """(model.vae, model.variant) of the runs among `inputs`, or None where they have the VAE of their model.

    Raises:
        InputError: they were trained with different ones.
    """
    runs = [(source.run, source.cfg.model) for source in inputs if source.run and source.cfg]
    named = list(dict.fromkeys(model.vae or f"that of {model.pretrained}" for _, model in runs))
    if len(named) > 1:
        raise InputError(
            f"the runs were trained with different VAEs ({', '.join(named)}), and a model has one; say which with --vae"
        )
    return next(((model.vae, model.variant) for _, model in runs if model.vae), None)


def base_loras_of(inputs: Sequence[MergeInput]) -> list[str]:
    """model.loras of the runs among `inputs`: what their base has beside the model's own weights, and what their
    networks need on any other model too.

    Raises:
        InputError: the runs have different ones, or one is another file than when its run was trained.
    """
    runs = [(source.run, source.cfg) for source in inputs if source.run and source.cfg]
    for run, cfg in runs:
        run.check_base_loras(cfg)
    if any(cfg.model.loras != runs[0][1].model.loras for _, cfg in runs):
        raise InputError(
            "the runs were trained with different model.loras, so they have no base in common; give the LoRAs' files "
            f"that are to be merged, such as {runs[0][0].final / LORA_FILE}, with --base MODEL"
        )
    return list(runs[0][1].model.loras) if runs else []


def read_base_loras(texts: Sequence[str], changes: Changes, shapes: Shapes, *, own_alone: bool) -> None:
    """Add the LoRAs of a run's base to what is done to the model that it was loaded from.

    Args:
        texts: model.loras.
        changes: what the run itself has changed.
        shapes: of the base's weights.
        own_alone: the result is to be what the run changed, without them. A LoRA that was trained on top is so already.

    Raises:
        InputError: one cannot be read, or is DoRA where it would have to be taken apart from others.
    """
    for path, scale in map(base_lora, texts):
        lora = read_lora(path, shapes).scaled(scale)
        if changes.full:  # its UNet has them already, and what is interpolated is the UNet alone
            factor = (0.0 if own_alone else 1.0) - changes.full_scale
            if factor and any(update.magnitude is not None for update in lora.parts.get("unet", {}).values()):
                raise InputError(f"model.loras {path}: DoRA cannot be taken out of a UNet again; merge at --scale 1")
            unet = {"unet": lora.scaled(factor).parts["unet"]} if factor and "unet" in lora.parts else {}
            others = {} if own_alone else {part: u for part, u in lora.parts.items() if part != "unet"}
            lora = Lora(lora.name, {**unet, **others})
        elif own_alone:
            continue
        changes.loras.insert(0, lora)
        if not own_alone:
            changes.readings.append(f"{path} x {scale:g}, of the run's base (model.loras)")
    refuse_stacked_dora(changes.loras)


def read_changes(
    inputs: Sequence[MergeInput], base: Base | None, family: Family, shapes: Shapes, scale: float
) -> Changes:
    """Read every input for the base.

    Args:
        inputs: at most one of them trained in full.
        base: needed where one is.
        family: of the base, or without one that which the inputs are for.
        shapes: of its weights.
        scale: multiplies every input's own.

    Raises:
        InputError: one does not fit the base, or a scale of 0 leaves nothing of it.
        DraftpError: one is read in another way than by diffusers and peft.
    """
    changes = Changes()
    for source in inputs:
        if scale * source.scale == 0:
            raise InputError(f"{source.text}: with the scale 0 it would change nothing; leave it out")
        if not source.in_full:
            lora = read_lora(source.path, shapes)
            config = base.location.config if base is not None else family.config_folder
            changes.readings.append(compare_reading(source.path, lora, config, family))
            changes.loras.append(lora.scaled(scale * source.scale))
            continue
        if changes.full:
            raise InputError("only one of the inputs can be a run that trained the whole UNet")
        assert base is not None
        changes.full, changes.full_scale = _full_unet(source.path, base), scale * source.scale
    refuse_stacked_dora(changes.loras)
    if base is not None and (missing := {t for t in changes.touched() if t[1] not in base.tensors[t[0]]}):
        part, key = min(missing)
        raise InputError(
            f"{len(missing)} biases of the LoRA belong to layers that have none in {base.name}, the first is "
            f"{part}.{key}; images can be generated with it (draftp sample --lora), but it cannot be merged"
        )
    return changes


def _full_unet(folder: Path, base: Base) -> dict[str, StoredTensor]:
    held = {key: stored for file in unet_files(folder) for key, stored in stored_tensors(file).items()}
    own = base.tensors["unet"]
    odd = sorted(held.keys() ^ own.keys()) or sorted(k for k in own if held[k].shape != own[k].shape)
    if odd:
        raise InputError(
            f"{folder} does not fit {base.name}: {len(odd)} tensors of the UNet differ, the first is {odd[0]}; "
            "give the model it was trained on with --base"
        )
    if all(torch.equal(held[key].load().to(own[key].dtype), own[key].load()) for key in own):
        raise InputError(f"{folder} would change nothing: it is the UNet of {base.name}; was it trained?")
    return held

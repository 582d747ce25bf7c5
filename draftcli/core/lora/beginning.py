"""A LoRA to go on from (peft.init_from): training begins at its matrices, and rank, alpha and targets follow it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftcli.config import Config, PeftConfig
from draftcli.core.lora.adapters import ADAPTER, DEFAULT_TARGETS, attach_lora, lora_layers
from draftcli.core.lora.files import Shapes, Update, weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.errors import InputError, brief

_INSTEAD = "put it under the base with model.loras=[{file}], and train a new one on top"


@dataclass(frozen=True)
class BegunLora:
    """A LoRA as training can go on from it.

    Attributes:
        updates: of the UNet, by module; all plain, of one rank and one scale.
        rank, alpha, target_modules: the settings under `peft` that make the same LoRA.
    """

    updates: Mapping[str, Update]
    rank: int
    alpha: float
    target_modules: list[str]

    def followed(self, peft: PeftConfig) -> PeftConfig:
        """The settings with its rank, alpha and targets.

        Raises:
            InputError: somebody gave other ones.
        """
        own: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "target_modules": self.target_modules}
        for name in own.keys() & peft.model_fields_set:
            given = getattr(peft, name)
            same = {*given} == {*own[name]} if isinstance(given, list) else given in (None, own[name])
            if not same:
                raise InputError(
                    f"peft.{name} is {brief(given)}, and {peft.init_from} has {brief(own[name])}: leave it out, as it "
                    "follows peft.init_from, or set it to that"
                )
        return peft.model_copy(update=own)


def read_begun(file: str, shapes: Shapes) -> BegunLora:
    """Read peft.init_from.

    Args:
        file: a LoRA's file or folder.
        shapes: of the networks, as `weight_shapes` gives them, that of the UNet at least.

    Raises:
        InputError: as `read_lora`; or it is none that training can go on from: with DoRA or biases, several ranks or
            scales, or a part for a text encoder, which is not trained.
    """
    lora = read_lora(Path(file), shapes)
    instead = _INSTEAD.format(file=file)
    if others := sorted(lora.parts.keys() - {"unet"}):
        raise InputError(
            f"peft.init_from {file}: it has a part for {others[0]}, and the UNet alone is trained; {instead}"
        )
    updates = lora.parts["unet"]
    if any(not update.is_plain for update in updates.values()):
        raise InputError(f"peft.init_from {file}: it has DoRA magnitudes or biases, which are not trained; {instead}")
    for what, found in (
        ("ranks", {update.rank for update in updates.values()}),
        ("scales (alpha / rank)", {update.scale for update in updates.values()}),
    ):
        if len(found) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(found)[:4])
            raise InputError(
                f"peft.init_from {file}: its layers have {len(found)} {what} ({listed}), not one; {instead}"
            )
    first = next(iter(updates.values()))
    if first.scale <= 0:
        raise InputError(f"peft.init_from {file}: its scale alpha / rank is {first.scale:g}, not above 0; {instead}")
    targets = _endings(updates.keys(), shapes["unet"].keys())
    return BegunLora(updates, first.rank, first.scale * first.rank, targets)


def follow_init_from(cfg: Config, shapes: Shapes) -> Config:
    """The settings with those of peft.init_from, where there is one; see `BegunLora.followed` and `read_begun`."""
    if cfg.peft.init_from is None:
        return cfg
    return cfg.model_copy(update={"peft": read_begun(cfg.peft.init_from, shapes).followed(cfg.peft)})


def attach_begun(unet: nn.Module, peft: PeftConfig) -> None:
    """Put the LoRA of peft.init_from on `unet`, in place, to be trained on. Of a UNet on the meta device only the shape
    is made: its weights come from another process.

    Raises:
        InputError: as `read_begun` and `BegunLora.followed`.
    """
    assert peft.init_from is not None
    begun = read_begun(peft.init_from, {"unet": weight_shapes(unet)})
    begun.followed(peft)
    attach_lora(unet, begun.rank, begun.alpha, begun.target_modules)
    adapted = {*lora_layers(unet)}
    layers = {name: layer for name, layer in unet.named_modules() if layer in adapted}
    assert layers.keys() == begun.updates.keys()
    with torch.no_grad():
        for name, update in begun.updates.items():
            pair: Any = layers[name]
            for matrix, value in ((pair.lora_A[ADAPTER].weight, update.down), (pair.lora_B[ADAPTER].weight, update.up)):
                if not matrix.is_meta:
                    matrix.copy_(value.reshape(matrix.shape))


def _endings(wanted: Collection[str], modules: Collection[str]) -> list[str]:
    """Endings of module names that name these modules and no other linear layer or convolution: those that draftp
    trains by default where they do, else the shortest.
    """
    others = [name for name in modules if name not in wanted]

    def ending(name: str) -> str:
        pieces = name.split(".")
        tails = [".".join(pieces[-count:]) for count in range(1, len(pieces))]
        for tail in [*(t for t in DEFAULT_TARGETS if _ends(name, t)), *(t for t in tails if not t.isdecimal())]:
            if not any(_ends(other, tail) for other in others):
                return tail
        return name

    return list(dict.fromkeys(map(ending, wanted)))


def _ends(name: str, tail: str) -> bool:
    return name == tail or name.endswith(f".{tail}")

"""LoRAs that are part of the base (model.loras): merged into its weights when it is loaded, so that whatever asks the
base, the penalty, annealing or an exported picture, has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from draftcli.config import ModelConfig, SamplingConfig
from draftcli.core.lora.files import LORA_PARTS, Lora, refuse_stacked_dora, weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import Parts
from draftcli.core.models.loading import load_parts
from draftcli.core.models.places import base_lora
from draftcli.errors import InputError


def load_base(
    cfg: ModelConfig,
    sampling: SamplingConfig | None = None,
    *,
    trained_in_full: bool = False,
    hollow_unet: bool = False,
) -> Parts:
    """Load a model with its `model.loras`; see `load_parts`.

    Raises:
        InputError: as `load_parts`; or a LoRA cannot be read, or does not fit the model or the others.
    """
    files = [base_lora(text) for text in cfg.loras]
    parts = load_parts(cfg, sampling, trained_in_full=trained_in_full, hollow_unet=hollow_unet)
    shapes = {name: weight_shapes(network) for name, network in parts.modules.items() if name in LORA_PARTS}
    merge_loras(parts, [read_lora(path, shapes).scaled(scale) for path, scale in files])
    return parts


@torch.no_grad()
def merge_loras(parts: Parts, loras: Sequence[Lora]) -> None:
    """Add LoRAs to the weights of a model, in place, each to the weights without the others. Sums are in float64, as in
    merge-lora, and rounded once. Weights on the meta device are left alone.

    Raises:
        InputError: one of several for a layer is DoRA, or has a bias for a layer that has none.
    """
    refuse_stacked_dora(loras)
    for name, network in parts.modules.items():
        prefix = "" if any(module.startswith("text_model.") for module, _ in network.named_modules()) else "text_model."
        for lora in loras:
            for module in lora.parts.get(name, {}):
                _check_bias(lora, name, module, network.get_submodule(module.removeprefix(prefix)))
        changed = {module for lora in loras for module in lora.parts.get(name, {})}
        for module in sorted(changed):
            updates = [lora.parts[name][module] for lora in loras if module in lora.parts.get(name, {})]
            layer = network.get_submodule(module.removeprefix(prefix))
            weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
            if weight.is_meta:
                continue
            own = weight.double()
            weight.copy_(own + torch.stack([update.change(own) for update in updates]).sum(0))
            added = [
                update.scale * update.bias.double().to(weight.device) for update in updates if update.bias is not None
            ]
            if added and bias is not None:
                bias.copy_(bias.double() + torch.stack(added).sum(0))


def _check_bias(lora: Lora, part: str, module: str, layer: nn.Module) -> None:
    if lora.parts[part][module].bias is not None and getattr(layer, "bias", None) is None:
        raise InputError(
            f"model.loras {lora.name}: it has a bias for {part}.{module}, which has none in this model, so it cannot "
            "be merged; images can be generated with it (draftp sample --lora)"
        )

"""From a run, or a model with LoRAs, to the networks that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from draftcli.core.draftp import DRaFTPModel
from draftcli.core.lora.files import LORA_PARTS, weight_shapes
from draftcli.core.lora.merging import load_base
from draftcli.core.lora.reading import read_lora
from draftcli.errors import InputError
from draftcli.runs import unet_files
from draftcli.sampling.source import DrawingSource, with_precision


def load_source(source: DrawingSource) -> DRaFTPModel:
    """The model: its base, and as tuned the run's UNet and all LoRAs together.

    Raises:
        InputError: model or LoRA cannot be loaded, or don't fit each other.
    """
    cfg = with_precision(source)
    parts = load_base(cfg.model, cfg.sampling, trained_in_full=source.unet is not None)
    shapes = {name: weight_shapes(network) for name, network in parts.modules.items() if name in LORA_PARTS}
    loras = [(read_lora(path, shapes), scale) for path, scale in source.loras]
    model = DRaFTPModel(cfg, parts, loras)
    if source.unet is not None:
        _load_unet(model.unet, source.unet)
    return model


def _load_unet(unet: Any, folder: Path) -> None:
    own = {n.replace(".base_layer.", "."): t for n, t in unet.state_dict().items() if ".lora_" not in n}
    try:
        stored = {n: t for shard in unet_files(folder) for n, t in load_file(shard).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot be read, it may be damaged ({error})") from error
    odd = sorted(own.keys() ^ stored.keys()) or sorted(n for n in own if own[n].shape != stored[n].shape)
    if odd:
        raise InputError(
            f"{folder} does not fit the base: {len(odd)} tensors of the UNet differ, the first is {odd[0]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])

"""What weights a model has, in 16 letters: pictures made by others are not taken for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.lora.adapters import lora_layers

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 256  # elements of a tensor whose places count; all of them count in the sum


@dataclass(frozen=True)
class Fingerprint:
    """Of the base with its VAE and text encoders, and of what makes the tuned network another."""

    base: str
    tuned: str


def fingerprint(model: SDXLDRaFTPModel) -> Fingerprint:
    """The fingerprint of a model as it is now.

    Every bit of every weight counts, by an exact sum on the weights' own device: a model of 7 GB takes a second or two
    on a CPU, where a cryptographic hash would take ten times that. It tells models apart and proves nothing.
    """
    rest = [model.parts.vae, *model.parts.text_encoders]
    with model.base_weights():
        base = _hash(t for module in (model.unet, *rest) for t in _own_weights(module))
        base_unet = model.unet
    lora = [t for module in (model.unet, *rest) for t in _lora_weights(module)]
    full = [] if model.unet is base_unet else _own_weights(model.unet)
    return Fingerprint(base, _hash([*lora, *full]))


def _own_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    ]


def _lora_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    weights = [(name, tensor) for name, tensor in module.state_dict().items() if ".lora_" in name]
    scales = [s for layer in lora_layers(module) for s in layer.scaling.values()]
    return [*weights, *([("scaling", torch.tensor(scales))] if scales else [])]


def _hash(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).flatten()
        sample = bits[:: max(1, len(bits) // _SAMPLES)].tolist()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape), int(bits.sum()), sample)).encode())
    return digest.hexdigest()[:16]

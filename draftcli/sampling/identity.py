"""What a picture is made of, as one hash. `sample`, `anneal` and `eval` keep a picture that has it, and validation the
base's part of a run.

The hash starts from the settings sections `model` and `sampling` and leaves out only what is named below, so that a new
setting counts until somebody says why it does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.sharding import whole
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.family import tokenize
from draftcli.sampling.draw import Column, Picture

# Settings that change no picture, and why.
HARMLESS = {
    "model.device": "devices differ by rounding alone",
    "model.offload_text_encoders": "it moves the text encoders between devices; what they compute stays the same",
    "sampling.sizes": "sizes that training draws from; an image's own size is hashed",
}
# Settings that can say one thing in several ways, and what is hashed instead: what they come to.
RESOLVED = {
    "model.pretrained": "weights and configurations of the networks, tokens of the prompt",
    "model.family": "configurations of the networks",
    "model.config": "configurations of the networks, tokens of the prompt",
    "model.vae": "the VAE's weights and configuration",
    "model.variant": "the weights",
    "model.loras": "the weights, which they are merged into",
    "model.quantize": "the weights, in 8 bits or not",
    "model.precision": "dtypes of the weights and of the computation",
    "model.vae_precision": "dtypes of the VAE's weights",
    "model.prediction_type": "what the loaded model predicts",
    "model.zero_terminal_snr": "whether the loaded model has rescaled betas",
    "sampling.height": "the image's size",
    "sampling.width": "the image's size",
    "sampling.negative_prompt": "the image's negative prompt, its own or this one",
}
_SAMPLES = 256  # elements of a tensor whose positions count; all of them count in the sum
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Keys of a network's configuration that say who wrote it or repeat what its weights show.
_ABOUT_THE_FILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}


class Provenance:
    """Everything that the pictures of a model are made of.

    Weights are read once, the base's here and the tuned network's for the first key that depends on them: make a new
    one when they have changed. Collective where weights are split over processes.

    Args:
        model: tuned and base in one.

    Attributes:
        model: what was given.
        base_hash: of the base's weights with its VAE and text encoders, 16 hexadecimal digits.
    """

    def __init__(self, model: DRaFTPModel) -> None:
        self.model = model
        self.base_hash = _base_hash(model)
        self._common = [*_settings(model), *_facts(model), self.base_hash]
        self._tokens: dict[str, list[list[int]]] = {}

    @cached_property
    def _tuned_hash(self) -> str:
        """Of what makes the tuned network another; validation, which keeps the base's pictures, never asks for it."""
        with self.model.base_weights():
            base_unet = self.model.unet
        lora = [t for module in (self.model.unet, *_beside_unet(self.model)) for t in _lora_weights(module)]
        full = [] if self.model.unet is base_unet else _own_weights(self.model.unet)
        return _hash([*lora, *full])

    def negative(self, picture: Picture) -> str | None:
        """The picture's negative prompt: its own, else that of the settings."""
        own = picture.prompt.negative
        return self.model.cfg.sampling.negative_prompt if own is None else own

    def key(self, picture: Picture, column: Column) -> str:
        """The hash of a picture: 16 hexadecimal digits."""
        text, negative, weights = picture.prompt.text, self.negative(picture), column.weights(self.model)
        facts = [
            *self._common,
            *(text, self._token_ids(text), negative, self._token_ids(negative or "")),
            *(picture.seed, picture.size),
            *((self._tuned_hash, weights, column.lora_scale) if any(weights) else ()),
            column.stochastic and any(0 < w < 1 for w in weights),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _token_ids(self, text: str) -> list[list[int]]:
        if text not in self._tokens:
            self._tokens[text] = [ids.flatten().tolist() for ids in tokenize(self.model.parts, [text])]
        return self._tokens[text]


def _beside_unet(model: DRaFTPModel) -> list[nn.Module]:
    return [model.parts.vae, *model.parts.text_encoders]


def _base_hash(model: DRaFTPModel) -> str:
    """Of the base with VAE and text encoders.

    Every bit of every weight counts, by an exact sum on the weights' own device: a model of 7 GB takes a second or two
    on a CPU, where a cryptographic hash would take ten times that. It tells models apart and proves nothing.
    """
    with model.base_weights():
        unet = model.unet
    return _hash(t for module in (unet, *_beside_unet(model)) for t in _own_weights(module))


def _settings(model: DRaFTPModel) -> list[dict[str, Any]]:
    """The sections `model` and `sampling` without what is named in HARMLESS and RESOLVED."""
    left_out = {*HARMLESS, *RESOLVED}
    sections = model.cfg.model_dump(mode="json", include={"model", "sampling"})
    return [
        {key: value for key, value in section.items() if f"{name}.{key}" not in left_out}
        for name, section in sections.items()
    ]


def _facts(model: DRaFTPModel) -> list[Any]:
    parts = model.parts
    configurations = {name: _configuration(network) for name, network in parts.modules.items()}
    return [
        str(model.runtime.dtype),
        *(parts.prediction, parts.zero_terminal_snr, parts.zeros_for_empty),
        json.dumps(configurations, sort_keys=True, default=str),
    ]


def _configuration(network: Any) -> dict[str, Any]:
    """What a network's configuration says of what it computes."""
    config = network.config if isinstance(network.config, Mapping) else network.config.to_dict()
    return {key: value for key, value in config.items() if key[0] != "_" and key not in _ABOUT_THE_FILE}


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
        bits = whole(tensor.detach()).contiguous().view(_BITS[tensor.element_size()]).flatten()
        sample = bits[:: max(1, len(bits) // _SAMPLES)].tolist()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape), int(bits.sum()), sample)).encode())
    return digest.hexdigest()[:16]

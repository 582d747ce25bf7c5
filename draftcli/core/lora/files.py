"""A LoRA in clean form, and what puts it on networks. `core.lora.reading` makes one of a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from draftcli.core.lora.adapters import lora_layers
from draftcli.errors import InputError

LORA_PARTS = ("unet", "text_encoder", "text_encoder_2")
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Update:
    """What a LoRA does to one layer.

    Its weight W becomes W + scale * up @ down. With DoRA, each output's row of that (each filter of a convolution) is
    then brought to the length that `magnitude` says. As in peft and diffusers, a scale multiplies matrices and bias and
    leaves magnitudes as they are.

    Attributes:
        down: A, (r, in) or (r, in, kh, kw) for a convolution.
        up: B, (out, r) or (out, r, 1, 1).
        scale: alpha / r, and whatever the caller multiplies it with.
        bias: added to the layer's bias, scale times; (out,).
        magnitude: of DoRA; (out,).
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner width r."""
        return self.down.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether the two matrices are all of it."""
        return self.bias is None and self.magnitude is None

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What the matrices add to the weight, in the weight's shape."""
        product = self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1)
        return (self.scale * product).reshape(self.up.shape[0], *self.down.shape[1:])

    def change(self, weight: Tensor) -> Tensor:
        """The difference that it makes to `weight`, in the weight's dtype."""
        delta = self.delta(weight.dtype)
        if self.magnitude is None:
            return delta
        moved = weight + delta
        length = torch.linalg.vector_norm(moved.flatten(1), dim=1)
        factor = self.magnitude.to(weight) / length
        return moved * factor.reshape(-1, *(1 for _ in weight.shape[1:])) - weight


@dataclass(frozen=True)
class Lora:
    """One LoRA in clean form.

    Attributes:
        name: where it came from, for messages.
        parts: by network (`unet`, `text_encoder`, `text_encoder_2`) and module name as diffusers and transformers have
            it (text encoders always with `text_model.` in front); only networks that it changes.
    """

    name: str
    parts: dict[str, dict[str, Update]]

    def scaled(self, scale: float) -> Lora:
        """The same with `scale` times its effect."""
        return Lora(
            self.name,
            {
                p: {m: replace(u, scale=u.scale * scale) for m, u in updates.items()}
                for p, updates in self.parts.items()
            },
        )

    def updates(self) -> Iterator[tuple[str, str, Update]]:
        """Every (network, module, update)."""
        for part, updates in self.parts.items():
            for module, update in updates.items():
                yield part, module, update


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of the weight of each linear layer and convolution, by module name; adapters are looked through."""
    found = {}
    for name, module in network.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        inside_adapter = re.search(r"\.(base_layer|lora_[A-Z])\b", name)
        if isinstance(layer, nn.Linear | nn.Conv2d) and not inside_adapter:
            found[name] = tuple(layer.weight.shape)
    return found


def refuse_stacked_dora(loras: Sequence[Lora]) -> None:
    """Refuse what has no one meaning: DoRA on a layer that another LoRA changes too.

    The length that DoRA gives to a row is that of the model it was trained on; where another change comes before or
    after it, peft's own merge and its layers give different networks.

    Raises:
        InputError: there is such a layer.
    """
    seen: dict[tuple[str, str], tuple[Lora, Update]] = {}
    for lora in loras:
        for part, module, update in lora.updates():
            other, first = seen.setdefault((part, module), (lora, update))
            if first is not update and (first.magnitude is not None or update.magnitude is not None):
                raise InputError(
                    f"{other.name} and {lora.name} both change {part}.{module}, and one of them is DoRA, which cannot "
                    "be added to others; merge them into the model one after the other"
                )


def attach_loras(network: nn.Module, loras: Sequence[tuple[Lora, float]], part: str = "unet") -> None:
    """Put LoRAs on `network`, in place and frozen: together they add the sum of scale times each.

    `core.lora.adapters.adapters_off` then gives the base, also where a training adapter was attached before.

    Args:
        network: the UNet, or with `part` a text encoder.
        loras: with the scale that each is applied with; may be negative.
        part: which of each LoRA's parts.

    LoRA weights become float32 at least, as in training.

    Raises:
        InputError: one of several for a layer is DoRA.
    """
    refuse_stacked_dora([lora for lora, _ in loras])
    count = len({name for layer in lora_layers(network) for name in layer.lora_A})
    prefix = "" if any(name.startswith("text_model.") for name, _ in network.named_modules()) else "text_model."
    for lora, scale in loras:
        updates = {name.removeprefix(prefix): update for name, update in lora.parts.get(part, {}).items()}
        for kind in sorted({_kind(update) for update in updates.values()}):
            _attach(network, f"lora_{count}", {n: u for n, u in updates.items() if _kind(u) == kind}, scale)
            count += 1
    for layer in lora_layers(network):
        wanted_grad = [(p, p.requires_grad) for p in layer.parameters()]
        layer.set_adapter(list(layer.lora_A))
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)


def _kind(update: Update) -> tuple[int, bool, bool]:
    """What must be the same for all layers of one of peft's adapters: rank, whether with a bias, whether DoRA."""
    return update.rank, update.bias is not None, update.magnitude is not None


def _attach(network: nn.Module, adapter: str, updates: Mapping[str, Update], scale: float) -> None:
    rank, with_bias, is_dora = _kind(next(iter(updates.values())))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(updates),
        init_lora_weights=False,
        lora_bias=with_bias,
        use_dora=is_dora,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")  # to a layer without one, which is no fault
        wanted_grad = [(p, p.requires_grad) for p in network.parameters()]
        inject_adapter_in_model(config, network, adapter_name=adapter)
        for parameter, wanted in wanted_grad:
            parameter.requires_grad_(wanted)
    for layer_name, layer in network.named_modules():
        if not isinstance(layer, BaseTunerLayer) or adapter not in layer.lora_A:
            continue
        update = updates[layer_name]
        base: Any = layer.get_base_layer().weight
        dtype = torch.promote_types(base.dtype, torch.float32)
        layer.scaling[adapter] = update.scale * scale

        def frozen(tensor: Tensor, base: Tensor = base, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(tensor.to(base.device, dtype), requires_grad=False)

        layer.lora_A[adapter].weight = frozen(update.down)
        layer.lora_B[adapter].weight = frozen(update.up)
        if update.bias is not None:
            layer.lora_B[adapter].bias = frozen(update.bias)
        if update.magnitude is not None:
            as_convolution = (1, -1, 1, 1) if base.ndim == 4 else (-1,)
            layer.lora_magnitude_vector[adapter].weight = frozen(update.magnitude.reshape(as_convolution))

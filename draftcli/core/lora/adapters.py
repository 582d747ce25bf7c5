"""LoRA on the UNet, and the frozen base as a context: adapters off, without a second copy of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from draftcli.core.models.family import find_family
from draftcli.errors import InputError

# The linear layers of every transformer block: the reference's `sdlora` in diffusers' names.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in that file, as JSON
# The settings of peft that say what a LoRA's matrices mean. Each release of peft knows more settings than the one
# before, and refuses a file that has one which it does not know: of those that are left out, the defaults hold.
STORED_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"),
    *("bias", "use_rslora", "use_dora"),
)


def attach_lora(
    unet: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
) -> None:
    """Freeze `unet` and put a LoRA on it, in place. The adapter starts as zero (B = 0): tuned equals base.

    Args:
        unet: the network; its own weights keep their dtype.
        rank: inner width r of each B A.
        alpha: the update is alpha / rank * B A; None means alpha = rank, scale 1, as in the reference.
        targets: endings of module names (linear layers and convolutions).
        seed: of A, so that a run can be repeated; no random state of the caller is touched.

    LoRA weights are float32 (float64 on a float64 network) whatever the dtype of the network: bfloat16 would swallow
    the small updates of the optimizer.

    Raises:
        InputError: no module has such a name.
    """
    names = [name for name, _ in unet.named_modules()]
    missing = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if len(missing) == len(targets):
        raise InputError(f"peft.target_modules {', '.join(missing)}: no module of the UNet has such a name")
    if missing:
        warnings.warn(f"peft.target_modules {', '.join(missing)}: no module of the UNet has such a name", stacklevel=2)
    unet.requires_grad_(False)
    scale: Any = alpha or rank  # peft annotates it as int and takes fractions
    config = LoraConfig(
        r=rank, lora_alpha=scale, target_modules=list(targets), init_lora_weights="gaussian", lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def lora_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """Every layer of `unet` that carries an adapter."""
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(unet: nn.Module) -> Iterator[None]:
    """Inside, `unet` is its base. Afterwards every adapter is exactly as it was, also after an exception.

    Don't call backward inside: the gradient would silently go nowhere.
    """
    were_on = [layer for layer in lora_layers(unet) if not layer.disable_adapters]
    try:
        for layer in were_on:
            _switch(layer, on=False)
        yield
    finally:
        for layer in were_on:
            _switch(layer, on=True)


@contextmanager
def adapters_scaled(network: nn.Module, factor: float) -> Iterator[None]:
    """Inside, the adapters of `network` have `factor` times their effect. Afterwards they are exactly as they were."""
    before = [(layer, dict(layer.scaling)) for layer in lora_layers(network)]
    try:
        for layer, scaling in before:
            layer.scaling.update({name: factor * scale for name, scale in scaling.items()})
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


def _switch(layer: BaseTunerLayer, on: bool) -> None:
    """Switch a layer's adapters, and nothing else.

    peft's enable_adapters also freezes and un-freezes them, which would wake what someone froze.
    """
    wanted_grad = [(p, p.requires_grad) for p in layer.parameters()]
    layer.enable_adapters(on)
    for parameter, wanted in wanted_grad:
        parameter.requires_grad_(wanted)


def lora_state_dict(unet: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names (`... .lora_A.weight`), without a prefix."""
    return get_peft_model_state_dict(unet, adapter_name=ADAPTER)


def load_lora_state_dict(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors written by `lora_state_dict` back, in place.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape.
    """
    own = lora_state_dict(unet)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise InputError(f"the LoRA does not fit the UNet: {len(odd)} tensors differ, the first is {odd[0]}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(f"the LoRA does not fit: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
    set_peft_model_state_dict(unet, dict(state), adapter_name=ADAPTER)


def stored_settings(config: LoraConfig) -> dict[str, Any]:
    """STORED_SETTINGS of an adapter, as JSON takes them."""
    settings = config.to_dict()
    return {key: sorted(v) if isinstance(v := settings[key], set) else v for key in STORED_SETTINGS}


def save_lora(unet: nn.Module, folder: Path, layers: Mapping[str, Tensor] | None = None) -> Path:
    """Write LORA_FILE as `pipe.load_lora_weights(folder)` of diffusers reads it.

    The scale alpha / rank travels in the file's metadata, as diffusers writes it, so that peft 0.17 and later read it.

    Args:
        unet: with a LoRA.
        folder: where to.
        layers: its tensors by `lora_state_dict`'s names, where those in `unet` are split over processes.
    """
    import diffusers

    metadata = stored_settings(unet.peft_config[ADAPTER])  # type: ignore[index]
    tensors: dict[str, Any] = dict(layers or lora_state_dict(unet))
    pipeline = getattr(diffusers, find_family().pipeline)
    pipeline.save_lora_weights(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=metadata)
    return folder / LORA_FILE

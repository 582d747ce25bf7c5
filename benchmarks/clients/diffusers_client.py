"""diffusers, from --source or (--source .) as it is installed: a LoRA on SDXL's networks. See sdxl_lora.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sdxl_lora import arguments, compare
from torch import Tensor, nn

_, lora = arguments("diffusers")

import diffusers  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

from draftcli.core.models.meta import modules_on_meta  # noqa: E402
from draftcli.core.models.original_names import original_unet_names  # noqa: E402
from draftcli.core.models.sdxl import SDXL_CONFIG  # noqa: E402

networks, pipeline = modules_on_meta(SDXL_CONFIG), diffusers.StableDiffusionXLPipeline
for network in networks.values():  # on the CPU, where peft wants what it adds to, and without memory
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
originals = original_unet_names(name for name, _ in networks["unet"].named_modules())
state, alphas = pipeline.lora_state_dict(dict(lora.tensors), unet_config=networks["unet"].config)
pipeline.load_lora_into_unet(state, alphas, networks["unet"], low_cpu_mem_usage=True)
for part in ("text_encoder", "text_encoder_2"):
    if any(key.startswith(f"{part}.") for key in state):
        network = networks[part]
        pipeline.load_lora_into_text_encoder(state, alphas, network, prefix=part, low_cpu_mem_usage=True)


def name_in_file(part: str, module: str) -> str:
    """What the file calls a module."""
    if part != "unet" and not module.startswith("text_"):
        module = f"text_model.{module}"
    if not lora.by_kohya:
        return f"{part}.{module}"
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
    return prefix + (originals[module] if part == "unet" else module).replace(".", "_")


def added_by(layer: Any) -> Callable[[], Tensor]:
    """What an adapter adds to the weight of its layer."""
    (adapter,) = layer.lora_A
    return lambda: layer.get_delta_weight(adapter).detach().reshape(layer.get_base_layer().weight.shape)


added = {
    name_in_file(part, module): added_by(layer)
    for part, network in networks.items()
    if part != "vae"
    for module, layer in network.named_modules()
    if isinstance(layer, LoraLayer)
}
compare(f"diffusers {diffusers.__version__}", lora, added, expected=len(lora.modules))

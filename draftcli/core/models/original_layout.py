"""The layout of single files of the original code, tensor by tensor, from diffusers' and transformers' names.

Both directions come from one table: an original tensor is made of one or more of ours (OpenCLIP keeps query, key and
value in one matrix), stacked along the first dimension, each as it is, transposed or as a 1 x 1 convolution.
The same facts as tables for people: docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftcli.core.models.original_names import original_unet_names
from draftcli.errors import InputError

# What the tensors of these networks begin with, in every family; their text encoders differ.
ORIGINAL_UNET, ORIGINAL_VAE = "model.diffusion_model.", "first_stage_model."
# Where single files come from, as modelspec has it.
ORIGINAL_CODE = "https://github.com/Stability-AI/generative-models"
# Empty tensors by which ComfyUI, Forge and others know a v-prediction checkpoint, and one with zero terminal SNR.
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
Form = Literal["plain", "transposed", "convolution"]

_VAE_NAMES = (
    (r"conv_norm_out\.", "norm_out."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3sample."),
    (r"conv_shortcut\.", "nin_shortcut."),
)
_OPEN_CLIP_NAMES = (
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight", "text_projection"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
)


@dataclass(frozen=True)
class Original:
    """One tensor of the original layout.

    Attributes:
        key: its name there.
        part: the network (`unet`, `vae`, `text_encoder`, `text_encoder_2`).
        sources: our keys in that network, stacked along the first dimension in this order.
        form: how each is laid out there.
    """

    key: str
    part: str
    sources: tuple[str, ...]
    form: Form = "plain"


def original_layout(part: str, keys: Mapping[str, tuple[int, ...]], prefix: str) -> list[Original]:
    """Every tensor of the original layout of one network.

    Args:
        part: the network.
        keys: its own keys, those of text encoders with `text_model.` in front, and shapes.
        prefix: what the tensors begin with.

    Raises:
        InputError: the original layout has no place for a key: the network is that of another kind of model.
    """
    grouped: dict[str, list[str]] = {}
    names = _unet_names(keys) if part == "unet" else {key: _name(part, key, keys) for key in keys}
    for key in keys:
        if key not in names:
            raise InputError(
                f"{part}.{key} has no place in a single file: the configuration is another model's; give the "
                "model's own with --config, or where the base is a folder take --format diffusers"
            )
        grouped.setdefault(prefix + names[key], []).append(key)
    found = []
    for name, sources in grouped.items():
        form: Form = "plain"
        if part == "text_encoder_2" and sources[0] == "text_projection.weight":
            form = "transposed"
        elif part == "vae" and ".mid.attn_1." in name and len(keys[sources[0]]) == 2:
            form = "convolution"
        found.append(Original(name, part, tuple(sorted(sources, key=_qkv_order)), form))
    return found


def to_original(tensor: Tensor, form: Form) -> Tensor:
    """One of our tensors in the form that the original layout wants."""
    if form == "transposed":
        return tensor.T
    return tensor[:, :, None, None] if form == "convolution" else tensor


def from_original(tensor: Tensor, form: Form) -> Tensor:
    """The reverse of `to_original`."""
    if form == "transposed":
        return tensor.T
    return tensor.flatten(1) if form == "convolution" else tensor


def original_shape(original: Original, keys: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor of the original layout."""
    with torch.device("meta"):
        shapes = [to_original(torch.empty(keys[key]), original.form).shape for key in original.sources]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _qkv_order(key: str) -> int:
    return next((i for i, mark in enumerate((".q_proj.", ".k_proj.", ".v_proj.")) if mark in key), 0)


def _unet_names(keys: Iterable[str]) -> dict[str, str]:
    modules = {key: key.rpartition(".")[0] for key in keys}
    names = original_unet_names(dict.fromkeys(modules.values()))
    return {key: f"{names[module]}.{key.rpartition('.')[2]}" for key, module in modules.items() if module in names}


def _name(part: str, key: str, keys: Iterable[str]) -> str:
    if part == "text_encoder":
        return key
    for pattern, name in _VAE_NAMES if part == "vae" else _OPEN_CLIP_NAMES:
        key = re.sub(pattern, name, key)
    if match := re.match(r"decoder\.up\.(\d+)\.", key):  # the original counts them from the picture
        last = max(int(m[1]) for k in keys if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", k)))
        return f"decoder.up.{last - int(match[1])}.{key[match.end() :]}"
    return key

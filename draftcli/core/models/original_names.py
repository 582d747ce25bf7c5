"""Names of the original code (input_blocks.4.1...) for diffusers' names of modules (down_blocks.1.attentions.0...).

Single-file checkpoints and kohya's LoRAs use them. The table is worked out from the modules that are there, so it holds
for any depth of the UNet; the same facts are tabulated in docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)(?:\.(.+))?")


def original_unet_names(modules: Iterable[str]) -> dict[str, str]:
    """The original name of each of the UNet's modules (by diffusers' names) that has weights of its own.

    Args:
        modules: of the whole UNet, as its depth is read off from them. Those that the original lacks are left out.
    """
    names = list(modules)
    blocks = [match for name in names if (match := _BLOCK.fullmatch(name))]
    # Layers per block: in the original, a block is that many positions and one for its downsampler.
    depths = [int(m[4]) for m in blocks if m[1] == "down_blocks" and m[3] == "resnets"]
    assert depths, "the whole UNet's modules, not a LoRA's"
    layers = 1 + max(depths)
    with_attention = {int(m[2]) for m in blocks if m[1] == "up_blocks" and m[3] == "attentions"}
    found = {name: _original_unet_name(name, layers, with_attention) for name in names}
    return {name: original for name, original in found.items() if original}


def _original_unet_name(name: str, layers: int, up_with_attention: set[int]) -> str | None:
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    if match := _MIDDLE.fullmatch(name):
        kind, index, inner = match.groups()
        position = 2 * int(index) if kind == "resnets" else 2 * int(index) + 1
        return _joined(f"middle_block.{position}", kind, inner)
    if not (match := _BLOCK.fullmatch(name)):
        return None
    side, block, kind, index, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down_blocks":
        place = f"input_blocks.{1 + block * (layers + 1) + (layers if kind == 'downsamplers' else index)}"
        part = 1 if kind == "attentions" else 0
    else:
        place = f"output_blocks.{block * (layers + 1) + (layers if kind == 'upsamplers' else index)}"
        part = {"resnets": 0, "attentions": 1}.get(kind, 1 + (block in up_with_attention))
    return _joined(f"{place}.{part}", kind, inner)


def _joined(place: str, kind: str, inner: str | None) -> str | None:
    if kind == "resnets":
        inner = _RESNET.get(inner or "")
    elif kind == "downsamplers":
        inner = "op" if inner == "conv" else None
    return f"{place}.{inner}" if inner else None

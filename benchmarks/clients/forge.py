"""Forge: a LoRA through its own table of keys and its own sum, on modules by SDXL's names. See sdxl_lora.py."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

from sdxl_lora import arguments, compare, modules_by_name, sdxl_shapes, single_file_modules, without

_, lora = arguments("Forge")
without("gguf", "torchvision", "torchvision.transforms")
sys.argv.append("--always-cpu")

import torch  # noqa: E402
from backend.patcher.lora import load_lora, merge_lora_to_weight, model_lora_keys_clip, model_lora_keys_unet  # noqa: E402
from torch import Tensor, nn  # noqa: E402

model, shapes = nn.Module(), sdxl_shapes()
model.config = SimpleNamespace(huggingface_repo="stabilityai/stable-diffusion-xl-base-1.0")
model.diffusion_model = single_file_modules()
model.diffusion_model.config = {
    **{"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10]},
    **{"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10},
}
places = {"clip_l.transformer": "text_encoder", "clip_g.transformer": "text_encoder_2"}
text = modules_by_name({f"{place}.{name}": s for place, part in places.items() for name, s in shapes[part].items()})
weights = {**model.state_dict(), **text.state_dict()}
unet_keys, text_keys = model_lora_keys_unet(model, {}), model_lora_keys_clip(text, {})
on_unet, left = load_lora(dict(lora.tensors), unet_keys)
on_text, left = load_lora(left, text_keys)
patches = on_unet | on_text
refused = len(left) > 12  # its Lora extension then leaves the whole file out
names = {key: name for name, key in (unet_keys | text_keys).items() if name in lora.modules and key in patches}


def added_to(key: str) -> Tensor:
    """What it adds to one weight."""
    return merge_lora_to_weight([(1.0, patches[key], 1.0, None, None)], torch.zeros(weights[key].shape), key)


added = {} if refused else {name: partial(added_to, key) for key, name in names.items()}
compare("Forge", lora, added, expected=len(lora.modules) if lora.by_kohya else 0)

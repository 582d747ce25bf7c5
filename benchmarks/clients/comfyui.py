"""ComfyUI: a LoRA through its own table of keys and its own sum, on its own SDXL. See sdxl_lora.py."""

from __future__ import annotations

import importlib
import sys

from sdxl_lora import arguments, compare, without

source, lora = arguments("ComfyUI")
without("torchvision", "torchvision.transforms", "torchaudio", "av", "comfy_aimdo", "comfy_kitchen")

sys.argv.append("--cpu")
importlib.import_module("comfy.options").enable_args_parsing()  # before anything else of it is imported

import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

meta = torch.device("meta")
settings = {
    **comfy.supported_models.SDXL.unet_config,
    **{
        "in_channels": 4,
        "out_channels": 4,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "dtype": torch.float32,
    },
    **{"num_classes": "sequential", "use_spatial_transformer": True, "num_head_channels": 64, "legacy": False},
    **{"transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10},
    **{"image_size": 32, "dtype": torch.float32},
}
config = comfy.supported_models.SDXL(settings)
with meta:
    unet = config.get_model({}, device=meta)
    text = comfy.sdxl_clip.SDXLClipModel(device=meta, dtype=torch.float32)
keys = comfy.lora.model_lora_keys_clip(text, comfy.lora.model_lora_keys_unet(unet, {}))
weights = {**dict(unet.named_parameters()), **dict(text.named_parameters())}
patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora.tensors)), keys, log_missing=False)
names = {key: name for name, key in keys.items() if name in lora.modules and key in patches}
added = {
    name: lambda key=key: comfy.lora.calculate_weight(
        [(1.0, patches[key], 1.0, None, None)], torch.zeros(weights[key].shape), key
    )
    for key, name in names.items()
}
# Of diffusers' names it misses all of attention but the projections around it, and says so in its console alone.
attention = [name for name in lora.modules if ".attn" in name and ".to_" in name]
missed = 0 if lora.by_kohya else len(attention) + ("text_encoder_2.text_projection" in lora.modules)
said = (source / "comfyui_version.py").read_text().partition('__version__ = "')[2].partition('"')[0]
compare(f"ComfyUI {said}", lora, added, expected=len(lora.modules) - missed)

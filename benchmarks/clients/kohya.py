"""kohya's sd-scripts: a LoRA put on its own SDXL, as its scripts for drawing and merging do. See sdxl_lora.py."""

from __future__ import annotations

from sdxl_lora import arguments, compare, without

_, lora = arguments("sd-scripts")
without("torchvision", "torchvision.transforms", "cv2")

import torch  # noqa: E402
from library.sdxl_original_unet import SdxlUNet2DConditionModel  # noqa: E402
from networks.lora import create_network_from_weights  # noqa: E402
from torch import nn  # noqa: E402

from draftcli.core.models.meta import modules_on_meta  # noqa: E402
from draftcli.core.models.sdxl import SDXL_CONFIG  # noqa: E402

networks = modules_on_meta(SDXL_CONFIG)
with torch.device("meta"):
    unet = SdxlUNet2DConditionModel()
encoders = [networks["text_encoder"], networks["text_encoder_2"]]
for i, encoder in enumerate(encoders):
    if not hasattr(encoder, "text_model"):  # transformers 5; sd-scripts is for 4, where CLIP-L has its layers in it
        encoders[i] = nn.ModuleDict({"text_model": encoder})
network, state = create_network_from_weights(1.0, None, None, encoders, unet, dict(lora.tensors), for_inference=True)
network.apply_to(encoders, unet, apply_text_encoder=True, apply_unet=True)
network.load_state_dict(state, strict=False)
network.requires_grad_(False)
added = {module.lora_name: module.get_weight for module in (*network.unet_loras, *network.text_encoder_loras)}
# It has no place for what it never trains; diffusers' names it does not read at all.
starts = ("input_blocks_0_0", "out_2", "time_embed_", "label_emb_")
outside = [n for n in lora.modules if n.removeprefix("lora_unet_").startswith(starts) or n.endswith("text_projection")]
compare("sd-scripts", lora, added, expected=len(lora.modules) - len(outside) if lora.by_kohya else 0)

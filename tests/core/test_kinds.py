"""Models that draftp does not tune: each is told by its configuration or its keys, in one line that says what to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command import draftp

CHOOSE = "draftp tunes text-to-image models, whose UNet has 4 channels in and out; choose Stable Diffusion"
NO_ENCODER = {"text_encoder": [None, None], "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
XL, UNET = "StableDiffusionXLPipeline", "model.diffusion_model."


def index(kind: str, **fields: object) -> dict[str, dict]:
    return {"model_index.json": {"_class_name": kind, **fields}}


def channels(kind: str, taken: int, given: int = 4) -> dict[str, dict]:
    return index(kind) | {"unet/config.json": {"in_channels": taken, "out_channels": given}}


FOLDERS = {
    "refiner": (index("StableDiffusionXLImg2ImgPipeline", requires_aesthetics_score=True), "it is the refiner"),
    "refiner without a mark": (index(XL, **NO_ENCODER), "the second text encoder alone, so it is the refiner of SDXL"),
    "inpainting": (
        channels("StableDiffusionXLInpaintPipeline", 9),
        f"9 channels, so it is an inpainting model; {CHOOSE}",
    ),
    "inpainting of SD 1": (channels("StableDiffusionInpaintPipeline", 9), "so it is an inpainting model"),
    "as another class": (channels(XL, 9), "so it is an inpainting model"),
    "instruct-pix2pix": (
        channels("StableDiffusionInstructPix2PixPipeline", 8),
        "an editing model, such as InstructPix",
    ),
    "depth": (channels("StableDiffusionDepth2ImgPipeline", 5), "so it is a depth model"),
    "upscaler": (channels("StableDiffusionUpscalePipeline", 7), "so it is an upscaler"),
    "rectified flow, 16": (
        channels(XL, 16, 16),
        f"takes 16 channels, so it makes latents for another VAE, as SDXL retrained as rectified flow does; {CHOOSE}",
    ),
    "rectified flow, 32": (channels(XL, 32, 32), "takes 32 channels, so it makes latents for another VAE"),
    "FLUX": (index("FluxPipeline"), f"its class is FluxPipeline, so it is FLUX; {CHOOSE}"),
    "SD 3": (index("StableDiffusion3Pipeline"), "so it is Stable Diffusion 3"),
    "another pipeline": (index("PixArtSigmaPipeline"), "is a PixArtSigmaPipeline, not Stable Diffusion XL"),
    "ControlNet": (
        {"config.json": {"_class_name": "ControlNetModel"}},
        "so it is a ControlNet; give the model that it",
    ),
    "ControlNet's pipeline": (index("StableDiffusionXLControlNetPipeline"), "so it is a ControlNet"),
    "VAE": (
        {"config.json": {"_class_name": "AutoencoderKL"}},
        "it is a VAE alone; give a whole model, and this one as",
    ),
    "UNet": (
        {"config.json": {"_class_name": "UNet2DConditionModel"}},
        "is UNet2DConditionModel alone, not a whole model",
    ),
}
WHOLE = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
    f"{UNET}out.2.weight": (4, 8, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (8,),
    "conditioner.embedders.1.model.ln_final.bias": (8,),
}
FILES = {
    "refiner": (
        {**WHOLE, "conditioner.embedders.0.model.ln_final.bias": (8,)},
        "so it is the refiner of SDXL; give the",
    ),
    "inpainting": (
        {**WHOLE, f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)},
        "9 channels, so it is an inpainting model",
    ),
    "instruct-pix2pix": ({**WHOLE, f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "so it is an editing model"),
    "rectified flow": (
        {**WHOLE, f"{UNET}input_blocks.0.0.weight": (8, 16, 3, 3), f"{UNET}out.2.weight": (16, 8, 3, 3)},
        "takes 16 channels, so it makes latents for another VAE",
    ),
    "variances": (
        {**WHOLE, f"{UNET}out.2.weight": (8, 8, 3, 3)},
        "gives 8 channels, so it predicts more than",
    ),
    "FLUX": (
        {"double_blocks.0.img_attn.proj.weight": (8, 8)},
        "holds the tensor double_blocks.0.img_attn.proj.weight, so",
    ),
    "FLUX with text encoders": ({f"{UNET}double_blocks.0.img_mod.lin.bias": (8,)}, "so it is FLUX"),
    "SD 3": ({f"{UNET}joint_blocks.0.x_block.attn.proj.bias": (8,)}, "so it is Stable Diffusion 3"),
    "SD 2": (
        {f"{UNET}out.2.weight": (4, 8, 3, 3), "cond_stage_model.model.ln_final.bias": (8,)},
        "so it is Stable Diffusion 2 as a single file; give that model as a diffusers folder",
    ),
    "ControlNet": ({"control_model.time_embed.0.weight": (8, 8)}, "so it is a ControlNet"),
    "ControlNet of diffusers": ({"controlnet_cond_embedding.conv_in.bias": (8,), "conv_in.bias": (8,)}, "a ControlNet"),
    "VAE": ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.bias": (8,)}, "it is a VAE alone; give a whole"),
    "VAE of a checkpoint": ({"first_stage_model.decoder.conv_in.bias": (8,)}, "so it is a VAE alone"),
    "LoRA of kohya": (
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)},
        "so it is a LoRA; give the",
    ),
    "LoRA of diffusers": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "so it is a LoRA"),
    "something": ({"weight": (8, 8)}, "it is not a checkpoint of Stable Diffusion XL"),
}
# Whose layers are those of a family, so that a LoRA can be merged into them where the rest is in order.
TASKS = ("inpainting", "inpainting of SD 1", "as another class", "instruct-pix2pix", "depth", "upscaler", "variances")


def written(contents: dict) -> Path:
    """A folder of these JSON files, or a single file of tensors of these shapes."""
    if all(isinstance(value, tuple) for value in contents.values()):
        save_file({key: torch.zeros(shape) for key, shape in contents.items()}, "model.safetensors")
        return Path("model.safetensors")
    for name, data in contents.items():
        (Path("model") / name).parent.mkdir(parents=True, exist_ok=True)
        (Path("model") / name).write_text(json.dumps(data))
    return Path("model")


CASES = [*FOLDERS.items(), *((f"{name}, one file", case) for name, case in FILES.items())]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_another_kind_of_model_is_refused_with_what_it_is_and_what_to_do(name, case):
    contents, words = case
    model = written(contents)
    drawn = draftp("sample", "--model", model, "--prompt", "x")
    merged = draftp("merge-lora", model, "--base", model, "--output", "out", "--verify", "keys")
    for result in (drawn, merged):
        assert result.code == 2, result.err
        assert result.err.count("\n") == 1
        assert str(model) in result.err
    assert f"model.pretrained {model}" in drawn.err
    assert words in drawn.err
    if name.removesuffix(", one file") in TASKS:
        assert words not in merged.err
    else:
        assert words in merged.err

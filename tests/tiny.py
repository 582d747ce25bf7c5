"""A very small SDXL with random weights, as the diffusers folder that SDXL is: the same classes, the same conditioning;
and likewise a Stable Diffusion 1.x or 2.x.

Random networks of this size hardly depend on what they are asked, so the prompt's way into the UNet is amplified:
another prompt, another size or another negative prompt moves the picture by more than any tolerance of the tests.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from draftcli.config import Config, ModelConfig, check_config
from draftcli.core.backward import Forward, KeptGraph, Piece
from draftcli.core.batch import Batch
from draftcli.core.draftp import DRaFTPModel, SDDRaFTPModel, SDXLDRaFTPModel
from draftcli.core.lora.merging import load_base
from draftcli.core.models.family import Parts

WIDTHS = (32, 48)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SDXL_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
PROMPTS = ["a red circle", "two blue squares on a lawn", "night", "a very small star, far away"]


def make_sdxl(
    folder: Path, prediction_type: str = "epsilon", rescale_betas_zero_snr: bool = False, seed: int = 0
) -> Path:
    """Write the model to `folder`; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(CLIPTextModel, WIDTHS[0]),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, WIDTHS[1]),
            tokenizer=_tokenizer(folder / "tokenizer", EOS),
            tokenizer_2=_tokenizer(folder / "tokenizer_2", "!"),
            unet=_unet(),
            scheduler=EulerDiscreteScheduler(
                **SDXL_SCHEDULER, prediction_type=prediction_type, rescale_betas_zero_snr=rescale_betas_zero_snr
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def tiny_sd1(
    folder: Path,
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    seed: int = 0,
    version: int = 1,
) -> Path:
    """Write a Stable Diffusion to `folder`, 1.x or 2.x; of other networks than the SDXL of the same seed."""
    noise = {**SDXL_SCHEDULER, "prediction_type": prediction_type, "set_alpha_to_one": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(0.18215),
            text_encoder=_text_encoder(CLIPTextModel, WIDTHS[0], "quick_gelu" if version == 1 else "gelu"),
            tokenizer=_tokenizer(folder / "tokenizer", EOS if version == 1 else "!"),
            unet=_unet_sd1(version),
            scheduler=DDIMScheduler(**noise, clip_sample=False, rescale_betas_zero_snr=True)
            if rescale_betas_zero_snr
            else PNDMScheduler(**noise, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def told_guidance(model: Path, folder: Path) -> Path:
    """A copy of the model in `folder` whose UNet takes a guidance scale, and whose scheduler is LCM's."""
    shutil.copytree(model, folder)
    plain = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet: Any = UNet2DConditionModel.from_config({**plain.config, "time_cond_proj_dim": 10})
    unet.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.mul_(3)
    unet.save_pretrained(folder / "unet")
    LCMScheduler(**SDXL_SCHEDULER).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def one_layer_lora(file: Path) -> Path:
    """A LoRA for one layer of the tiny UNet, by diffusers' names, with an effect that counts."""
    generator = torch.Generator().manual_seed(0)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    matrices = {"lora_A": (1, 32), "lora_B": (32, 1)}
    tensors = {f"{layer}.{name}.weight": torch.randn(s, generator=generator) for name, s in matrices.items()}
    save_file(tensors, file)
    return file


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """Settings for the tiny model; `sections` are laid over these: tiny_config(path, draftp={"kl_coeff": 0})."""
    data: dict[str, dict[str, Any]] = {
        "model": {"pretrained": str(folder), "precision": "fp64", "device": "cpu"},
        "sampling": {"height": 64, "width": 64, "steps": 4, "scale": 3.0},
        "draftp": {"truncation_steps": 2, "kl_coeff": 0.1},
        "peft": {"rank": 2},
        "trainer": {"micro_batch_size": 2, "global_batch_size": 4},
    }
    for section, values in sections.items():
        data[section] = {**data.get(section, {}), **values}
    return check_config(data)


def tiny_model(folder: Path, moved: float = 0.0, **sections: dict[str, Any]) -> DRaFTPModel:
    """The model with a reward to train for; `moved` shifts the trained weights away from the base."""
    cfg = tiny_config(folder, **sections)
    parts = copy.deepcopy(_loaded(cfg.model, cfg.peft.peft_scheme == "none"))
    model = {"sdxl": SDXLDRaFTPModel, "sd1": SDDRaFTPModel}[parts.family.name](cfg, parts)
    model.reward_model = prefers_red
    if moved:
        move(model, moved)
    return model


@cache
def _loaded(cfg: ModelConfig, in_full: bool) -> Parts:
    """Copying is quicker than loading, of which tests/core/test_loading.py has its share."""
    return load_base(cfg, trained_in_full=in_full)


def move(model: DRaFTPModel, by: float) -> None:
    """Shift the trained weights as a training would, the same way whatever the batch or the process."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable_parameters:
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(by * step.to(parameter))


@torch.no_grad()
def latents_at(model: DRaFTPModel, cond: Any, x: Tensor, step: int) -> Tensor:
    """The latents at level `step` of the tuned network's walk from x at level 0."""
    return model.sampler.walk(model.networks.tuned(cond), x, stop=step)


def gradient_steps(model: DRaFTPModel, cond: Any, x: Tensor, first: int) -> Forward:
    """The steps from `first` to the image from x at that level, tuned beside base, in the grad mode of the caller."""
    piece = Piece([""] * len(x), cond, model.sampler.levels(first), [x])
    return KeptGraph().forward(model.networks, piece, with_base=True)


def rows_asked(model: DRaFTPModel, images: Batch) -> dict[bool, int]:
    """How many rows the UNet is asked for in a training step on these images: True with gradient, False without."""
    rows = {True: 0, False: 0}

    def count(module: Any, inputs: Any) -> None:
        rows[torch.is_grad_enabled()] += len(inputs[0])

    model.unet.register_forward_pre_hook(count)
    model.get_loss_and_metrics(images)
    return rows


def prefers_red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that depends on the picture, on where in it, and on the prompt."""
    ramp = torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype)
    length = torch.tensor([float(len(p)) for p in prompts], dtype=images.dtype)
    return (images[:, 0] * ramp).mean((1, 2)) - 0.5 * images[:, 2].square().mean((1, 2)) * (1 + length / 10)


def batch(
    count: int = 2, size: tuple[int, int] = (64, 64), negatives: Sequence[str | None] | None = None, first: int = 0
) -> Batch:
    """`count` prompts with seeds `first`, `first` + 1, ..."""
    return Batch(PROMPTS[:count], list(range(first, first + count)), size, negatives or [None] * count)


def _unet() -> UNet2DConditionModel:
    return _small_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 8,
    )


def _unet_sd1(version: int) -> UNet2DConditionModel:
    """1.x projects by convolutions, 2.x by linear layers and with another number of heads at each level."""
    only_in_2: dict[str, Any] = {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)}
    return _small_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTHS[0],
        **({"attention_head_dim": 2} if version == 1 else only_in_2),
    )


@torch.no_grad()
def _small_unet(**settings: Any) -> UNet2DConditionModel:
    """With louder attention and embeddings, which random weights leave almost without effect."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, **settings
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_out.0.weight", "add_embedding.linear_2.weight", "time_emb_proj.weight")):
            parameter.mul_(3)
    return unet


def _vae(scaling_factor: float = 0.13025) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _text_encoder(kind: Any, width: int, activation: str | None = None) -> Any:
    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation or ("quick_gelu" if kind is CLIPTextModel else "gelu"),
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[EOS],
    )
    encoder = kind(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(50)  # CLIP starts them at 0.02
    return encoder


def _vocabulary() -> dict[str, int]:
    """Bytes and words of CLIP's byte-level BPE; "!" is token 0, as in SDXL's."""
    letters = sorted(ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, ord(letter)))
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in _MERGES), BOS, EOS]
    return {word: i for i, word in enumerate(words)}


_MERGES = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("b", "l"), ("s", "q")]


def _tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(), ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in _MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


def vae_forms(model: Path, checkpoint: Path, alone: Path) -> dict[str, Path]:
    """Every form in which the VAE of a model can be given.

    Args:
        model: a diffusers folder.
        checkpoint: the same as a single file.
        alone: where its VAE is written by the original's names.
    """
    prefix = "first_stage_model."
    tensors = {key.removeprefix(prefix): t for key, t in load_file(checkpoint).items() if key.startswith(prefix)}
    save_file(tensors, alone)
    return {
        "folder": model / "vae",
        "model": model,
        "diffusers' file": model / "vae" / "diffusion_pytorch_model.safetensors",
        "original file": alone,
        "in a checkpoint": checkpoint,
    }


def write_single_file(folder: Path, path: Path) -> Path:
    """Write the model in `folder` in the layout of Stability AI's own sd_xl_base_1.0.safetensors."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    tensors = {f"model.diffusion_model.{_unet_key(k)}": v for k, v in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        is_convolution_there = ".attentions." in key and value.ndim == 2
        tensors[f"first_stage_model.{_renamed(key, _VAE)}"] = value[:, :, None, None] if is_convolution_there else value
    for key, value in pipe.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    second = pipe.text_encoder_2.state_dict()
    second["text_projection.weight"] = second["text_projection.weight"].T
    for key in [key for key in second if ".q_proj." in key]:  # open_clip keeps query, key and value in one matrix
        second[key] = torch.cat([second.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    for key, value in second.items():
        tensors[f"conditioner.embedders.1.model.{_renamed(key, _OPEN_CLIP)}"] = value
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {  # of two blocks with one layer each, in an order in which no new name is renamed again
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    **{f"up_blocks.{b}.resnets.{r}": f"output_blocks.{2 * b + r}.0" for b in (0, 1) for r in (0, 1)},
    **{f"up_blocks.0.attentions.{r}": f"output_blocks.{r}.1" for r in (0, 1)},
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    **{f"down_blocks.{b}.resnets": f"down.{b}.block" for b in range(4)},
    **{f"down_blocks.{b}.downsamplers.0": f"down.{b}.downsample" for b in range(4)},
    **{f"up_blocks.{b}.resnets": f"up.{3 - b}.block" for b in range(4)},
    **{f"up_blocks.{b}.upsamplers.0": f"up.{3 - b}.upsample" for b in range(4)},
    "conv_shortcut": "nin_shortcut",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_projection.weight": "text_projection",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    ".self_attn.q_proj.": ".attn.in_proj_",
    ".self_attn.": ".attn.",
}


def _unet_key(key: str) -> str:
    return _renamed(key, {**_RESNET, **_UNET} if ".resnets." in key else _UNET)

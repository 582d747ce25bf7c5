"""Stable Diffusion XL itself: load it (diffusers folder, hub id or single .safetensors), encode, predict, decode.

Shape legend: B images, L text tokens (77), D text width (2048 in SDXL: 768 of CLIP-L beside 1280 of OpenCLIP bigG),
D2 pooled width (1280), C latent channels (4), H W latent size.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from draftcli.config import ModelConfig
from draftcli.core.guidance import Prediction
from draftcli.core.models.tiles import decode_in_tiles
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError, first_line

# Models that ship with the package, by name: each is a diffusers folder like any other.
BUILT_IN = {"toy": Path(__file__).parents[2] / "toy" / "weights" / "model"}
# SDXL's own configuration, without weights and tokenizers, so that its shape is known offline.
SDXL_CONFIG = Path(__file__).with_name("sdxl_config")
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PIPELINE = "StableDiffusionXLPipeline"
ENCODERS_AND_VAE = ("text_encoder", "text_encoder_2", "vae")


@dataclass
class Parts:
    """The loaded modules of an SDXL, and the three facts about it that are not in the weights.

    Making one freezes its modules and drops the VAE's encoder, which is never used.

    Attributes:
        unet: called as diffusers' UNet2DConditionModel.
        vae: diffusers' AutoencoderKL; only its decoder is used.
        text_encoders: CLIPTextModel and CLIPTextModelWithProjection, in this order. Empty where a caller brings its
            own conditioning.
        tokenizers: theirs.
        prediction: what the network predicts.
        zero_terminal_snr: whether it was trained with rescaled betas.
        zeros_for_empty: an absent negative prompt is zeros (SDXL base) rather than the encoded empty prompt.
    """

    unet: Any
    vae: Any
    text_encoders: Sequence[Any] = ()
    tokenizers: Sequence[Any] = ()
    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    zeros_for_empty: bool = True
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        drop_vae_encoder(self.vae)
        for module in self.modules.values():
            module.requires_grad_(False).eval()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every network by name."""
        encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": m for i, m in enumerate(self.text_encoders)}
        return {"unet": self.unet, "vae": self.vae, **encoders}


@dataclass
class Conditioning:
    """What the UNet is told beside the latents, for [unconditional ; conditional]: first dimension 2 B.

    Attributes:
        prompt_embeds: (2 B, L, D).
        text_embeds: (2 B, D2) pooled.
        time_ids: (2 B, 6) size keys.
    """

    prompt_embeds: Tensor
    text_embeds: Tensor
    time_ids: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Move everything; the text tensors take `dtype`."""
        return Conditioning(
            self.prompt_embeds.to(device, dtype), self.text_embeds.to(device, dtype), self.time_ids.to(device)
        )

    def __getitem__(self, some: slice | Tensor) -> Conditioning:
        """That of some of the B pictures: a slice, or chosen (B,) bool."""

        def part(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (2, -1))[:, some].flatten(0, 1)

        return Conditioning(part(self.prompt_embeds), part(self.text_embeds), part(self.time_ids))

    @property
    def conditional(self) -> Conditioning:
        """The second half alone, first dimension B: for a network call without guidance."""
        half = len(self.time_ids) // 2
        return Conditioning(self.prompt_embeds[half:], self.text_embeds[half:], self.time_ids[half:])


def model_path(pretrained: str) -> str:
    """The folder of a built-in model, else `pretrained` itself."""
    return str(BUILT_IN.get(pretrained, pretrained))


def load_parts(cfg: ModelConfig, *, trained_in_full: bool = False, hollow_unet: bool = False) -> Parts:
    """Load an SDXL through diffusers.

    Args:
        cfg: `pretrained` is a diffusers folder, a hub id, a single .safetensors or the name of a built-in model.
        trained_in_full: the UNet's own weights will be trained, so they are kept in float32 whatever the precision.
        hollow_unet: leave the UNet on the meta device, without weights: they will come from another process.

    Raises:
        InputError: nothing is there, it is not an SDXL, or its files are damaged.
    """
    from diffusers import StableDiffusionXLPipeline

    dtype = DTYPES[cfg.precision]
    unet_dtype = torch.promote_types(dtype, torch.float32) if trained_in_full else dtype
    # SDXL's own VAE gives NaN in float16, so it stays in float32 unless told otherwise.
    vae_dtype = DTYPES[cfg.vae_precision] if cfg.vae_precision else torch.promote_types(dtype, torch.float32)
    source = model_path(cfg.pretrained)
    single_file = source.endswith((".safetensors", ".ckpt"))
    options: dict[str, Any] = (
        {} if single_file else {"torch_dtype": {"unet": unet_dtype, "vae": vae_dtype, "default": dtype}}
    )
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 warns that torch_dtype becomes dtype, a name that older ones don't know.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            if hollow_unet:
                options["unet"] = _hollow_unet(cfg.config or SDXL_BASE if single_file else source)
            if single_file:
                pipe = StableDiffusionXLPipeline.from_single_file(
                    checked_file(source, "model.pretrained"),
                    config=cfg.config or SDXL_BASE,
                    local_files_only=_is_local(cfg.config),
                    **options,
                )
            else:
                if Path(source).is_dir():
                    check_folder(Path(source))
                pipe = StableDiffusionXLPipeline.from_pretrained(
                    source, use_safetensors=True, variant=cfg.variant, add_watermarker=False, **options
                )
    except InputError:
        raise
    except Exception as error:
        # What a loader raises on a wrong or damaged model is as varied as the damage; people need its first line.
        raise InputError(_loading_failed(cfg, source, single_file, error)) from error
    _check_complete(pipe, source, ENCODERS_AND_VAE if hollow_unet else ("unet", *ENCODERS_AND_VAE))
    widths = {encoder.config.hidden_size for encoder in (pipe.text_encoder, pipe.text_encoder_2)}
    if single_file and len(widths) == 1:
        raise InputError(
            f"model.pretrained {source}: both text encoders have the width {widths.pop()}, and diffusers tells those "
            "of a single file apart by their widths; use a diffusers folder"
        )
    if cfg.vae:
        pipe.vae = _load_vae(cfg.vae, config=cfg.config or (SDXL_BASE if single_file else source))
    scheduler = pipe.scheduler.config
    prediction, zero_snr = single_file_prediction(Path(source)) if single_file else (None, None)
    parts = Parts(
        unet=_cast(pipe.unet, unet_dtype),
        vae=_cast(pipe.vae, vae_dtype),
        text_encoders=(_cast(pipe.text_encoder, dtype), _cast(pipe.text_encoder_2, dtype)),
        tokenizers=(pipe.tokenizer, pipe.tokenizer_2),
        prediction=cfg.prediction_type or prediction or scheduler.get("prediction_type", "epsilon"),
        zero_terminal_snr=_first(cfg.zero_terminal_snr, zero_snr, scheduler.get("rescale_betas_zero_snr"), False),
        zeros_for_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
        name=cfg.pretrained,
    )
    if parts.prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{source} predicts {parts.prediction!r}; draftp knows epsilon and v_prediction")
    return parts


def single_file_prediction(file: Path) -> tuple[Prediction | None, bool | None]:
    """What a checkpoint says of itself: its prediction, and whether it was trained with zero terminal SNR.

    Two empty tensors, `v_pred` and `ztsnr`, are the marks that ComfyUI, Forge and the authors of v-prediction models
    go by; before them there was modelspec's metadata. None where nothing is said (which other programs take for
    epsilon).
    """
    with safe_open(file, framework="pt") as tensors:
        keys, metadata = set(tensors.keys()), tensors.metadata() or {}
    if "v_pred" in keys:
        return "v_prediction", "ztsnr" in keys
    said: dict[str, Prediction] = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    return said.get(metadata.get("modelspec.prediction_type", "")), True if "ztsnr" in keys else None


def drop_vae_encoder(vae: Any) -> None:
    """Free the half of the VAE that is never used: a third of its weights."""
    for name in ("encoder", "quant_conv"):
        if getattr(vae, name, None) is not None:
            setattr(vae, name, None)


def tokenize(parts: Parts, prompts: Sequence[str]) -> list[Tensor]:
    """(B, L) token ids of each tokenizer, on the CPU: padded, or cut, to its length."""
    return [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in parts.tokenizers
    ]


def encode_prompts(parts: Parts, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B, L, D) sequence and (B, D2) pooled embeddings, as SDXL was trained: the layer before the last of both
    encoders, side by side, 77 tokens; pooled is the second encoder's projected end-of-text token.
    """
    sequence: list[Tensor] = []
    pooled = None
    for tokens, encoder in zip(tokenize(parts, prompts), parts.text_encoders, strict=True):
        output = encoder(tokens.to(encoder.device), output_hidden_states=True)
        sequence.append(output.hidden_states[-2])
        pooled = getattr(output, "text_embeds", None)
    assert pooled is not None, "the second text encoder has a projection"
    return torch.cat(sequence, dim=-1), pooled


def predict(unet: Any, x: Tensor, timestep: int, cond: Conditioning) -> Tensor:
    """The network's raw output for the doubled batch: x (2 B, C, H, W) already scaled, in the dtype of x."""
    output = unet(
        x.to(cond.prompt_embeds.dtype),
        torch.tensor(timestep, device=x.device),
        encoder_hidden_states=cond.prompt_embeds,
        added_cond_kwargs={"text_embeds": cond.text_embeds, "time_ids": cond.time_ids},
        return_dict=False,
    )[0]
    return output.to(x.dtype)


def decode(vae: Any, latents: Tensor, tile: int | None = None) -> Tensor:
    """(B, 3, 8 H, 8 W) in [0, 1], differentiable. Saturated pixels get no gradient, as in the reference.

    Args:
        vae: the decoder.
        latents: (B, C, H, W).
        tile: edge in pixels of the tiles to decode apart (core/models/tiles.py); None decodes all at once.
    """
    scaled = (latents / vae.config.scaling_factor).to(next(vae.parameters()).dtype)

    def decode_all(z: Tensor) -> Tensor:
        return vae.decode(z, return_dict=False)[0]

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = decode_all(scaled) if tile is None else decode_in_tiles(decode_all, scaled, tile // factor, factor)
    return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)


def _cast(module: nn.Module, dtype: torch.dtype) -> Any:
    """Like `module.to(dtype)`, without diffusers' advice about modules to keep in float32: SDXL has none."""
    return nn.Module.to(module, dtype)


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _is_local(config: str | None) -> bool:
    return config is not None and Path(config).is_dir()


def _hollow_unet(source: str) -> Any:
    """The UNet of a folder's or a hub id's configuration, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        config: Any = UNet2DConditionModel.load_config(source, subfolder="unet")
        return UNet2DConditionModel.from_config(config)


def _load_vae(source: str, config: str) -> Any:
    from diffusers import AutoencoderKL

    try:
        if source.endswith((".safetensors", ".ckpt")):
            # Without `config` diffusers takes a lone VAE for Stable Diffusion 1's, whose latents have another scale.
            return AutoencoderKL.from_single_file(checked_file(source, "model.vae"), config=config, subfolder="vae")
        return AutoencoderKL.from_pretrained(source)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model.vae {source}: cannot be loaded: {first_line(error)}") from error


def checked_file(path: str, setting: str) -> str:
    """`path`, where a .safetensors is there; `setting` is what the user calls it.

    Raises:
        InputError: there is none, or it is pickled.
    """
    if path.endswith(".ckpt"):
        raise InputError(f"{setting} {path}: .ckpt files can run code when opened; convert it to .safetensors")
    if not Path(path).is_file():
        raise InputError(f"{setting} {path}: there is no such file")
    return path


def _check_complete(pipe: Any, source: str, names: Sequence[str]) -> None:
    """Refuse weights with holes: loaders leave what a file lacks unset or random, and warn at most."""
    for name in names:
        module = getattr(pipe, name)
        unset = [key for key, parameter in module.named_parameters() if parameter.is_meta]
        stored = 0
        for file in (Path(source) / name).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored += len(tensors.keys())
        missing = max(len(unset), len(module.state_dict()) - stored if stored else 0)
        if missing:
            raise InputError(f"model.pretrained {source}: {missing} tensors of {name} are missing, download it again")


def check_folder(folder: Path, setting: str = "model.pretrained") -> None:
    """Say what is wrong with a folder before diffusers tries it; `setting` is what the user calls it.

    Raises:
        InputError: it is not a diffusers folder of an SDXL.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{setting} {folder}: no model_index.json in it, so it is not a diffusers folder")
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{index} is not valid JSON: download the model again") from None
    if kind != PIPELINE:
        raise InputError(f"{setting} {folder} is a {str(kind)[:80]}, not Stable Diffusion XL ({PIPELINE})")


def _loading_failed(cfg: ModelConfig, source: str, single_file: bool, error: Exception) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    if single_file and not _is_local(cfg.config):
        return (
            f"model.pretrained {source}: a single file holds no configuration and no tokenizers, and "
            f"{cfg.config or SDXL_BASE} cannot be reached or read for them; "
            f"set model.config to a local diffusers folder of an SDXL ({reason})"
        )
    if not single_file and not Path(source).exists():
        return (
            f"model.pretrained {source!r}: no such folder here, and the hub has no such model or cannot be reached; "
            f"give a diffusers folder, a hub id, a .safetensors file or one of: {', '.join(BUILT_IN)} ({reason})"
        )
    return f"model.pretrained {source}: cannot be loaded, its files may be damaged ({reason})"

"""Load a model through diffusers: a folder, a hub id or a single .safetensors; and say what is wrong where it fails."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from draftcli.config import ModelConfig
from draftcli.core.guidance import Prediction
from draftcli.core.models.family import Family, Parts, find_family
from draftcli.core.models.fields import FIELDS, check_fields
from draftcli.core.models.marks import PREDICTION_NAMES, check_marks
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError, first_line

# Models that ship with the package, by name: each is a diffusers folder like any other.
BUILT_IN = {"toy": Path(__file__).parents[2] / "toy" / "weights" / "model"}


def model_path(pretrained: str) -> str:
    """The folder of a built-in model, else `pretrained` itself."""
    return str(BUILT_IN.get(pretrained, pretrained))


def load_parts(cfg: ModelConfig, *, trained_in_full: bool = False, hollow_unet: bool = False) -> Parts:
    """Load a model through diffusers.

    Args:
        cfg: `pretrained` is a diffusers folder, a hub id, a single .safetensors or the name of a built-in model.
        trained_in_full: the UNet's own weights will be trained, so they are kept in float32 whatever the precision.
        hollow_unet: leave the UNet on the meta device, without weights: they will come from another process.

    Raises:
        InputError: nothing is there, it is not an SDXL, or its files are damaged.
    """
    family, source, dtype = find_family(), model_path(cfg.pretrained), DTYPES[cfg.precision]
    wide, single_file = torch.promote_types(dtype, torch.float32), is_single_file(source)
    # SDXL's own VAE gives NaN in float16, so it stays in float32 unless told otherwise.
    dtypes = {
        "unet": wide if trained_in_full else dtype,
        "vae": DTYPES[cfg.vae_precision] if cfg.vae_precision else wide,
        "default": dtype,
    }
    try:
        pipe = _load_pipeline(cfg, family, source, dtypes, hollow_unet)
    except InputError:
        raise
    except Exception as error:
        # What a loader raises on a wrong or damaged model is as varied as the damage; people need its first line.
        raise InputError(_loading_failed(cfg, family, source, error)) from error
    _check_complete(pipe, source, [part for part in family.networks if part != "unet" or not hollow_unet])
    encoders = [getattr(pipe, part) for part in family.networks if part.startswith("text_encoder")]
    widths = [encoder.config.hidden_size for encoder in encoders]
    if single_file and len(set(widths)) < len(widths):
        raise InputError(
            f"model.pretrained {source}: both text encoders have the width {widths[0]}, and diffusers tells those "
            "of a single file apart by their widths; use a diffusers folder"
        )
    if cfg.vae:
        pipe.vae = _load_vae(cfg.vae, config=cfg.config or (family.hub_base if single_file else source))
    where = f"model.config {cfg.config or family.hub_base}" if single_file else f"model.pretrained {source}"
    for part in FIELDS:
        check_fields(part, getattr(pipe, part), f"model.vae {cfg.vae}" if part == "vae" and cfg.vae else where)
    scheduler = pipe.scheduler.config
    prediction, zero_snr = single_file_prediction(Path(source)) if single_file else (None, None)
    parts = Parts(
        unet=_cast(pipe.unet, dtypes["unet"]),
        vae=_cast(pipe.vae, dtypes["vae"]),
        text_encoders=tuple(_cast(encoder, dtype) for encoder in encoders),
        tokenizers=tuple(pipe.components[name] for name in sorted(pipe.components) if name.startswith("tokenizer")),
        prediction=cfg.prediction_type or prediction or scheduler.get("prediction_type", "epsilon"),
        zero_terminal_snr=_first(cfg.zero_terminal_snr, zero_snr, scheduler.get("rescale_betas_zero_snr"), False),
        zeros_for_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", True)),
        name=cfg.pretrained,
        family=family,
    )
    if parts.prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{source} predicts {parts.prediction!r}; draftp knows epsilon and v_prediction")
    return parts


def is_single_file(source: str) -> bool:
    """Whether a model is one file rather than a folder or a hub id."""
    return source.endswith((".safetensors", ".ckpt"))


def _load_pipeline(
    cfg: ModelConfig, family: Family, source: str, dtypes: dict[str, torch.dtype], hollow_unet: bool
) -> Any:
    """diffusers' pipeline of a model, whatever it raises."""
    import diffusers

    pipeline, single_file = getattr(diffusers, family.pipeline), is_single_file(source)
    options: dict[str, Any] = {} if single_file else {"torch_dtype": dtypes}
    with warnings.catch_warnings():
        # diffusers 0.42 warns that torch_dtype becomes dtype, a name that older ones don't know.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if hollow_unet:
            options["unet"] = _hollow_unet(cfg.config or family.hub_base if single_file else source)
        if single_file:
            check_marks(Path(checked_file(source, "model.pretrained")), cfg.prediction_type)
            return pipeline.from_single_file(
                source,
                config=cfg.config or family.hub_base,
                local_files_only=_is_local(cfg.config),
                **options,
            )
        if Path(source).is_dir():
            check_folder(Path(source))
        return pipeline.from_pretrained(
            source, use_safetensors=True, variant=cfg.variant, add_watermarker=False, **options
        )


def single_file_prediction(file: Path) -> tuple[Prediction | None, bool | None]:
    """What a checkpoint says of itself: its prediction, and whether it was trained with zero terminal SNR.

    Two empty tensors, `v_pred` and `ztsnr`, are the marks that ComfyUI, Forge and the authors of v-prediction models
    go by; before them there was modelspec's metadata. None where the file says nothing (which other programs take for
    epsilon).
    """
    with safe_open(file, framework="pt") as tensors:
        keys, metadata = set(tensors.keys()), tensors.metadata() or {}
    if "v_pred" in keys:
        return "v_prediction", "ztsnr" in keys
    return PREDICTION_NAMES.get(metadata.get("modelspec.prediction_type", "")), True if "ztsnr" in keys else None


def _cast(module: nn.Module, dtype: torch.dtype) -> Any:
    """Like `module.to(dtype)`, without diffusers' advice about modules to keep in float32: SDXL has none."""
    return nn.Module.to(module, dtype)


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _is_local(config: str | None) -> bool:
    return config is not None and Path(config).is_dir()


def _hollow_unet(source: str) -> Any:
    """The UNet of a folder's or a hub id's configuration, on the meta device."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights(include_buffers=True):
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
    family = find_family()
    if kind != family.pipeline:
        sibling = str(kind).startswith(family.pipeline.removesuffix("Pipeline"))  # for inpainting, editing, the refiner
        raise InputError(
            f"{setting} {folder} is a {str(kind)[:80]}, not {family.title} ({family.pipeline})"
            + sibling * "; write that into its model_index.json if its UNet takes 4 channels and it has 2 text encoders"
        )


def _loading_failed(cfg: ModelConfig, family: Family, source: str, error: Exception) -> str:
    single_file, reason = is_single_file(source), f"{type(error).__name__}: {first_line(error)}"
    if single_file and not _is_local(cfg.config):
        return (
            f"model.pretrained {source}: a single file holds no configuration and no tokenizers, and "
            f"{cfg.config or family.hub_base} cannot be reached or read for them; "
            f"set model.config to a local diffusers folder of an SDXL ({reason})"
        )
    if not single_file and not Path(source).exists():
        return (
            f"model.pretrained {source!r}: no such folder here, and the hub has no such model or cannot be reached; "
            f"give a diffusers folder, a hub id, a .safetensors file or one of: {', '.join(BUILT_IN)} ({reason})"
        )
    return f"model.pretrained {source}: cannot be loaded, its files may be damaged ({reason})"

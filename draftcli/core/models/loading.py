"""Load a model through diffusers: a folder, a hub id or a single .safetensors; and say what is wrong where it fails."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from draftcli.config import ModelConfig, SamplingConfig, is_single_file
from draftcli.core.guidance import Prediction
from draftcli.core.models.family import FAMILIES, Family, Parts, find_family
from draftcli.core.models.fields import FIELDS, check_class, check_fields
from draftcli.core.models.guidance_embedding import check_guidance_embedding
from draftcli.core.models.kinds import check_kind, facts_of_folder
from draftcli.core.models.marks import PREDICTION_NAMES, check_marks
from draftcli.core.models.meta import read_json
from draftcli.core.models.places import BUILT_IN, checked_file, model_path
from draftcli.core.models.recognition import family_of, family_of_folder, family_of_pipeline
from draftcli.core.models.single_file import check_networks, ensure_taken
from draftcli.core.models.vae import check_vae_channels, check_vae_class, load_vae, vae_configuration, vae_place
from draftcli.core.models.weight_files import ensure_loaded, weight_files
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError, first_line
from draftcli.file_kinds import what_it_is


def load_parts(
    cfg: ModelConfig,
    sampling: SamplingConfig | None = None,
    *,
    trained_in_full: bool = False,
    hollow_unet: bool = False,
) -> Parts:
    """Load a model through diffusers.

    Args:
        cfg: `pretrained` is a diffusers folder, a hub id, a single .safetensors or the name of a built-in model.
        sampling: how it is drawn with, which its files may not fit; None: the defaults.
        trained_in_full: the UNet's own weights will be trained, so they are kept in float32 whatever the precision.
        hollow_unet: leave the UNet on the meta device, without weights: they will come from another process.

    Raises:
        InputError: nothing is there, it is of no family that we know, or its files are damaged.
    """
    family, source, dtype = family_of(cfg, fetch=True), model_path(cfg.pretrained), DTYPES[cfg.precision]
    wide, single_file = torch.promote_types(dtype, torch.float32), is_single_file(source)
    # SDXL's own VAE gives NaN in float16, so it stays in float32 unless told otherwise.
    dtypes = {
        "unet": wide if trained_in_full else dtype,
        "vae": DTYPES[cfg.vae_precision] if cfg.vae_precision else wide,
        "default": dtype,
    }
    pipe = _load_pipeline(cfg, family, source, dtypes, hollow_unet)
    encoders = [getattr(pipe, part) for part in family.networks if part.startswith("text_encoder")]
    where = _configured_by(cfg, family)
    sampling = sampling or SamplingConfig()
    for part in FIELDS:
        place = f"model.vae {cfg.vae}" if part == "vae" and cfg.vae else where
        check_fields(part, getattr(pipe, part), place, family, sampling.sampler)
    check_guidance_embedding(pipe.unet.config.time_cond_proj_dim, sampling.guidance_embedding, where)
    check_vae_channels(pipe.vae, pipe.unet, f"model.vae {cfg.vae}" if cfg.vae else f"the VAE of {cfg.pretrained}")
    prediction, zero_terminal_snr = _prediction(cfg, source, pipe.scheduler.config)
    parts = Parts(
        unet=_cast(pipe.unet, dtypes["unet"]),
        vae=_cast(pipe.vae, dtypes["vae"]),
        text_encoders=tuple(_cast(encoder, dtype) for encoder in encoders),
        tokenizers=tuple(pipe.components[name] for name in sorted(pipe.components) if name.startswith("tokenizer")),
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
        zeros_for_empty=bool(pipe.config.get("force_zeros_for_empty_prompt", family.zeros_for_empty)),
        name=cfg.pretrained,
        family=family,
    )
    _check_tokenizers(parts, cfg.config if single_file else cfg.pretrained)
    return parts


def check_unloaded(cfg: ModelConfig, sampling: SamplingConfig) -> None:
    """Refuse what `load_parts` would refuse, as far as that can be seen without loading weights.

    Nothing is fetched: of a model or a configuration on the hub, nothing is looked at. The VAE of `model.vae` is not
    looked at either.

    Raises:
        InputError: as by `load_parts`.
    """
    source, elsewhere = model_path(cfg.pretrained), ["vae"] * bool(cfg.vae)
    if not Path(source).is_dir() and not is_single_file(source):
        return
    family = family_of(cfg)
    source, config = _found(cfg, family, source, [part for part in family.networks if part not in elsewhere])
    if not Path(config).is_dir():
        return
    where = _configured_by(cfg, family)
    for part in (part for part in FIELDS if part not in elsewhere):
        try:
            blank = _blank_part(Path(config), part, where, family)
        except InputError:
            raise
        except Exception as error:  # what a wrong configuration breaks in diffusers is as varied as it is
            raise InputError(_loading_failed(cfg, family, source, error)) from error
        check_fields(part, blank, where, family, sampling.sampler)
        if part == "unet":
            check_guidance_embedding(blank.config.time_cond_proj_dim, sampling.guidance_embedding, where)
        if part == "scheduler":
            _prediction(cfg, source, blank.config)


def _configured_by(cfg: ModelConfig, family: Family) -> str:
    """What the user calls the place of the configuration."""
    if is_single_file(model_path(cfg.pretrained)):
        return f"model.config {cfg.config or family.hub_base}"
    return f"model.pretrained {cfg.pretrained}"


def _blank_part(folder: Path, part: str, where: str, family: Family) -> Any:
    """The scheduler or a network as its configuration has it, without weights."""
    import diffusers
    from accelerate import init_empty_weights

    name = str(read_json(folder / "model_index.json")[part][1])
    check_class(part, name, where, family)
    kind: Any = getattr(diffusers, name)
    with init_empty_weights():
        return kind.from_config(kind.load_config(folder, subfolder=part))


def local_folder(
    source: str,
    variant: str | None = None,
    setting: str = "model.pretrained",
    elsewhere: Sequence[str] = (),
    family: Family | None = None,
) -> Path:
    """The diffusers folder that a path or a hub id names, with every network's weights where they should be.

    Args:
        source: folder or hub id; of the latter what is missing here is fetched.
        variant: which files of it, such as fp16.
        setting: what the user calls it.
        elsewhere: networks that are not read from it.
        family: that it must be of; None: that which its files tell.

    Raises:
        InputError: there is none, it is not of the family, or its weights are not there or under another name.
    """
    family = family or family_of(ModelConfig(pretrained=source), fetch=True)
    folder = Path(source) if Path(source).is_dir() else _fetched(source, variant, setting, elsewhere, family)
    check_folder(folder, setting, family)
    for part in (part for part in family.networks if part not in elsewhere):
        weight_files(folder / part, part, variant, setting)
    if "vae" not in elsewhere:
        check_vae_class(read_json(folder / "vae" / "config.json"), f"the VAE of {source}")
    return folder


def _fetched(source: str, variant: str | None, setting: str, elsewhere: Sequence[str], family: Family) -> Path:
    """The folder in the hub's cache of a model's id."""
    import diffusers

    if Path(source).is_file():
        told = what_it_is(Path(source)) or "it is not a .safetensors"
        raise InputError(f"{setting} {source}: {told}; a model is a diffusers folder, a hub id or a .safetensors file")
    try:
        pipeline, others = getattr(diffusers, family.pipeline), {**family.options, **dict.fromkeys(elsewhere)}
        return Path(pipeline.download(source, variant=variant, use_safetensors=True, **others))
    except Exception as error:  # as varied as networks are; people need the first line
        reason = f"({type(error).__name__}: {first_line(error)})"
        if "`safetensors`" in str(error):  # diffusers' words
            option = "--variant fp16" if setting.startswith("--") else "model.variant=fp16"
            raise InputError(
                f"{setting} {source!r}: the model on the hub has no such .safetensors; if it has them as a variant "
                f"only, such as fp16, set {option}; pickled .bin files are not opened: convert them {reason}"
            ) from error
        raise InputError(
            f"{setting} {source!r}: no such file or folder here, and the hub has no such model or cannot be reached; "
            f"give a diffusers folder, a hub id, a .safetensors file or one of: {', '.join(BUILT_IN)} {reason}"
        ) from error


def _networks_from_elsewhere(cfg: ModelConfig, family: Family, config: str, elsewhere: Sequence[str]) -> dict[str, Any]:
    """Those that are not read from the model's own files; `config` is where its configuration is."""
    given: dict[str, Any] = {}
    if cfg.vae:
        given["vae"] = load_vae(vae_place(cfg.vae), vae_configuration(config, family), cfg.variant)
    if "unet" in elsewhere:
        given["unet"] = _hollow_unet(config)
    return given


def _load_pipeline(
    cfg: ModelConfig, family: Family, source: str, dtypes: dict[str, torch.dtype], hollow_unet: bool
) -> Any:
    """diffusers' pipeline of a model, `model.vae` and a hollow UNet in their places; every network is complete."""
    elsewhere = ["unet"] * hollow_unet + ["vae"] * bool(cfg.vae)
    read = [part for part in family.networks if part not in elsewhere]
    source, config = _found(cfg, family, source, read)
    try:
        given = _networks_from_elsewhere(cfg, family, config, elsewhere)
        pipe = _diffusers_pipeline(cfg, family, source, dtypes, elsewhere)
    except InputError:
        raise
    except Exception as error:
        # What a loader raises on a wrong or damaged model is as varied as the damage; people need its first line.
        raise InputError(_loading_failed(cfg, family, source, error)) from error
    for part, network in given.items():
        setattr(pipe, part, network)
    for part in read:
        if is_single_file(source):
            ensure_taken(getattr(pipe, part), part, Path(source), family=family)
        else:
            files = weight_files(Path(source) / part, part, cfg.variant)
            ensure_loaded(getattr(pipe, part), part, files, f"model.pretrained {cfg.pretrained}")
    return pipe


def _found(cfg: ModelConfig, family: Family, source: str, read: Sequence[str]) -> tuple[str, str]:
    """Where the weights are, and the configuration; refuses what their files say of themselves.

    Args:
        cfg: the settings.
        family: of the model.
        source: path or hub id.
        read: networks that are read from it.
    """
    if not is_single_file(source):
        elsewhere = [part for part in family.networks if part not in read]
        folder = str(local_folder(source, cfg.variant, elsewhere=elsewhere, family=family))
        return folder, folder
    file = Path(checked_file(source, "model.pretrained"))
    with suppress(SafetensorError):  # of a file that cannot be read its loader will tell
        check_marks(file, cfg.prediction_type)
    check_networks(file, read, family=family)
    return source, cfg.config or family.hub_base


def _diffusers_pipeline(
    cfg: ModelConfig, family: Family, source: str, dtypes: dict[str, torch.dtype], elsewhere: Sequence[str]
) -> Any:
    """diffusers' pipeline without the networks that are elsewhere; raises what diffusers raises."""
    import diffusers

    pipeline, others = getattr(diffusers, family.pipeline), {**family.options, **dict.fromkeys(elsewhere)}
    with warnings.catch_warnings():
        # diffusers 0.42 warns that torch_dtype becomes dtype, a name that older ones don't know.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        if not is_single_file(source):
            return pipeline.from_pretrained(
                source, use_safetensors=True, variant=cfg.variant, torch_dtype=dtypes, **others
            )
        config = cfg.config or family.hub_base
        pipe = pipeline.from_single_file(source, config=config, local_files_only=_is_local(cfg.config), **others)
    widths = [getattr(pipe, part).config.hidden_size for part in family.networks if part.startswith("text_encoder")]
    if len(set(widths)) < len(widths):
        raise InputError(
            f"model.pretrained {source}: both text encoders have the width {widths[0]}, and diffusers tells those "
            "of a single file apart by their widths; use a diffusers folder"
        )
    return pipe


def _prediction(cfg: ModelConfig, source: str, scheduler: Any) -> tuple[Prediction, bool]:
    """What the network predicts and whether it was trained with zero terminal SNR: by the settings, else by the marks
    of a single file, else by the scheduler's configuration.
    """
    marked, zero_snr = single_file_prediction(Path(source)) if is_single_file(source) else (None, None)
    prediction = cfg.prediction_type or marked or scheduler.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction):
        raise InputError(f"{source} predicts {prediction!r}; draftp knows {', '.join(get_args(Prediction))}")
    return prediction, _first(cfg.zero_terminal_snr, zero_snr, scheduler.get("rescale_betas_zero_snr"), False)


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


def _check_tokenizers(parts: Parts, place: str | None) -> None:
    """Refuse tokenizers that are not those of the text encoders; `place` is where they are from."""
    for number, (tokenizer, encoder) in enumerate(zip(parts.tokenizers, parts.text_encoders, strict=True), 1):
        which = f"tokenizer {number} of {place or 'the hub'}"
        if tokenizer.pad_token_id is None:
            raise InputError(f"{which} has no token to fill short texts with: set pad_token in tokenizer_config.json")
        if len(tokenizer) > encoder.config.vocab_size:
            raise InputError(
                f"{which} knows {len(tokenizer)} tokens and its text encoder {encoder.config.vocab_size}: they do not "
                "belong together"
            )
    lengths = [tokenizer.model_max_length for tokenizer in parts.tokenizers]
    if len(set(lengths)) > 1:
        raise InputError(
            f"the tokenizers of {place or 'the hub'} cut texts at {lengths[0]} and {lengths[1]} tokens, and "
            f"{parts.family.title} lays both encoders' tokens side by side: set one model_max_length in both "
            "tokenizer_config.json"
        )


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


def check_folder(folder: Path, setting: str = "model.pretrained", family: Family | None = None) -> None:
    """Say what is wrong with a folder before diffusers tries it.

    Args:
        folder: of a whole model.
        setting: what the user calls it.
        family: that it must be of; None: that which its files tell.

    Raises:
        InputError: it is not a diffusers folder of the family.
    """
    family = family or family_of_folder(folder)
    index, to_merge = folder / "model_index.json", setting == "--base"
    if not index.is_file() and (folder / "config.json").is_file():
        check_kind(facts_of_folder(folder), f"{setting} {folder}", to_merge=to_merge)
        network = str(read_json(folder / "config.json").get("_class_name") or "one network")[:80]
        raise InputError(
            f"{setting} {folder} is {network} alone, not a whole model; give a folder with a model_index.json"
        )
    if not index.is_file():
        raise InputError(f"{setting} {folder}: no model_index.json in it, so it is not a diffusers folder")
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{index} is not valid JSON: download the model again") from None
    check_kind(facts_of_folder(folder), f"{setting} {folder}", to_merge=to_merge)
    if kind == family.pipeline:
        return
    told = family_of_pipeline({"_class_name": kind})
    known = [family] if told else [find_family(name) for name in FAMILIES]
    remedy = ""
    if told is family:  # a sibling: for inpainting, editing or refining
        encoders = sum(part.startswith("text_encoder") for part in family.networks)
        has = f"it has {encoders} text encoder{'s' if encoders > 1 else ''}"
        remedy = f"; write that into its model_index.json if its UNet takes 4 channels and {has}"
    wanted = " or ".join(f"{some.title} ({some.pipeline})" for some in known)
    raise InputError(f"{setting} {folder} is a {str(kind)[:80]}, not {wanted}{remedy}")


def _loading_failed(cfg: ModelConfig, family: Family, source: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    if is_single_file(source) and not _is_local(cfg.config):
        return (
            f"model.pretrained {source}: a single file holds no configuration and no tokenizers, and "
            f"{cfg.config or family.hub_base} cannot be reached or read for them; "
            f"set model.config to a local diffusers folder of an {family.short} ({reason})"
        )
    if (folder := Path(source)).is_dir():
        for file in sorted(folder.glob("*/*.json")):
            if told := what_it_is(file):
                return f"model.pretrained {file}: {told}"
    return f"model.pretrained {source}: cannot be loaded, its files may be damaged ({reason})"

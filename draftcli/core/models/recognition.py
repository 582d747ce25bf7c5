"""Which family a model is of, by its own files: model_index.json, the UNet's configuration, or a single file's keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from draftcli.config import ModelConfig, is_hub_id, is_single_file
from draftcli.core.models.family import FAMILIES, Family, find_family
from draftcli.core.models.places import model_path

_INDEX = "model_index.json"
_ONE_ENCODER = "cond_stage_model."  # the text encoder in a single file of SD 1.x and 2.x


def family_of(cfg: ModelConfig, fetch: bool = False) -> Family:
    """The family that `model.family` names, or with `auto` the one that the model's files tell.

    Args:
        cfg: the settings.
        fetch: of a model on the hub, get its model_index.json where it is not here yet. Otherwise nothing is fetched,
            and one that nothing is known of is taken for an SDXL.
    """
    source = model_path(cfg.pretrained)
    if cfg.family != "auto":
        return find_family(cfg.family)
    if is_single_file(source):
        return family_of_file(Path(source))
    if not is_hub_id(source):
        return family_of_folder(Path(source))
    known = (family for family in map(find_family, FAMILIES) if family.hub_base == source)
    return next(known, None) or family_of_pipeline(_index_on_the_hub(source, fetch)) or find_family()


def family_of_folder(folder: Path) -> Family:
    """The family of a diffusers folder: by its model_index.json, else by the UNet's configuration.

    Where neither says it is SDXL's: what is wrong with the folder its loader will say.
    """
    found = family_of_pipeline(_object(folder / _INDEX))
    if found is not None:
        return found
    unet = _object(folder / "unet" / "config.json")
    same = (f for f in map(find_family, FAMILIES) if unet and f.added_input == unet.get("addition_embed_type"))
    return next(same, find_family())


def family_of_file(file: Path) -> Family:
    """The family of a single .safetensors, by its keys; SDXL's where they do not say."""
    try:
        with safe_open(file, framework="np") as tensors:
            is_sd1 = any(key.startswith(_ONE_ENCODER) for key in tensors.keys())  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError):
        is_sd1 = False
    return find_family("sd1" if is_sd1 else "sdxl")


def family_of_pipeline(index: dict[str, Any]) -> Family | None:
    """The family whose pipeline a model_index.json names, or a sibling of it, for inpainting or editing; or None."""
    name = str(index.get("_class_name"))
    stems = {find_family(family).pipeline.removesuffix("Pipeline"): family for family in FAMILIES}
    for stem in sorted(stems, key=len, reverse=True):
        if re.match(rf"{stem}(?!\d)", name):  # StableDiffusion3 is no sibling
            return find_family(stems[stem])
    return None


def _index_on_the_hub(name: str, fetch: bool) -> dict[str, Any]:
    """A model's model_index.json from the cache or the hub; empty where it cannot be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        found = hf_hub_download(name, _INDEX) if fetch else try_to_load_from_cache(name, _INDEX)
    except Exception:  # as varied as networks are; the download of the weights will say it
        return {}
    return _object(Path(found)) if isinstance(found, str) else {}


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or a damaged one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}

"""An SDXL's networks without weights, on the meta device: shapes and names, in a moment and offline."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from draftcli.core.sdxl import first_line
from draftcli.errors import InputError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def modules_on_meta(config: Path) -> dict[str, Any]:
    """The four networks, by the names in `PARTS`, from a folder's configuration.

    Raises:
        InputError: a configuration is missing or not readable.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    read: dict[str, dict[str, Any]] = {part: read_json(config / part / "config.json") for part in PARTS}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on settings that a newer release wrote
            return {
                "unet": UNet2DConditionModel.from_config(read["unet"]),
                "vae": AutoencoderKL.from_config(read["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**read["text_encoder"])),
                "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**read["text_encoder_2"])),
            }
    except (TypeError, ValueError) as error:
        raise InputError(f"{config}: its configuration is not that of an SDXL ({first_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data

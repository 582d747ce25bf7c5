"""A family's networks without weights, on the meta device: shapes and names, in a moment and offline."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcli.core.models.family import Family, find_family
from draftcli.core.models.recognition import family_of_folder
from draftcli.errors import InputError, brief, first_line

PARTS = tuple(find_family().networks)
DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
DEEPEST = 100  # SDXL has 32 layers at most; a wrong number here would build networks for ever


def modules_on_meta(config: Path, family: Family | None = None, parts: Sequence[str] | None = None) -> dict[str, Any]:
    """The networks of a model, by their names in `Family.networks`, from a folder's configuration.

    Args:
        config: the folder, with a folder for each network.
        family: of the model; None: that which the folder tells.
        parts: which networks; None: all.

    Raises:
        InputError: a configuration is missing or not readable.
    """
    from accelerate import init_empty_weights

    family = family or family_of_folder(config)
    parts = tuple(family.networks) if parts is None else parts
    read: dict[str, dict[str, Any]] = {part: read_json(config / part / "config.json") for part in parts}
    for part, settings in read.items():
        for key in DEPTHS:
            if any(depth > DEEPEST for depth in _numbers(settings.get(key))):
                raise InputError(
                    f"{config / part}: {key} is {brief(settings[key])}; {family.title} has {DEEPEST} at most"
                )
    try:
        with init_empty_weights(include_buffers=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on settings that a newer release wrote
            return {part: family.build(part, settings) for part, settings in read.items()}
    except Exception as error:  # what a wrong configuration breaks in diffusers and transformers is as varied as it is
        raise InputError(f"{config}: its configuration is not that of {family.title} ({first_line(error)})") from error


def _numbers(value: Any) -> list[int | float]:
    """Those in a number, or in lists of lists of numbers."""
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data

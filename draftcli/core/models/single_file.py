"""Single files in the original layout: which networks are in one, and whether a loaded network has its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from draftcli.core.models.family import Family, find_family
from draftcli.core.models.kinds import check_kind, facts_of_file
from draftcli.core.models.original_layout import from_original
from draftcli.core.models.weight_files import check_plain, clean_key
from draftcli.errors import InputError
from draftcli.file_kinds import unreadable

_TITLES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "first text encoder (CLIP-L)",
    "text_encoder_2": "second text encoder (OpenCLIP bigG)",
}


def check_networks(
    file: Path, needed: Sequence[str], setting: str = "model.pretrained", family: Family | None = None
) -> None:
    """Refuse a file that cannot be read, is another kind of model, or lacks one of the networks or has it quantised.

    Args:
        file: a .safetensors.
        needed: names in `Family.networks`.
        setting: what the user calls the file.
        family: of the model; None: SDXL.

    Raises:
        InputError: it cannot be read, is one of the models of kinds.py, holds none of a network's tensors, or holds
            codes for them.
    """
    with opened(file, setting) as tensors:
        keys, facts = list(tensors.keys()), facts_of_file(tensors)
    check_plain(keys, f"{setting} {file}")
    check_kind(facts, f"{setting} {file}", to_merge=setting == "--base")
    family = family or find_family()
    absent = [part for part in needed if not any(key.startswith(family.original_prefixes[part]) for key in keys)]
    if len(absent) == len(needed):
        first = f", the first of its tensors is {keys[0]}" if keys else ""
        raise InputError(
            f"{setting} {file}: it is not a checkpoint of {family.title} in the original layout{first}; give such "
            "a file or a diffusers folder"
        )
    if absent:
        remedy = "give a whole checkpoint or a diffusers folder"
        if absent == ["vae"] and setting == "model.pretrained":
            remedy = "set model.vae to one, a diffusers folder, a hub id or a .safetensors"
        title = _TITLES[absent[0]] if "text_encoder_2" in family.networks else family.networks[absent[0]]
        raise InputError(f"{setting} {file}: it holds no {title}; {remedy}")


def ensure_taken(
    module: nn.Module, part: str, file: Path, setting: str = "model.pretrained", family: Family | None = None
) -> None:
    """Refuse a network that is not what the file holds, tensor by tensor: its name, its shape and its first row.

    Args:
        module: the loaded network, in any dtype.
        part: a name in `Family.networks`.
        file: a whole checkpoint.
        setting: what the user calls the file.
        family: of the model; None: SDXL.

    Raises:
        InputError: a tensor is missing in the file, or the libraries did not take it.
    """
    own: dict[str, Tensor] = {clean_key(part, key): tensor for key, tensor in module.state_dict().items()}
    layout = (family or find_family()).original_layout(part, shapes(own))
    with opened(file, setting) as tensors:
        keys = set(tensors.keys())
        if missing := [original.key for original in layout if original.key not in keys]:
            raise InputError(
                f"{setting} {file}: {len(missing)} of the {len(layout)} tensors of {part} are missing, the first is "
                f"{missing[0]}"
            )
        other = [
            original.key
            for original in layout
            if not _same_row(own[original.sources[0]], tensors, original.key, original.form)
        ]
    if other:
        import diffusers
        import transformers

        raise InputError(
            f"{setting} {file}: diffusers {diffusers.__version__} with transformers {transformers.__version__} did not "
            f"take {len(other)} tensors of {part}, such as {other[0]}; update both, or take a diffusers folder"
        )


def opened(file: Path, setting: str) -> Any:
    """A .safetensors, opened.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors' own kind of error, or the system's
        raise InputError(f"{setting} {file}: {unreadable(file, error)}") from error


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of tensors, by name."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _same_row(tensor: Tensor, stored: Any, key: str, form: Any) -> bool:
    """Whether the first row of a tensor is that of the original one, which may have more rows below it."""
    whole = form == "transposed" or not tensor.ndim
    row = from_original(stored.get_tensor(key) if whole else stored.get_slice(key)[:1], form)
    row, own = (row[:1], tensor[:1]) if tensor.ndim else (row, tensor)
    return not tensor.is_meta and torch.equal(own, row.to(own.dtype))

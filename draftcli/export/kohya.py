"""kohya's LoRA files, which ComfyUI, A1111, Forge and sd-scripts read: names, metadata and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from draftcli.core.lora.files import Lora
from draftcli.core.models.family import Family
from draftcli.errors import InputError
from draftcli.export.lineage import Lineage
from draftcli.export.tensors import PlannedTensor, header_bytes, tensor_bytes, times

# Modules outside the blocks, which sd-scripts never trains. Other programs have a name for each all the same.
_OUTSIDE_SD_SCRIPTS = {
    "unet": ("conv_in", "conv_out", "time_embedding.", "add_embedding."),
    "text_encoder_2": ("text_projection",),
}
_LEGACY_WINDOW = (0x100000, 0x110000)  # the bytes of a file that the older of kohya's two hashes is of


def kohya_tensors(lora: Lora, unet_modules: Iterable[str], family: Family) -> dict[str, Tensor]:
    """A LoRA by kohya's names for a family, which need those of all modules of the UNet.

    Scales are multiplied into B so that all layers have one alpha: diffusers 0.42 loses the alphas of attention layers
    where they differ.

    Raises:
        InputError: it changes a module that kohya's naming has no name for.
    """
    alpha = largest_rank(lora)
    names = family.kohya_unet_names(unet_modules)
    if unknown := sorted(lora.parts.get("unet", {}).keys() - names.keys()):
        raise InputError(
            f"{_listed(unknown)} of the UNet: kohya's naming has no name for these modules; take --format lora"
        )
    tensors: dict[str, Tensor] = {}
    for part, module, update in lora.updates():
        stem = family.kohya_prefixes[part] + (names[module] if part == "unet" else module).replace(".", "_")
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
        tensors[f"{stem}.lora_down.weight"] = update.down
        tensors[f"{stem}.lora_up.weight"] = times(update.up, update.scale * update.rank / alpha)
    return tensors


def largest_rank(lora: Lora) -> int:
    """Of all its layers."""
    return max(update.rank for _, _, update in lora.updates())


def ignored_by_kohya(modules: Mapping[str, Iterable[str]]) -> str | None:
    """What to warn of where some of these modules have no place in sd-scripts' own network; else None.

    Args:
        modules: that a LoRA changes, by network.
    """
    found = [
        module if part == "unet" else f"{part}.{module}"
        for part, starts in _OUTSIDE_SD_SCRIPTS.items()
        for module in sorted(modules.get(part, ()))
        if module.startswith(starts)
    ]
    if not found:
        return None
    return (
        f"{_listed(found)}: kohya's sd-scripts has no place for a LoRA on these modules and leaves it out; ComfyUI and "
        "Forge apply it, and A1111 all but a text_projection's"
    )


def kohya_metadata(lora: Lora, lineage: Lineage) -> dict[str, str]:
    """kohya's own metadata, as far as it is known here."""
    edition = lineage.edition
    ranks = {update.rank for _, _, update in lora.updates()}
    known = {
        "ss_output_name": lineage.title,
        "ss_sd_model_name": lineage.base,
        "ss_resolution": lineage.resolution,  # (1024, 1024) as Python prints it
        "ss_steps": lineage.steps,
        "ss_training_finished_at": lineage.date.timestamp() if lineage.date else None,
        "ss_zero_terminal_snr": None if lineage.prediction is None else lineage.zero_terminal_snr,
        "ss_network_module": "networks.lora",
        "ss_network_dim": next(iter(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": float(largest_rank(lora)),
        "ss_base_model_version": edition.kohya_version,
        "ss_v2": edition.v2,
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def kohya_hashes(entries: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which A1111, Forge and kohya's tools know a LoRA, whatever else stands in its metadata.

    Args:
        entries: its tensors, in the order of the file.
        metadata: of the file.

    Returns:
        `sshs_model_hash`, of all bytes of the tensors (modelspec's `hash_sha256` is the same one); and
        `sshs_legacy_hash`, of 64 KiB from the first MiB on, in a file that has no metadata but kohya's `ss_`.
    """
    header = header_bytes(entries, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    tensors, window, position = hashlib.sha256(), hashlib.sha256(), 0
    for data in chain([header], map(tensor_bytes, entries)):
        if position:
            tensors.update(data)
        first, last = (max(0, edge - position) for edge in _LEGACY_WINDOW)
        window.update(data[first:last])
        position += len(data)
    return {
        "sshs_model_hash": tensors.hexdigest(),
        "sshs_legacy_hash": window.hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{tensors.hexdigest()}",
    }


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more

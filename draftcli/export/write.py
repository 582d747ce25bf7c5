"""Writing what was merged, tensor by tensor: a diffusers folder, a single file, a LoRA file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcli import __version__
from draftcli.core.lora.files import Lora, Update
from draftcli.core.models.original_names import original_unet_names
from draftcli.core.models.sdxl import SDXL_BASE
from draftcli.errors import DraftpError, InputError, first_line
from draftcli.export.base import PARTS, WEIGHT_NAMES, Base
from draftcli.export.inputs import Changes
from draftcli.export.layout import V_MARKER, ZERO_SNR_MARKER, Original, original_layout, original_shape, to_original
from draftcli.export.tensors import Entry, Stored, file_metadata, write_safetensors

KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
DTYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
Wrote = Callable[[int], Any]


@dataclass
class Merger:
    """Makes the tensors of the merged model, and keeps account.

    Attributes:
        base: what is merged into.
        changes: what is merged.
        dtype: of the UNet and the text encoders; None keeps each tensor's own. The VAE always keeps its own, as SDXL's
            gives NaN in float16.
        moved: by dtype written, the sum of squares of what the changes were to move, exactly.
        rounded: by dtype written, the sum of squares of what casting them at the end moved.
        written: (part, key) of the changed tensors written so far.
    """

    base: Base
    changes: Changes
    dtype: torch.dtype | None = None
    moved: dict[torch.dtype, float] = field(default_factory=dict)
    rounded: dict[torch.dtype, float] = field(default_factory=dict)
    written: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.touched = self.changes.touched()

    def dtype_of(self, part: str, stored: Stored) -> torch.dtype:
        """As it will be written."""
        return self.dtype if self.dtype and part != "vae" and stored.dtype.is_floating_point else stored.dtype

    def make(self, part: str, key: str) -> Tensor:
        """The tensor as it will be written; untouched ones bit for bit, unless another dtype was asked for."""
        stored = self.base.tensors[part][key]
        tensor, dtype = stored.load(), self.dtype_of(part, stored)
        if (part, key) not in self.touched:
            return tensor if dtype == tensor.dtype else cast(tensor, dtype, f"{part}.{key}")
        exact = self.changes.apply(part, key, tensor)
        result = cast(exact, dtype, f"{part}.{key}")
        self.moved[dtype] = self.moved.get(dtype, 0.0) + float((exact - tensor.double()).square().sum())
        self.rounded[dtype] = self.rounded.get(dtype, 0.0) + float((exact - result.double()).square().sum())
        self.written.add((part, key))
        return result

    def entries(self, part: str) -> list[Entry]:
        """The tensors of one part, by the names that its own file has."""
        found = []
        for key, stored in self.base.tensors[part].items():
            name = stored.key if self.base.kind == "folder" else key
            make = lambda key=key: self.make(part, key)  # noqa: E731
            found.append(Entry(name, self.dtype_of(part, stored), stored.shape, make))
        return found

    def original_entries(self) -> list[Entry]:
        """The tensors of the whole model in the original layout. A single file keeps its order and its extras."""
        base = self.base
        shapes = {part: {key: stored.shape for key, stored in base.tensors[part].items()} for part in PARTS}
        if base.kind == "single-file":
            layout = base.layout
        else:
            layout = [original for part in PARTS for original in original_layout(part, shapes[part])]
        found = [self._original_entry(original, shapes[original.part]) for original in layout]
        found += [Entry(key, stored.dtype, stored.shape, stored.load) for key, stored in base.extra.items()]
        present = {entry.key for entry in found}
        marks = [V_MARKER] * (base.prediction == "v_prediction") + [ZERO_SNR_MARKER] * base.zero_terminal_snr
        empty = torch.zeros(0)
        return found + [Entry(m, empty.dtype, (0,), lambda: empty) for m in marks if m not in present]

    def _original_entry(self, original: Original, shapes: Mapping[str, tuple[int, ...]]) -> Entry:
        def make() -> Tensor:
            tensors = [to_original(self.make(original.part, key), original.form) for key in original.sources]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        stored = self.base.tensors[original.part][original.sources[0]]
        return Entry(original.key, self.dtype_of(original.part, stored), original_shape(original, shapes), make)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`.

    Raises:
        InputError: a value is beyond what the dtype can hold.
        DraftpError: a value was no number before.
    """
    result = tensor.to(dtype)
    if not torch.isfinite(result.float()).all():
        if not torch.isfinite(tensor.float()).all():
            raise DraftpError(f"{name} holds values that are not finite (NaN or infinite): the weights are damaged")
        raise InputError(
            f"{name} reaches {float(tensor.abs().max()):.4g}, and {DTYPE_NAMES.get(dtype, dtype)} ends at "
            f"{torch.finfo(dtype).max:.4g}; take --dtype bf16 or fp32"
        )
    return result


def write_single_file(merger: Merger, file: Path, title: str, merged_from: str, wrote: Wrote) -> None:
    """Write the whole model as one checkpoint in the original layout, with modelspec metadata."""
    base = merger.base
    metadata = file_metadata(base.path) if base.kind == "single-file" else {}
    metadata = {key: value for key, value in metadata.items() if "hash" not in key}
    metadata |= modelspec(title, merged_from, base.prediction)
    write_safetensors(file, merger.original_entries(), metadata, wrote)


def write_folder(merger: Merger, folder: Path, shard_size: int, wrote: Wrote) -> None:
    """Write the whole model as a diffusers folder: configuration and tokenizers copied, weights streamed.

    Args:
        merger: of the model.
        folder: new.
        shard_size: largest size of a file of weights, in bytes; a tensor larger than that is a file of its own.
        wrote: told the bytes of each tensor.
    """
    base = merger.base
    source = base.config if base.kind == "folder" else _with_tokenizers(base.config)
    _copy_all_but_weights(source, folder)
    _write_scheduler(base, folder / "scheduler" / "scheduler_config.json")
    for part in PARTS:
        (folder / part).mkdir(exist_ok=True)
        _write_shards(folder / part, WEIGHT_NAMES[part], merger.entries(part), shard_size, wrote)


def write_lora(
    lora: Lora,
    file: Path,
    naming: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    unet_modules: Iterable[str],
) -> None:
    """Write a LoRA by diffusers' names (`naming` "lora") or kohya's ("kohya"), which need those of the whole UNet.

    Scales are multiplied into B, as a loader may overlook them: diffusers' files then mean 1 without a word, and
    kohya's carry one alpha for all layers (diffusers 0.42 loses those of attention layers where they differ).
    """
    largest = max(update.rank for _, _, update in lora.updates())
    names = original_unet_names(unet_modules)
    entries: list[Entry] = []
    for part, module, update in lora.updates():
        if naming == "kohya":
            stem = KOHYA_PREFIX[part] + (names[module] if part == "unet" else module).replace(".", "_")
            down, up, alpha = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", largest
            entries.append(_entry(f"{stem}.alpha", torch.tensor(float(alpha)), torch.float32))
        else:
            stem, alpha = f"{part}.{module}", update.rank
            down, up = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        factor = update.scale * update.rank / alpha
        scaled = update.up if factor == 1 else (factor * update.up.double()).to(update.up.dtype)
        entries.append(_entry(down, update.down, dtype))
        entries.append(_entry(up, scaled, dtype))
    write_safetensors(file, sorted(entries, key=lambda entry: entry.key), metadata)


def written_as(lora: Lora, dtype: torch.dtype | None) -> Lora:
    """What a reader of `write_lora`'s diffusers file must find."""

    def written(update: Update) -> Update:
        factor = update.scale
        up = update.up if factor == 1 else (factor * update.up.double()).to(update.up.dtype)
        return Update(update.down.to(dtype or update.down.dtype), up.to(dtype or up.dtype), 1.0)

    return Lora(lora.name, {p: {m: written(u) for m, u in updates.items()} for p, updates in lora.parts.items()})


def modelspec(title: str, merged_from: str, prediction: str, *, lora: bool = False) -> dict[str, str]:
    """The metadata by which programs tell what a file is (https://github.com/Stability-AI/ModelSpec)."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base" + ("/lora" if lora else ""),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "modelspec.merged_from": merged_from,
        "modelspec.description": f"made by draftp {__version__}",
    }


def kohya_metadata(lora: Lora) -> dict[str, str]:
    """The part of kohya's own metadata that programs read."""
    ranks = {update.rank for _, _, update in lora.updates()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(max(ranks))),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
    }


def _entry(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Entry:
    dtype = dtype if dtype and not key.endswith(".alpha") else tensor.dtype
    return Entry(key, dtype, tuple(tensor.shape), lambda: cast(tensor, dtype, key))


def _write_shards(folder: Path, stem: str, entries: Sequence[Entry], shard_size: int, wrote: Wrote) -> None:
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_size:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", entries, {"format": "pt"}, wrote)
        return
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"}, wrote)
    weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    index = {"metadata": {"total_size": sum(entry.size for entry in entries)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_all_but_weights(source: Path, folder: Path) -> None:
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    shutil.copyfile(source / "model_index.json", folder / "model_index.json")
    for part in parts:
        if Path(part).name != part or not (source / part).is_dir():
            continue
        (folder / part).mkdir()
        for file in sorted((source / part).iterdir()):
            weights = ".index." in file.name or file.suffix not in {".json", ".txt"}
            if file.is_file() and not (weights and part in PARTS):
                shutil.copyfile(file, folder / part / file.name)


def _write_scheduler(base: Base, file: Path) -> None:
    """A single file may predict something else than the configuration that it borrows."""
    scheduler = json.loads(file.read_text(encoding="utf-8"))
    own = scheduler.get("prediction_type", "epsilon"), bool(scheduler.get("rescale_betas_zero_snr"))
    if own != (base.prediction, base.zero_terminal_snr):
        scheduler |= {"prediction_type": base.prediction, "rescale_betas_zero_snr": base.zero_terminal_snr}
        file.write_text(json.dumps(scheduler, indent=2), encoding="utf-8")


def _with_tokenizers(config: Path) -> Path:
    """A folder that has all but the weights: `config`, or the hub's SDXL base."""
    if all((config / name).exists() for name in ("model_index.json", "tokenizer", "tokenizer_2", "scheduler")):
        return config
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(SDXL_BASE, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
    except Exception as error:
        raise InputError(
            f"a single file holds no tokenizers, and {SDXL_BASE} cannot be reached for them; give a local diffusers "
            f"folder of an SDXL with --config, or take --format single-file ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error

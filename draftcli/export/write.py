"""Writing what was merged, tensor by tensor: a diffusers folder, a single file, a LoRA file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig
from torch import Tensor

from draftcli.core.lora.adapters import ADAPTER_METADATA, stored_settings
from draftcli.core.lora.files import Lora, Update
from draftcli.core.models.family import Family, tokenizer_folders
from draftcli.core.models.original_layout import V_MARKER, ZERO_SNR_MARKER, Original, original_shape, to_original
from draftcli.core.models.vae import VAE_CLASS
from draftcli.core.models.weight_files import WEIGHT_NAMES, clean_key
from draftcli.core.precision import DTYPES
from draftcli.errors import DraftpError, InputError, first_line
from draftcli.export.base import Base, ModelLocation
from draftcli.export.inputs import Changes
from draftcli.export.lineage import Lineage, modelspec
from draftcli.export.other_vae import OtherVae
from draftcli.export.tensors import PlannedTensor, StoredTensor, Wrote, file_metadata, times, write_safetensors

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Merger:
    """Makes the tensors of the merged model, and keeps account of what it changed.

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

    def dtype_of(self, part: str, stored: StoredTensor) -> torch.dtype:
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

    def entries(self, part: str) -> list[PlannedTensor]:
        """The tensors of one part, by the names that its own file has."""
        found = []
        for key, stored in self.base.tensors[part].items():
            # Text encoders' keys here are those that every version of transformers reads; a folder's may not be. Other
            # networks keep theirs, where they come from a folder.
            name = key if part.startswith("text") or clean_key(part, stored.key) != key else stored.key
            found.append(PlannedTensor(name, self.dtype_of(part, stored), stored.shape, partial(self.make, part, key)))
        return found

    def original_entries(self) -> list[PlannedTensor]:
        """The tensors of the whole model in the original layout. A single file keeps its order and its extras."""
        base = self.base
        shapes = {
            part: {key: stored.shape for key, stored in base.tensors[part].items()} for part in base.family.networks
        }
        if base.location.single_file:
            own_vae = base.family.original_layout("vae", shapes["vae"]) if base.vae else []
            layout = [*base.layout, *own_vae]
        else:
            layout = [o for part in base.family.networks for o in base.family.original_layout(part, shapes[part])]
        found = [self._original_entry(original, shapes[original.part]) for original in layout]
        found += [PlannedTensor(key, stored.dtype, stored.shape, stored.load) for key, stored in base.extra.items()]
        present = {entry.key for entry in found}
        marks = [V_MARKER] * (base.prediction == "v_prediction") + [ZERO_SNR_MARKER] * base.zero_terminal_snr
        empty = torch.zeros(0)
        return found + [PlannedTensor(m, empty.dtype, (0,), lambda: empty) for m in marks if m not in present]

    def _original_entry(self, original: Original, shapes: Mapping[str, tuple[int, ...]]) -> PlannedTensor:
        def make() -> Tensor:
            tensors = [to_original(self.make(original.part, key), original.form) for key in original.sources]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

        stored = self.base.tensors[original.part][original.sources[0]]
        return PlannedTensor(original.key, self.dtype_of(original.part, stored), original_shape(original, shapes), make)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`.

    Raises:
        InputError: a value is beyond what the dtype can hold.
        DraftpError: a value was not finite before.
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


def write_single_file(merger: Merger, file: Path, lineage: Lineage, wrote: Wrote) -> None:
    """Write the whole model as one checkpoint in the original layout, with modelspec metadata."""
    base = merger.base
    metadata = file_metadata(base.location.path) if base.location.single_file else {}
    metadata = {key: value for key, value in metadata.items() if "hash" not in key}
    other = (base.vae.name,) if base.vae else ()
    metadata |= modelspec(replace(lineage, merged_from=(base.name, *lineage.merged_from, *other)))
    write_safetensors(file, merger.original_entries(), metadata, wrote)


def write_folder(merger: Merger, folder: Path, shard_size: int, wrote: Wrote) -> None:
    """Write the whole model as a diffusers folder: configuration and tokenizers copied, weights streamed.

    Args:
        merger: of the model.
        folder: new.
        shard_size: largest size of a file of weights, in bytes; a tensor larger than that is a file of its own.
        wrote: called with the bytes of each tensor.
    """
    base = merger.base
    folder.mkdir()
    source = _with_tokenizers(base.location) if base.location.single_file else base.location.config
    _copy_all_but_weights(source, folder, base.family)
    _write_scheduler(base, folder / "scheduler" / "scheduler_config.json")
    if base.vae is not None:
        _write_vae_configuration(base.vae, folder)
    for part in base.family.networks:
        (folder / part).mkdir(exist_ok=True)
        _write_shards(folder / part, WEIGHT_NAMES[part], merger.entries(part), shard_size, wrote)


def diffusers_tensors(lora: Lora) -> dict[str, Tensor]:
    """A LoRA by diffusers' names.

    Scales are multiplied into B, as a loader may overlook them: the file then means 1 without any metadata.
    """
    tensors: dict[str, Tensor] = {}
    for part, module, update in lora.updates():
        tensors[f"{part}.{module}.lora_A.weight"] = update.down
        tensors[f"{part}.{module}.lora_B.weight"] = times(update.up, update.scale)
    return tensors


def diffusers_metadata(lora: Lora) -> dict[str, str]:
    """The settings that go with `diffusers_tensors`, as diffusers stores them: the scale is 1 everywhere.

    Without them diffusers up to 0.36 takes the first layer's rank for the alpha of all, which is wrong where ranks
    differ. Modules of text encoders are named by their endings: transformers 5 leaves `text_model.` out.
    """
    settings: dict[str, object] = {}
    for part, updates in lora.parts.items():
        ranks = {module.removeprefix("text_model."): update.rank for module, update in updates.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in sorted(ranks.items()) if rank != usual}
        config = LoraConfig(
            r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks)
        )
        settings |= {f"{part}.{key}": value for key, value in stored_settings(config).items()}
    return {"format": "pt", ADAPTER_METADATA: json.dumps(settings, indent=2, sort_keys=True)}


def write_lora(
    tensors: Mapping[str, Tensor],
    file: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    hashes: Callable[[Sequence[PlannedTensor], Mapping[str, str]], dict[str, str]] = lambda *_: {},
) -> None:
    """Write the tensors of a LoRA, sorted by name.

    Args:
        tensors: by name.
        file: to be written.
        dtype: to write them in, but for alphas; None: as they are.
        metadata: text beside them.
        hashes: more of it, made from the tensors as they will be written and `metadata`.
    """

    def entry(key: str, tensor: Tensor) -> PlannedTensor:
        wanted = dtype if dtype and not key.endswith(".alpha") else tensor.dtype
        return PlannedTensor(key, wanted, tuple(tensor.shape), lambda: cast(tensor, wanted, key))

    file.parent.mkdir(exist_ok=True)
    entries = [entry(key, tensors[key]) for key in sorted(tensors)]
    write_safetensors(file, entries, {**metadata, **hashes(entries, metadata)})


def written_as(lora: Lora, dtype: torch.dtype | None) -> Lora:
    """What a reader must find in the file: scales multiplied into B, and everything in `dtype`."""

    def written(update: Update) -> Update:
        up = times(update.up, update.scale)
        return Update(update.down.to(dtype or update.down.dtype), up.to(dtype or up.dtype), 1.0)

    return Lora(lora.name, {p: {m: written(u) for m, u in updates.items()} for p, updates in lora.parts.items()})


def _write_shards(folder: Path, stem: str, entries: Sequence[PlannedTensor], shard_size: int, wrote: Wrote) -> None:
    by_key = {entry.key: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_key,
        get_storage_size=lambda entry: entry.size,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        write_safetensors(folder / name, [by_key[key] for key in keys], {"format": "pt"}, wrote)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_all_but_weights(source: Path, folder: Path, family: Family) -> None:
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    shutil.copyfile(source / "model_index.json", folder / "model_index.json")
    for part in parts:
        if Path(part).name != part or not (source / part).is_dir():
            continue
        (folder / part).mkdir()
        for file in sorted((source / part).iterdir()):
            weights = ".index." in file.name or file.suffix not in {".json", ".txt"}
            if file.is_file() and not (weights and part in family.networks):
                shutil.copyfile(file, folder / part / file.name)


def _write_vae_configuration(vae: OtherVae, folder: Path) -> None:
    """That of a VAE from elsewhere; the base may have none, or one of another class."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    if parts.get("vae") != (entry := ["diffusers", VAE_CLASS]):
        index.write_text(json.dumps(parts | {"vae": entry}, indent=2), encoding="utf-8")
    (folder / "vae").mkdir(exist_ok=True)
    shutil.copyfile(vae.config_file, folder / "vae" / "config.json")


def _write_scheduler(base: Base, file: Path) -> None:
    """A single file may predict something else than the configuration that it borrows."""
    scheduler = json.loads(file.read_text(encoding="utf-8"))
    own = scheduler.get("prediction_type", "epsilon"), bool(scheduler.get("rescale_betas_zero_snr"))
    if own != (base.prediction, base.zero_terminal_snr):
        scheduler |= {"prediction_type": base.prediction, "rescale_betas_zero_snr": base.zero_terminal_snr}
        file.write_text(json.dumps(scheduler, indent=2), encoding="utf-8")


def _with_tokenizers(location: ModelLocation) -> Path:
    """A folder that has all but the weights: the configuration's, or that of the family's model on the hub."""
    family, config = location.family, location.config
    if all((config / name).exists() for name in ("model_index.json", *tokenizer_folders(family), "scheduler")):
        return config
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(family.hub_base, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
    except Exception as error:  # offline, refused, interrupted: the hub's client has many types of errors
        raise InputError(
            f"a single file holds no tokenizers, and {family.hub_base} cannot be reached for them; give a local "
            f"diffusers folder of {family.title} with --config, or take --format single-file ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error

"""The weights of a network on disk: which files of a folder they are, what is in them, and whether a loaded network has
taken them.

Libraries put something of their own where a file lacks a tensor, or names it as they don't expect, and go on. Here
every tensor of a network must be in its files, by its name and with its shape, and in the network afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from draftcli.core.models.family import find_family
from draftcli.errors import InputError, warn
from draftcli.file_kinds import unreadable

WEIGHT_NAMES = {
    part: "model" if part.startswith("text") else "diffusion_pytorch_model" for part in find_family().networks
}
# What stands beside codes to say which numbers they are, by the ends of its names, and who writes it so.
_BESIDE_CODES = {
    ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant"): "ComfyUI's scaled fp8",
    (".absmax", ".quant_map", ".nested_absmax", ".SCB", "__nf4", "__fp4"): "bitsandbytes",
    (".qweight", ".qzeros", ".g_idx"): "GPTQ or AWQ",
}
_PICKLED = {".bin", ".ckpt", ".pt", ".pth"}


def weight_files(folder: Path, part: str, variant: str | None, setting: str = "model.pretrained") -> list[Path]:
    """The safetensors of a network: one, or the shards of its index; with `variant`, those where they exist.

    Args:
        folder: the network's own.
        part: a name in `Family.networks`.
        variant: such as fp16: part of the files' names.
        setting: what the user calls the model.

    Raises:
        InputError: they are not there, or under another name; says which, and what to set. One cannot be read, or
            holds quantised weights.
    """
    if not folder.is_dir():
        raise InputError(f"{setting} {folder.parent}: there is no folder {folder.name} in it; download the model again")
    stem = WEIGHT_NAMES[part]
    for name in [f"{stem}.{variant}", stem] if variant else [stem]:
        whole = folder / f"{name}.safetensors"
        shards = _shards(folder, name, setting)
        # Where both are there, transformers reads the whole file and diffusers the shards.
        if whole.is_file() and (stem == "model" or not shards):
            return _checked([whole], setting)
        if shards:
            return _checked(shards, setting)
    raise InputError(f"{setting} {folder}: {_what_is_there_instead(folder, stem, setting)}")


def check_plain(keys: Iterable[str], where: str) -> None:
    """Refuse weights of which a part are codes: drawn without what stands beside them, they are noise.

    Args:
        keys: names of the tensors of a file.
        where: what the message begins with.

    Raises:
        InputError: there are such tensors.
    """
    for key in keys:
        for ends, writer in _BESIDE_CODES.items():
            if key.endswith(ends):
                raise InputError(
                    f"{where}: its weights are quantised as {writer} has them ({key} says so), and draftp reads plain "
                    "ones; take the model in fp16, bf16 or fp32"
                )


def _checked(files: list[Path], setting: str) -> list[Path]:
    """`files`, where each can be read and holds no codes."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                check_plain(stored.keys(), f"{setting} {file}")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{setting} {file}: {unreadable(file, error)}") from error
    return files


def _shards(folder: Path, name: str, setting: str) -> list[Path]:
    """Those that the index of `name` names; empty where there is no index."""
    index = folder / f"{name}.safetensors.index.json"
    stem, _, variant = name.partition(".")
    if not index.is_file() and variant:  # diffusers once wrote model.safetensors.index.fp16.json
        index = folder / f"{stem}.safetensors.index.{variant}.json"
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{index}: cannot be read; weight_map must be files by tensor") from None
    if not inside:
        raise InputError(f"{index} names files outside its folder")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(
            f"{setting} {folder}: {len(missing)} of the {len(shards)} files that {index.name} names are missing, the "
            f"first is {missing[0]}; download the model again"
        )
    return [folder / shard for shard in shards]


def _what_is_there_instead(folder: Path, stem: str, setting: str) -> str:
    """Why a folder has no `stem`.safetensors, and what to do."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    safe = [name for name in files if name.endswith(".safetensors")]
    shard = r"(-\d+-of-\d+)"
    variant = re.compile(rf"{re.escape(stem)}{shard}?\.(\w+){shard}?\.safetensors")
    if variants := sorted({match[2] for name in safe if (match := variant.fullmatch(name))}):
        option = f"--variant {variants[0]}" if setting.startswith("--") else f"model.variant={variants[0]}"
        others = f" (or one of {', '.join(variants[1:])})" if variants[1:] else ""
        if setting == "model.vae":  # model.variant speaks of model.pretrained's files
            option = f"model.vae={folder / next(name for name in safe if variant.fullmatch(name))}"
        verb = "take" if option.startswith("--") else "set"
        return f"it holds the weights as the variant {variants[0]} only; {verb} {option}{others}"
    if any(re.fullmatch(rf"{re.escape(stem)}{shard}\.safetensors", name) for name in safe):
        return f"the weights are in several files, and {stem}.safetensors.index.json is missing; download it again"
    if safe:
        return f"there is no {stem}.safetensors in it, only {safe[0]}; is it another kind of network, or renamed?"
    if pickled := [name for name in files if Path(name).suffix in _PICKLED]:
        return (
            f"it holds the weights as {pickled[0]} only, and such pickled files can run code when opened; convert the "
            "model to .safetensors (diffusers' save_pretrained writes them)"
        )
    weights = [name for name in files if Path(name).suffix not in {".json", ".txt", ".md"}]
    return f"there is no {stem}.safetensors in it{f', only {weights[0]}' if weights else ''}; download the model again"


def clean_key(part: str, key: str) -> str:
    """A network's key in our naming, from a file's or a library's."""
    if part == "vae":  # older folders name its attention otherwise; diffusers renames on loading
        for old, new in (
            (".query.", ".to_q."),
            (".key.", ".to_k."),
            (".value.", ".to_v."),
            (".proj_attn.", ".to_out.0."),
        ):
            key = key.replace(old, new)
    return with_text_model(key) if part.startswith("text") else key


def with_text_model(name: str) -> str:
    """A tensor or module of a text encoder by the name that every version of transformers reads.

    transformers 5 leaves `text_model.` out in the first encoder, and transformers 4 does not know such names.
    """
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def ensure_loaded(module: nn.Module, part: str, files: Sequence[Path], setting: str) -> None:
    """See to it that a network has the tensors of its files, whatever its library made of their names.

    Names and shapes are compared, and the first row of each tensor; where a library overlooked some, the network is
    filled here.

    Args:
        module: the loaded network, in any dtype.
        part: a name in `Family.networks`.
        files: its safetensors.
        setting: what the user calls the model, and where it is.

    Raises:
        InputError: a tensor is missing, or has another shape.
    """
    own = {clean_key(part, key): (key, tensor) for key, tensor in module.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    overlooked = False
    for name, key, stored in _tensors_of(files, part):
        found[name] = tuple(stored.get_slice(key).get_shape())
        if name in own and found[name] == own[name][1].shape:
            overlooked |= not _begins_as(own[name][1], stored, key)
    if missing := sorted(own.keys() - found.keys()):
        raise InputError(
            f"{setting}: {len(missing)} tensors of {part} are missing, the first is {missing[0]}; download it again"
        )
    if odd := sorted(name for name, (_, tensor) in own.items() if found[name] != tensor.shape):
        raise InputError(
            f"{setting}: {odd[0]} of {part} is {found[odd[0]]}, but its config.json says {tuple(own[odd[0]][1].shape)}"
        )
    if unused := sorted(name for name in found.keys() - own.keys() if not name.endswith("position_ids")):
        warn(
            f"{setting}: {len(unused)} tensors of {part} are not in the model that its config.json describes, such as "
            f"{unused[0]}"
        )
    if overlooked:
        tensors = {
            own[name][0]: stored.get_tensor(key).to(own[name][1].dtype)
            for name, key, stored in _tensors_of(files, part)
            if name in own
        }
        module.load_state_dict(tensors, assign=True)


def _tensors_of(files: Sequence[Path], part: str) -> Iterator[tuple[str, str, Any]]:
    """The tensors of a network's files: our name, the file's, and the open file."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - it is no mapping
                yield clean_key(part, key), key, stored


def _begins_as(tensor: Tensor, stored: Any, key: str) -> bool:
    """Whether the first row of a tensor is that of the file."""
    row = stored.get_slice(key)[:1] if tensor.ndim else stored.get_tensor(key)
    return not tensor.is_meta and torch.equal(tensor[:1] if tensor.ndim else tensor, row.to(tensor.dtype))

"""Finding and reading official checkpoints: hub, URL, folder or file; never a pickle's code, never a tensor left out.

A checkpoint of another layout than transformers' is filled into a transformers model by a map of names that must be
complete both ways: a name that the file lacks, or has too many, is an error that says which.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from draftcli.errors import InputError, first_line
from draftcli.file_kinds import unreadable

# What transformers and safetensors raise where files are missing, damaged or those of something else.
LOADERS_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)
# The official name of a model's tensor, and how the tensor is made from what stands there.
Origin = tuple[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Official:
    """Where an official checkpoint is.

    Attributes:
        file: its name.
        hub: hub id of the repository that holds it; empty where `url` is given.
        url: for those that are not on the hub.
        sha256: of the file behind `url`.
    """

    file: str
    hub: str = ""
    url: str = ""
    sha256: str = ""


def find_checkpoint(name: str, official: Official, pretrained: str | None) -> Path:
    """The checkpoint of the reward `name`, fetched if need be.

    Args:
        name: of the reward, for messages.
        official: where the original is.
        pretrained: a local file, a local folder or hub id that holds `official.file`; None: the original.

    Raises:
        InputError: there is no such file, or it cannot be fetched; says what to put where.
    """
    if pretrained is not None:
        path = Path(pretrained).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            if (path / official.file).is_file():
                return path / official.file
            raise InputError(f"reward {name}: {path} has no file {official.file}")
        if path.suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"} or pretrained.count("/") != 1:
            raise InputError(f"reward {name}: {pretrained} is neither a file, a folder nor a hub id")
    repository = pretrained or official.hub
    try:
        return _from_hub(repository, official.file) if repository else _from_url(official)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"reward {name}: {official.file} cannot be fetched from {repository or official.url}; without network, "
            f"put it somewhere and set rewards.{name}.pretrained to that file ({first_line(error)})"
        ) from error


def _from_hub(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))


def _from_url(official: Official) -> Path:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    path = Path(torch.hub.get_dir()) / "draftp" / official.file
    if not path.is_file():
        if HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed when its checksum fits, by torch.
        torch.hub.download_url_to_file(official.url, str(path), hash_prefix=official.sha256, progress=False)
    return path


def read_checkpoint(name: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with weights_only=True.

    What is under `state_dict` is taken, where the file has that; the rest of such a file is not looked at.

    Raises:
        InputError: the file is damaged, or holds more than tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"reward {name}: {path} holds Python objects beside tensors, or is damaged; such a file is not opened, as "
            "it can run code. Save its state_dict alone, or convert it to .safetensors"
        ) from error
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise InputError(f"reward {name}: {path}: {unreadable(path, first_line(error))}") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"reward {name}: {path} is not a state dict, tensors by name")
    return dict(found)


def fill(
    name: str,
    path: Path,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    origin: Callable[[str], Origin] = lambda key: (key, lambda tensor: tensor),
    unused: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fill `model`, which may be on the meta device, from an official checkpoint.

    Args:
        name: of the reward, for messages.
        path: of the file, for messages.
        model: every tensor of its state dict is set.
        tensors: the official ones.
        origin: from a name of the model to the official one, and how to make the tensor of it.
        unused: official names that the reward does not need.
        dtype: of the model afterwards.

    Raises:
        InputError: a name is missing, unknown, or of another shape.
    """
    wanted = {key: (*origin(key), tensor.shape) for key, tensor in model.state_dict().items()}
    official = {source for source, _, _ in wanted.values()}
    faults = [
        *_listed("lacks", sorted(official - tensors.keys())),
        *_listed("has an unknown", sorted(tensors.keys() - official - set(unused))),
    ]
    if faults:
        raise InputError(f"reward {name}: {path} is not in the official layout: {'; '.join(faults)}")
    filled = {}
    for key, (source, take, shape) in wanted.items():
        tensor = take(tensors[source]).to(dtype).contiguous()
        if tensor.shape != shape:
            raise InputError(
                f"reward {name}: {path} is not in the official layout: {source} gives {tuple(tensor.shape)} where "
                f"{tuple(shape)} is expected"
            )
        filled[key] = tensor
    model.load_state_dict(filled, assign=True)
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                assert key == "position_ids", f"{prefix}.{key} is in no checkpoint"
                module.register_buffer(key, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)


def layer_count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers there are under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def shape_of(name: str, path: Path, tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of an official tensor, from which a model's configuration is read.

    Raises:
        InputError: there is none of that name.
    """
    if key not in tensors:
        raise InputError(f"reward {name}: {path} is not in the official layout: lacks {key}")
    return tuple(tensors[key].shape)


def network_config(name: str, place: str, setting: str, kind: str, called: str) -> Any:
    """The configuration of the network in a folder or on the hub.

    Args:
        name: of the reward, for messages.
        place: hub id or folder.
        setting: of the reward that can point elsewhere: `pretrained` or `backbone`.
        kind: transformers' model_type that it must have.
        called: such a network in messages, with its article.

    Raises:
        InputError: there is none, or it is another network's; says what to put where.
    """
    from transformers import AutoConfig

    with loading(name, place, setting):
        config = AutoConfig.from_pretrained(place)
    if config.model_type != kind:
        raise InputError(f"reward {name}: {place} is a {config.model_type} model, not {called}")
    return config


def preprocessor_config(name: str, place: str, setting: str) -> dict[str, Any]:
    """What preprocessor_config.json of a folder or on the hub holds.

    Args:
        name: of the reward, for messages.
        place: hub id or folder.
        setting: of the reward that can point elsewhere: `pretrained` or `backbone`.

    Raises:
        InputError: there is none; says what to put where.
    """
    from transformers import CLIPImageProcessor

    with loading(name, place, setting):
        return CLIPImageProcessor.get_image_processor_dict(place)[0]


def load_pretrained(
    name: str, model_class: Any, place: str, setting: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """A transformers model from hub or folder, with every tensor of it present.

    Args:
        name: of the reward, for messages.
        model_class: transformers' class.
        place: hub id or folder.
        setting: of the reward that can point elsewhere: `pretrained` or `backbone`.
        dtype: of the model.
        settings: for `from_pretrained`.

    Raises:
        InputError: it cannot be loaded, or lacks tensors or has them in another shape.
    """
    with loading(name, place, setting):
        model, faults = read_pretrained(model_class, place, dtype, **settings)
    if faults:
        raise InputError(f"reward {name}: {place} is not whole: {faults}")
    return model


def read_pretrained(
    model_class: Any, place: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, str]:
    """A transformers model, and in words what its files lack of it; empty: nothing.

    transformers makes up what is missing or has another shape, and says so in notes that are kept quiet here.

    Args:
        model_class: transformers' class.
        place: hub id or folder.
        dtype: of the model.
        settings: for `from_pretrained`.

    Raises:
        Exception: transformers' own.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        model, found = model_class.from_pretrained(
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    finally:
        logging.set_verbosity(before)
    odd = [
        f"{one} has another shape"  # transformers 4 gives the name alone
        if isinstance(one, str)
        else f"{one[0]} is {tuple(one[1])} where {tuple(one[2])} is expected"
        for one in found["mismatched_keys"]
    ]
    return model, "; ".join([*_listed("lacks", sorted(found["missing_keys"])), *sorted(odd)[:1]])


@contextmanager
def loading(name: str, place: str, setting: str) -> Iterator[None]:
    """Libraries' errors while they read `place` become one line that says what to set."""
    try:
        yield
    except LOADERS_ERRORS as error:
        raise InputError(
            f"reward {name}: {place} cannot be loaded; without the hub, download it and set rewards.{name}.{setting} "
            f"to its folder ({first_line(error)})"
        ) from error


def _listed(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    return [f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")]

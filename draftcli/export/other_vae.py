"""The VAE of a merged model where it is not the base's own: `model.vae` of the runs that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcli.core.models.family import Family
from draftcli.core.models.vae import VaeFiles, find_vae, load_vae, vae_configuration, vae_place
from draftcli.core.models.weight_files import clean_key
from draftcli.errors import InputError
from draftcli.export.tensors import StoredTensor, stored_tensors

# Fields of a configuration that do not change what is decoded.
_IDLE = ("sample_size", "force_upcast")


@dataclass(frozen=True)
class OtherVae:
    """A VAE that fits the base, unread.

    Attributes:
        name: as `model.vae` has it.
        like: folder of the model whose VAE it must be like, and whose configuration a single file has.
        variant: which files of a folder, such as fp16.
        files: where it is.
        tensors: by our keys.
        unlike: the fields of its configuration by which it decodes otherwise than the base's own would.
    """

    name: str
    like: str
    variant: str | None
    files: VaeFiles
    tensors: Mapping[str, StoredTensor]
    unlike: tuple[str, ...] = ()

    def load(self) -> Any:
        """The network, as training and sampling have it."""
        return load_vae(vae_place(self.name), self.like, self.variant)

    @property
    def config_file(self) -> Path:
        """The file with its configuration."""
        return (self.files.folder or Path(self.like) / "vae") / "config.json"

    def check_single_file(self, base: str) -> None:
        """See that a single file can hold it: programs decode that by the configuration of its family.

        Args:
            base: the model that it goes into, for people.

        Raises:
            InputError: its configuration is another one than that of the base's own VAE.
        """
        if self.unlike:
            raise InputError(
                f"--format single-file: model.vae {self.name} has another configuration than the VAE of {base} "
                f"({', '.join(self.unlike)}), and a single file holds none; use --format diffusers"
            )


def open_vae(name: str, variant: str | None, config: Path, family: Family) -> OtherVae:
    """Find the VAE that `model.vae` names; nothing but headers is read.

    Args:
        name: folder, hub id, .safetensors or built-in model.
        variant: which files of a folder or hub id, such as fp16.
        config: folder with the configuration of the model that it goes into.
        family: of that model.

    Raises:
        InputError: it is not there, is damaged or incomplete, of another class, or has other latents.
    """
    like = vae_configuration(config, family)
    files = find_vae(vae_place(name), like, variant)
    network, own = _blank(files.config, family), _blank(_own_configuration(like), family)
    shapes = {clean_key("vae", key): tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    held = {key: stored for file in files.files for key, stored in stored_tensors(file).items()}
    ours = {files.names[key]: key for key in files.names} or {key: clean_key("vae", key) for key in held}
    found = {ours[key]: stored for key, stored in held.items() if ours.get(key) in shapes}
    if missing := sorted(shapes.keys() - found.keys()):
        raise InputError(f"model.vae {name}: {len(missing)} of its tensors are missing, the first is {missing[0]}")
    tensors = {key: _as_ours(found[key], shape, f"model.vae {name}: {key}") for key, shape in shapes.items()}
    return OtherVae(name, like, variant, files, tensors, _unlike(network.config, own.config))


def _as_ours(stored: StoredTensor, shape: tuple[int, ...], what: str) -> StoredTensor:
    """The tensor in our shape: single files have linear layers as convolutions of one pixel."""
    if stored.shape == shape:
        return stored
    if stored.shape == (*shape, 1, 1):
        return StoredTensor(stored.file, stored.key, stored.dtype, shape, form="convolution")
    raise InputError(f"{what} is {stored.shape}, but its configuration says {shape}")


def _own_configuration(like: str) -> Mapping[str, Any]:
    from diffusers import AutoencoderKL

    own: Any = AutoencoderKL.load_config(like, subfolder="vae")
    return own


def _blank(config: Mapping[str, Any], family: Family) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        return family.build("vae", config)


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    fields = sorted(key for key in one.keys() | other.keys() if not key.startswith("_") and key not in _IDLE)
    return tuple(key for key in fields if plain(one.get(key)) != plain(other.get(key)))

"""The VAE from elsewhere, `model.vae`: finding it, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftcli.config import is_single_file
from draftcli.core.models.family import Family, find_family
from draftcli.core.models.original_layout import ORIGINAL_VAE, original_shape
from draftcli.core.models.places import checked_file, model_path
from draftcli.core.models.single_file import opened, shapes
from draftcli.core.models.weight_files import check_plain, ensure_loaded, weight_files
from draftcli.errors import InputError, first_line

VAE_CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class VaeFiles:
    """A VAE from elsewhere on disk, where it fits the model.

    Attributes:
        folder: that has its configuration; None: it is a single file, and the model's configuration is its own.
        config: that configuration.
        files: its weights.
        names: of a single file: the name there of each tensor, by ours.
    """

    folder: Path | None
    config: Mapping[str, Any]
    files: Sequence[Path]
    names: Mapping[str, str] = field(default_factory=dict)


def vae_place(vae: str) -> str:
    """Path or hub id of what `model.vae` names, which may be a built-in model.

    Raises:
        InputError: it is a file that is not there.
    """
    return checked_file(vae, "model.vae") if is_single_file(vae) else model_path(vae)


def vae_configuration(model: str | Path, family: Family) -> str:
    """The folder or hub id whose VAE a model's must be like: the model's own, else that of its family in the package.

    Args:
        model: its folder, or hub id of its configuration.
        family: of the model.
    """
    has_one = not Path(model).is_dir() or (Path(model) / "vae" / "config.json").is_file()
    return str(model if has_one else family.config_folder)


def find_vae(source: str, model: str, variant: str | None = None) -> VaeFiles:
    """The files of the VAE that `model.vae` names; nothing but headers is read. The arguments are those of `load_vae`.

    Raises:
        InputError: as by `load_vae`, as far as that can be seen from headers.
    """
    from diffusers import AutoencoderKL

    what = f"model.vae {source}"
    own: Any = AutoencoderKL.load_config(model, subfolder="vae")
    with _loading(what):
        if source.endswith(".safetensors"):
            return VaeFiles(None, own, [Path(source)], _names_in_file(Path(source), own, what))
        folder = _folder(source, variant)
        config: Any = AutoencoderKL.load_config(folder)
        check_vae_class(config, what)
        _check_latents(config, own, what)
        return VaeFiles(folder, config, weight_files(folder, "vae", variant, "model.vae"))


def load_vae(source: str, model: str, variant: str | None = None) -> Any:
    """The AutoencoderKL that `model.vae` names, in the dtype of its files or in float32.

    Args:
        source: folder or hub id of a VAE, or of a whole model whose VAE is meant; or a .safetensors with a VAE or a
            whole model.
        model: folder or hub id with the configuration of the model that gets it: the latents of both must be alike.
            Of a single file, which has no configuration, it is the VAE's too.
        variant: which files of a folder or hub id, such as fp16, where it has them.

    Raises:
        InputError: it is not there, is damaged or incomplete, of another class, or has other latents.
    """
    from diffusers import AutoencoderKL

    what, found = f"model.vae {source}", find_vae(source, model, variant)
    with _loading(what):
        if found.folder is None:
            # Without `config` diffusers takes a lone VAE for Stable Diffusion 1's, whose latents have another scale.
            return AutoencoderKL.from_single_file(source, config=model, subfolder="vae")
        chosen = _variant_of(found.files, variant)
        vae = AutoencoderKL.from_pretrained(found.folder, use_safetensors=True, variant=chosen)
        ensure_loaded(vae, "vae", found.files, what)
        return vae


@contextmanager
def _loading(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a loader raises on a wrong or damaged file is as varied as the damage
        raise InputError(f"{what}: cannot be loaded: {first_line(error)}") from error


def check_vae_class(config: Any, what: str) -> None:
    """Refuse the configuration of a VAE of another class; `what` begins the message.

    Raises:
        InputError: it is not an AutoencoderKL.
    """
    kind = config.get("_class_name", VAE_CLASS)
    if kind != VAE_CLASS:
        raise InputError(f"{what}: its class is {kind}, but draftp only decodes with {VAE_CLASS}")


def check_vae_channels(vae: Any, unet: Any, what: str) -> None:
    """Refuse a VAE whose latents the UNet does not make; `what` begins the message.

    Raises:
        InputError: they have another number of channels.
    """
    theirs, ours = vae.config.latent_channels, unet.config.out_channels
    if theirs != ours:
        raise InputError(f"{what}: it has {theirs} latent channels where the UNet has {ours}: it is of another family")


def _check_latents(config: Any, own: Any, what: str) -> None:
    """Refuse a VAE whose configuration says that its latents are others than those of the model's own."""
    if own.get("_class_name", VAE_CLASS) != VAE_CLASS:
        return
    theirs, ours = config.get("latent_channels"), own.get("latent_channels")
    if theirs != ours:
        raise InputError(f"{what}: it has {theirs} latent channels where the model has {ours}: it is of another family")
    theirs, ours = (2 ** (len(c.get("block_out_channels", ())) - 1) for c in (config, own))
    if theirs != ours:
        raise InputError(
            f"{what}: it makes {theirs} pixels of each latent along an edge, but the model's own makes {ours}"
        )
    theirs, ours = (c.get("scaling_factor", 0.18215) for c in (config, own))  # diffusers' default, that of SD 1
    if theirs != ours:
        raise InputError(
            f"{what}: its scaling_factor is {theirs}, but that of the model's own is {ours}: its latents belong to "
            "another family"
        )


def _names_in_file(file: Path, config: Any, what: str) -> dict[str, str]:
    """The names in a .safetensors of the tensors of a configuration's VAE, by ours; refuse a file that does not hold
    them, by the original's names or diffusers'.
    """
    from accelerate import init_empty_weights

    family = find_family()
    with init_empty_weights():
        ours = shapes(family.build("vae", config).state_dict())
    layout = {o.key.removeprefix(ORIGINAL_VAE): o for o in family.original_layout("vae", ours)}
    originals = {name: original_shape(original, ours) for name, original in layout.items()}
    with opened(file, "model.vae") as tensors:
        keys = list(tensors.keys())
        check_plain(keys, what)
        held = {key.removeprefix(ORIGINAL_VAE): tuple(tensors.get_slice(key).get_shape()) for key in keys}
        stored = {key.removeprefix(ORIGINAL_VAE): key for key in keys}
    wanted = max((originals, ours), key=lambda names: len(names.keys() & held.keys()))
    missing = sorted(wanted.keys() - held.keys())
    if 2 * len(missing) > len(wanted):
        raise InputError(
            f"{what}: it is not an {VAE_CLASS}, which has a {missing[0]}; draftp decodes with no other class (files of "
            "TAESD among them)"
        )
    latents = "decoder.conv_in.weight"
    if latents in held and held[latents][1:2] != wanted[latents][1:2]:
        _check_latents({**config, "latent_channels": held[latents][1]}, config, what)
    if missing:
        raise InputError(f"{what}: {len(missing)} of its tensors are missing, the first is {missing[0]}")
    # A convolution of one pixel and a linear layer are the same numbers.
    if odd := sorted(key for key, shape in wanted.items() if _without_ones(held[key]) != _without_ones(shape)):
        raise InputError(f"{what}: {odd[0]} is {held[odd[0]]}, and the model's own VAE has {wanted[odd[0]]}")
    return {layout[name].sources[0] if wanted is originals else name: stored[name] for name in wanted}


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _folder(source: str, variant: str | None) -> Path:
    """The local folder of the VAE that a path or hub id names."""
    if Path(source).is_dir():
        folder = Path(source)
    elif Path(source).exists() or source.count("/") != 1 or source[0] in "./~":
        raise InputError(f"model.vae {source}: there is no such folder; give a diffusers folder, a hub id or a file")
    else:
        from huggingface_hub import snapshot_download

        # A whole model's VAE is in its folder `vae`; a hub id of a VAE alone has it at the top.
        weights = [f"diffusion_pytorch_model{of}.safetensors" for of in ("", *([f".{variant}"] if variant else []))]
        names = ["config.json", *weights]
        folder = Path(snapshot_download(source, allow_patterns=[*names, *(f"vae/{name}" for name in names)]))
    if (folder / "config.json").is_file() or not (folder / "vae" / "config.json").is_file():
        return folder
    return folder / "vae"


def _variant_of(files: Sequence[Path], variant: str | None) -> str | None:
    """`variant`, where the files are those."""
    return variant if variant and f".{variant}" in files[0].name else None

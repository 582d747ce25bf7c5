"""The model that is merged into: a diffusers folder or a single file, tensor by tensor under one naming, unread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from draftcli.core.guidance import Prediction
from draftcli.core.lora.files import LORA_PARTS, Shapes
from draftcli.core.models.family import Family
from draftcli.core.models.loading import (
    checked_file,
    local_folder,
    model_path,
    single_file_prediction,
)
from draftcli.core.models.meta import modules_on_meta, read_json
from draftcli.core.models.original_layout import Original, original_shape
from draftcli.core.models.recognition import family_of_file, family_of_folder
from draftcli.core.models.single_file import check_networks
from draftcli.core.models.weight_files import clean_key, weight_files
from draftcli.errors import InputError, brief
from draftcli.export.other_vae import OtherVae
from draftcli.export.tensors import StoredTensor, stored_tensors


@dataclass(frozen=True)
class ModelLocation:
    """Where a whole model is, as diffusers' loaders want to know it.

    Attributes:
        family: of the model.
        path: a diffusers folder, or a single file.
        config: folder with the parts' config.json; for a single file, another model's or the packaged one.
        single_file: which of the two it is.
        variant: which weight files of a folder, such as fp16.
    """

    family: Family
    path: Path
    config: Path
    single_file: bool
    variant: str | None = None


@dataclass
class Base:
    """A whole model on disk.

    Attributes:
        name: as the user gave it.
        location: its folder or file.
        tensors: by part and key. Keys are diffusers' and transformers', text encoders' with `text_model.` in front.
        prediction: epsilon, v_prediction or sample.
        zero_terminal_snr: whether it was trained with rescaled betas.
        layout: of a single file: how its tensors are made of ours.
        extra: of a single file: tensors that belong to no network, kept as they are.
        vae: what the result decodes with instead of the base's own VAE; None: that.
    """

    name: str
    location: ModelLocation
    tensors: dict[str, dict[str, StoredTensor]]
    prediction: str
    zero_terminal_snr: bool
    layout: list[Original] = field(default_factory=list)
    extra: dict[str, StoredTensor] = field(default_factory=dict)
    vae: OtherVae | None = None

    def take_vae(self, vae: OtherVae) -> None:
        """Put another VAE in the place of its own."""
        self.vae, self.tensors["vae"] = vae, dict(vae.tensors)

    @property
    def family(self) -> Family:
        """Of the model."""
        return self.location.family

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of the weights that a LoRA can change, by part and module: what `read_lora` asks for."""
        return _layers({part: {key: t.shape for key, t in tensors.items()} for part, tensors in self.tensors.items()})


def family_shapes(family: Family) -> dict[str, dict[str, tuple[int, ...]]]:
    """The same of the model that a family is known by, from its configuration alone."""
    return _layers(_expected(family.config_folder, family, tuple(family.networks)))


def _layers(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of all tensors the weights of linear layers and convolutions, in the networks that a LoRA can change."""
    return {
        part: {
            key.removesuffix(".weight"): shape
            for key, shape in shapes[part].items()
            if key.endswith(".weight") and len(shape) in (2, 4)
        }
        for part in LORA_PARTS
        if part in shapes
    }


def open_base(
    pretrained: str, config: str | None = None, variant: str | None = None, elsewhere: Sequence[str] = ()
) -> Base:
    """Find out what the model is made of; nothing but headers is read.

    Args:
        pretrained: diffusers folder, hub id, single .safetensors, or a built-in name.
        config: for a single file, folder with configuration (and, for --format diffusers, tokenizers) of a model of
            its shape; default that of the model that its family is known by.
        variant: which files of a folder, such as fp16.
        elsewhere: networks that are not read from it; the base is without them.

    Raises:
        InputError: nothing is there, it is of no family that we know, it is damaged or incomplete.
    """
    source = model_path(pretrained)
    if source.endswith((".safetensors", ".ckpt")):
        return _open_single_file(pretrained, Path(checked_file(source, "--base")), config, elsewhere)
    folder = local_folder(source, variant, "--base", elsewhere)
    family = family_of_folder(folder)
    parts = [part for part in family.networks if part not in elsewhere]
    tensors = {part: _part_of_folder(folder, part, variant) for part in parts}
    expected = _expected(folder, family, parts)
    for part in parts:
        if missing := sorted(expected[part].keys() - tensors[part].keys()):
            raise InputError(f"{folder}: {len(missing)} tensors of {part} are missing, the first is {missing[0]}")
        if odd := sorted(key for key in expected[part] if tensors[part][key].shape != expected[part][key]):
            raise InputError(f"{folder}: {odd[0]} of {part} has another shape than its config.json says")
        # Left-overs that no program reads, such as position_ids, have no place in other layouts.
        tensors[part] = {key: stored for key, stored in tensors[part].items() if key in expected[part]}
    return Base(pretrained, ModelLocation(family, folder, folder, False, variant), tensors, *_scheduled(folder))


def _scheduled(folder: Path) -> tuple[str, bool]:
    """Prediction and zero terminal SNR, as a folder's scheduler has them."""
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file) if file.is_file() else {}
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in get_args(Prediction):
        raise InputError(f"{file}: predicts {brief(prediction)}; draftp knows {', '.join(get_args(Prediction))}")
    return prediction, bool(scheduler.get("rescale_betas_zero_snr"))


def _open_single_file(name: str, file: Path, config: str | None, elsewhere: Sequence[str]) -> Base:
    family = family_of_file(file)
    folder = Path(model_path(config)) if config else family.config_folder
    if not folder.is_dir():
        raise InputError(f"--config {config}: there is no such folder; give a local diffusers folder of {family.title}")
    parts = [part for part in family.networks if part not in elsewhere]
    check_networks(file, parts, "--base", family)
    unread = tuple(family.original_prefixes[part] for part in elsewhere)
    held = {key: stored for key, stored in stored_tensors(file).items() if not key.startswith(unread)}
    expected, layout = _expected(folder, family, parts), []
    tensors: dict[str, dict[str, StoredTensor]] = {part: {} for part in parts}
    for part in parts:
        originals = family.original_layout(part, expected[part])
        if missing := [o.key for o in originals if o.key not in held]:
            raise InputError(
                f"{file}: {len(missing)} of the {len(originals)} tensors of {part} are missing, the first is "
                f"{missing[0]}; it is no whole checkpoint of {family.title}, or --config ({folder}) has another shape"
            )
        for original in originals:
            stored, shape = held[original.key], original_shape(original, expected[part])
            if stored.shape != shape:
                raise InputError(
                    f"{file}: {original.key} is {stored.shape}, and by the configuration of {folder} it is {shape}"
                )
            tensors[part] |= _split(stored, original, expected[part])
        layout += originals
    known = {original.key for original in layout}
    (prediction, zero_snr), scheduled = single_file_prediction(file), _scheduled(folder)
    prediction, zero_snr = prediction or scheduled[0], scheduled[1] if zero_snr is None else zero_snr
    extra = {key: stored for key, stored in held.items() if key not in known}
    return Base(name, ModelLocation(family, file, folder, True), tensors, prediction, zero_snr, layout, extra)


def _split(stored: StoredTensor, original: Original, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Our tensors in one of the original layout."""
    found, start = {}, 0
    for key in original.sources:
        rows = (start, start + shapes[key][0]) if len(original.sources) > 1 else None
        found[key] = StoredTensor(stored.file, stored.key, stored.dtype, shapes[key], rows, original.form)
        start += shapes[key][0]
    return found


def _part_of_folder(folder: Path, part: str, variant: str | None) -> dict[str, StoredTensor]:
    held: dict[str, StoredTensor] = {}
    for file in weight_files(folder / part, part, variant, "--base"):
        held |= stored_tensors(file)
    return {clean_key(part, key): stored for key, stored in held.items()}


def _expected(config: Path, family: Family, parts: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Every tensor that the configuration wants, with its shape."""
    return {
        part: {clean_key(part, key): tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for part, module in modules_on_meta(config, family, parts).items()
    }

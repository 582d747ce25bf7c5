"""A LoRA's file as diffusers' and peft's own loaders read it, beside what draftp made of it.

Comparing a merged model with the file's reading would find every fault but one of the reading itself. So the file is
read a second time by other people's code: put on networks of the model's shapes that have no weights, from whose
layers matrices and scales are taken.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from draftcli.core.lora.files import LORA_PARTS, Lora, Update
from draftcli.core.lora.naming import PEFT_PREFIX, sort_tensors, split_prefix
from draftcli.core.lora.reading import PEFT_FILE, find_lora, read_tensors
from draftcli.core.models.family import Family
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.weight_files import with_text_model
from draftcli.errors import DraftpError, first_line

_ADAPTER = "second"
_SETTINGS = "lora_adapter_metadata"  # of peft, in the metadata of diffusers' files
# By the names of the original code; diffusers before 0.39 does not take a file that has one of them.
_OUTSIDE_BLOCKS = tuple(f"lora_unet_{name}_" for name in ("input_blocks_0", "out", "time_embed", "label_emb"))
_DIFFUSERS = re.compile(rf"({'|'.join(LORA_PARTS)})\..*(\.lora_[AB]\.|lora\.(down|up)\.|lora_magnitude_vector)")
_NEAR = 1e-6  # relative, of scales: quotients of the same numbers in another order


def compare_reading(path: Path, lora: Lora, config: Path, family: Family) -> str:
    """See that every layer that diffusers or peft reads from a file has the same matrices and scale in `lora`.

    Args:
        path: the file or folder that `lora` was read from.
        lora: as it was read, with no further scale.
        config: folder with the configuration of the model that it is for.
        family: of that model.

    Returns:
        how many layers could be compared, for people.

    Raises:
        DraftpError: one differs.
    """
    file = find_lora(path)
    layers = [(part, module, update) for part, module, update in lora.updates()]
    try:
        with _quiet():
            found = _second_reading(file, config, family)
    except Exception as error:  # what other loaders make of names that they don't know is as varied as they are
        return (
            f"reading: not compared, diffusers does not read {file.name} ({type(error).__name__}: {first_line(error)})"
        )
    compared = 0
    for part, module, update in layers:
        other = found.get((part, module))
        if other is None:
            continue
        if difference := _difference(update, other):
            raise DraftpError(
                f"verification failed: {file}: {part}.{module} is read otherwise by diffusers and peft: {difference}"
            )
        compared += 1
    return f"reading: {compared} of {len(layers)} layers are read alike by diffusers and peft"


def _difference(ours: Update, theirs: Update) -> str | None:
    if not math.isclose(ours.scale, theirs.scale, rel_tol=_NEAR):
        return f"scale {ours.scale:.6g} here, {theirs.scale:.6g} there"
    for what in ("down", "up", "bias", "magnitude"):
        one, two = getattr(ours, what), getattr(theirs, what)
        if (one is None) != (two is None) or (one is not None and not _same(one, two)):
            return f"another {what}"
    return None


def _same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.float().flatten(), two.float().flatten())


def _second_reading(file: Path, config: Path, family: Family) -> dict[tuple[str, str], Update]:
    """By network and clean name of the module: each layer that the loaders found in the file."""
    networks = modules_on_meta(config, family, [part for part in family.networks if part in LORA_PARTS])
    for network in networks.values():
        _hollow(network)
    tensors, metadata = read_tensors(file)
    if all(key.startswith(PEFT_PREFIX) for key in tensors) and file.name == PEFT_FILE:
        PeftModel.from_pretrained(networks["unet"], str(file.parent), adapter_name=_ADAPTER)
        return _layers(networks)
    by_diffusers = all(_DIFFUSERS.match(key) for key in tensors)
    if by_diffusers and _SETTINGS in metadata:
        _load(family, networks, str(file.parent), _ADAPTER, weight_name=file.name)
        return _without_inventions(_layers(networks), tensors)
    if _SETTINGS in metadata:
        networks["unet"].load_lora_adapter(str(file.parent), weight_name=file.name, prefix=None, adapter_name=_ADAPTER)
        return _without_inventions(_layers(networks), tensors)
    for i, state in enumerate(_alike(tensors, by_diffusers, family)):
        _load(family, networks, state, f"{_ADAPTER}{i}")
    return _without_inventions(_layers(networks), tensors)


def _alike(tensors: Mapping[str, Tensor], by_diffusers: bool, family: Family) -> list[dict[str, Tensor]]:
    """The layers of one alpha at a time, or of one rank where there is none; those of other programs by kohya's names.

    diffusers 0.42 loses the alphas of attention layers where they differ, and older ones take a wrong scale where ranks
    differ and no alpha is given. Of other programs' layers, those with more than matrices and an alpha are left out, as
    diffusers does not read them from kohya's files.
    """
    import diffusers

    blocks_alone = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 39)
    groups: dict[tuple[str, float], dict[str, Tensor]] = {}
    for module, layer in sort_tensors(tensors).layers.items():
        alpha = layer["alpha"][1] if "alpha" in layer else None
        group = groups.setdefault(("rank", len(layer["down"][1])) if alpha is None else ("alpha", float(alpha)), {})
        if by_diffusers:
            group |= dict(layer.values())
            continue
        if layer.keys() - {"alpha"} != {"down", "up"}:
            continue
        _, part, name = split_prefix(module)
        if part not in family.kohya_prefixes:
            continue
        stem = family.kohya_prefixes[part] + name.replace(".", "_")
        if "resblocks" in name or (blocks_alone and stem.startswith(_OUTSIDE_BLOCKS)):
            continue  # OpenCLIP's names, which diffusers does not know
        group |= {f"{stem}.lora_down.weight": layer["down"][1], f"{stem}.lora_up.weight": layer["up"][1]}
        if alpha is not None:
            group[f"{stem}.alpha"] = alpha
    return [group for group in groups.values() if group]


def _load(
    family: Family, networks: Mapping[str, Any], source: str | dict[str, Tensor], adapter: str, **file: str
) -> None:
    """By diffusers' loader; `weight_name` is that of a file in the folder `source`."""
    import diffusers

    pipeline = getattr(diffusers, family.pipeline)
    read: Any = pipeline.lora_state_dict(source, unet_config=networks["unet"].config, return_lora_metadata=True, **file)
    state, alphas, metadata = read
    pipeline.load_lora_into_unet(state, alphas, networks["unet"], adapter_name=adapter, metadata=metadata)
    for part in (part for part in LORA_PARTS[1:] if part in networks):
        pipeline.load_lora_into_text_encoder(
            state, alphas, networks[part], prefix=part, adapter_name=adapter, metadata=metadata
        )


def _layers(networks: Mapping[str, nn.Module]) -> dict[tuple[str, str], Update]:
    """What the adapters on the networks do, by network and clean name."""
    found = {}
    for part, network in networks.items():
        for name, layer in network.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            for adapter in layer.lora_A:
                magnitude = layer.lora_magnitude_vector[adapter].weight if layer.use_dora[adapter] else None
                found[part, name if part == "unet" else with_text_model(name)] = Update(
                    layer.lora_A[adapter].weight.detach(),
                    layer.lora_B[adapter].weight.detach(),
                    layer.scaling[adapter],
                    layer.lora_B[adapter].bias,
                    magnitude,
                )
    return found


def _without_inventions(
    found: Mapping[tuple[str, str], Update], tensors: Mapping[str, Tensor]
) -> dict[tuple[str, str], Update]:
    """Biases and magnitudes only where the file has them: peft gives each layer of an adapter one if any has."""
    odd = [key for key in tensors if "lora_B.bias" in key or "lora_magnitude_vector" in key]

    def kept(place: tuple[str, str], what: str, tensor: Tensor | None) -> Tensor | None:
        return tensor if any(f"{place[1]}.{what}" in key for key in odd) else None

    return {
        place: replace(
            update,
            bias=kept(place, "lora_B.bias", update.bias),
            magnitude=kept(place, "lora_magnitude_vector", update.magnitude),
        )
        for place, update in found.items()
    }


def _hollow(network: nn.Module) -> None:
    """Give a network on the meta device weights that are one zero each, spread to their shapes: next to no memory.

    In float32, as transformers casts a LoRA to the dtype of the network.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape), persistent=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loaders' notes, on weights that are missing here on purpose among others."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)

"""LoRA files as people have them: diffusers, peft and kohya naming, read into one clean form.

The namings that are recognised, each with the same module:

    diffusers        unet.down_blocks.1.attentions.0.proj_in.lora_A.weight        (.lora_B; scale in the metadata)
    older diffusers  unet.down_blocks.1.attentions.0.proj_in.lora.down.weight     (.up; attn1.processor.to_q_lora.down)
    peft             base_model.model.down_blocks.1.attentions.0.proj_in.lora_A.weight   (scale in adapter_config.json)
    kohya            lora_unet_input_blocks_4_1_proj_in.lora_down.weight          (.lora_up.weight, .alpha)
    kohya, by        lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight
    diffusers' names

and lora_te1_ / lora_te2_ or text_encoder. / text_encoder_2. for the text encoders. Underscored names can't be parsed
(is it `to_q` or `to.q`?), so every spelling is looked up in a table made from the networks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import LORA_PARTS, Lora, Shapes, Update, with_text_model
from draftcli.core.models.original_names import original_unet_names
from draftcli.errors import InputError, brief

FILE_NAMES = (LORA_FILE, "adapter_model.safetensors")

_KOHYA = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
_DOTTED = {"diffusion_model.": "unet", **{f"{part}.": part for part in LORA_PARTS}}
_MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[\w-]+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
_OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a LoRA in Tucker form",
    "oft_": "OFT",
    ".diff_b": "a weight difference",
    ".diff": "a weight difference",
}
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_LARGEST = 1e30  # beyond any alpha that somebody could mean
_FAMILY_BY_WIDTH = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_TRANSFORMERS = ("double_blocks", "single_blocks", "single_transformer_blocks", "joint_blocks", "transformer.")


def find_lora(path: Path) -> Path:
    """The LoRA's file: `path` itself, or the one in a folder (a run's, its `final`, one of diffusers or peft).

    Raises:
        InputError: there is none, or it is pickled.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: only .safetensors are read, as other files can run code when opened; convert it")
        return path
    if not path.is_dir():
        raise InputError(f"{path}: there is no such file or folder; give a LoRA's .safetensors or its folder")
    for folder in (path, path / "final"):
        for name in FILE_NAMES:
            if (folder / name).is_file():
                return folder / name
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if len(files) > 1:
            raise InputError(f"{path} holds {len(files)} .safetensors files; name the one that you mean")
    raise InputError(f"{path}: no LoRA in it; a LoRA's folder holds {LORA_FILE}")


def read_lora(path: Path, shapes: Shapes) -> Lora:
    """Read a LoRA for the networks whose weights have these shapes.

    Args:
        path: a .safetensors file, or a folder with one.
        shapes: by network, as `weight_shapes` gives them. A part for a text encoder that is left out is read without a
            check and by the file's own names, so that callers can say that they don't apply it.

    Raises:
        InputError: no such file; not a LoRA; for another family of models; keys that fit nothing; matrices that don't
            fit each other or the network; a LoRA without any effect; values that are not finite.
    """
    file = find_lora(path)
    tensors, metadata = _read(file)
    if not tensors:
        raise InputError(f"{file}: there is nothing in it")
    _refuse_other_methods(file, tensors)
    matrices, alphas, unknown = _sort(tensors)
    if not matrices:
        raise InputError(f"{file}: not a LoRA, it has no lora_A / lora_down matrices; the first key is {min(tensors)}")
    _refuse_other_families(file, matrices, shapes)
    spellings = {part: _spellings(part, names) for part, names in shapes.items()}
    scales = _Scales(file, metadata)
    parts: dict[str, dict[str, Update]] = {}
    for module, pair in matrices.items():
        key = next(iter(pair.values()))[0]
        place = _place(module, spellings)
        if place is None:
            unknown.append(key)
            continue
        if len(pair) != 2:
            raise InputError(f"{file}: {key} has no partner; every layer needs a down (A) and an up (B) matrix")
        part, name, shape = place
        updates = parts.setdefault(part, {})
        if name in updates:
            raise InputError(f"{file}: two LoRAs for the same layer, {part}.{name}; one of them is {key}")
        down, up = _fitted(file, key, pair["down"][1], pair["up"][1], shape)
        updates[name] = Update(down, up, scales(part, name, down.shape[0], alphas.pop(module, None)))
    unknown += [f"{module}.alpha" for module in alphas]
    if unknown:
        raise InputError(
            f"{file}: {len(unknown)} of its {len(tensors)} keys fit nothing in this model, the first is "
            f"{min(unknown)}; is it a LoRA for another model?"
        )
    lora = Lora(str(path), parts)
    _refuse_no_effect(file, lora)
    return lora


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors refuses in its own way, torch what it has no numbers for in others
        raise InputError(f"{file}: cannot be read, it may be damaged ({error})") from error


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, float], list[str]]:
    """By module as the file spells it: (key, tensor) of `down` and `up`; alphas; and keys that are neither."""
    matrices: dict[str, dict[str, tuple[str, Tensor]]] = {}
    alphas, unknown = {}, []
    for key, tensor in tensors.items():
        if tensor.is_complex():
            unknown.append(key)
        elif match := _MATRIX.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match[2], match[2])
            matrices.setdefault(match[1], {})[side] = (key, tensor if tensor.itemsize > 1 else tensor.float())
        elif (match := _ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[match[1]] = float(tensor)
        else:
            unknown.append(key)
    return matrices, alphas, unknown


_Place = tuple[str, tuple[int, ...] | None]


def _spellings(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Place]:
    """Every way in which files spell a module's name, to the one in clean form and its weight's shape."""
    found: dict[str, _Place] = {}
    originals = original_unet_names(shapes) if part == "unet" else {}
    for name, shape in shapes.items():
        clean = name if part == "unet" else with_text_model(name)
        for spelling in filter(None, (name, clean, originals.get(name))):
            found[spelling] = found[spelling.replace(".", "_")] = (clean, shape)
            if spelling.endswith("to_out.0"):
                found[spelling.removesuffix(".0")] = (clean, shape)
    return found


def _place(
    module: str, spellings: Mapping[str, Mapping[str, _Place]]
) -> tuple[str, str, tuple[int, ...] | None] | None:
    """The network, clean name and weight's shape of a module as a file spells it, or None."""
    name = module.removeprefix("base_model.model.")
    prefixes = {**_KOHYA, **_DOTTED}
    prefix = next((p for p in prefixes if name.startswith(p)), "")
    part, name = prefixes.get(prefix, "unet"), name.removeprefix(prefix).replace(".processor.", ".")
    if part not in spellings and part != "unet":
        return part, name, None  # a text encoder's part, kept so that callers can report it
    if part != "unet" and "self_attn.to_" in name:
        stem, _, last = name.rpartition(".")
        name = f"{stem}.{_OLD_ATTENTION.get(last, last)}"
    found = spellings.get(part, {}).get(name)
    return (part, *found) if found else None


def _fitted(file: Path, key: str, down: Tensor, up: Tensor, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Both matrices in the form of the weight: 1 x 1 convolutions and linear layers are the same thing."""
    if not torch.isfinite(down).all() or not torch.isfinite(up).all():
        raise InputError(f"{file}: {key} or its partner holds values that are not finite (NaN or infinite)")
    dimensions = down.ndim in (2, 4) and up.ndim in (2, 4) and tuple(up.shape[2:]) in ((), (1, 1))
    if not dimensions or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise InputError(
            f"{file}: rank mismatch at {key}: down is {tuple(down.shape)} and up {tuple(up.shape)}; "
            "the first size of down and the second of up must be the same rank"
        )
    if shape is None:
        return down, up
    kernel = shape[2:]
    if up.shape[0] == shape[0] and down.shape[1] == shape[1] and (down.shape[2:] or (1, 1)) == (kernel or (1, 1)):
        return down.reshape(-1, *shape[1:]), up.reshape(shape[0], -1, *(1 for _ in kernel))
    made_for = (up.shape[0], *down.shape[1:])
    raise InputError(
        f"{file}: {key} was made for a weight of shape {made_for}, this model's is {shape}; "
        "is it a LoRA for another model?"
    )


class _Scales:
    """alpha / rank of each module: from the file's own alphas, its metadata or adapter_config.json, else 1."""

    def __init__(self, file: Path, metadata: Mapping[str, str]) -> None:
        self.file = file
        self.settings: dict[str, Any] = {}
        try:
            self.settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
            config = file.with_name("adapter_config.json")
            if config.is_file() and file.name == FILE_NAMES[1]:
                self.settings |= {f"unet.{k}": v for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise InputError(f"{file}: the settings beside its weights cannot be read ({error})") from error
        if any(self.settings.get(f"{part}.use_dora") for part in LORA_PARTS):
            raise InputError(f"{file} is DoRA, which draftp does not read; only plain LoRAs can be merged and applied")

    def __call__(self, part: str, module: str, rank: int, alpha: float | None) -> float:
        over = rank
        if alpha is None:
            default, pattern = (self.settings.get(f"{part}.{name}") for name in ("lora_alpha", "alpha_pattern"))
            ending = module.removeprefix("text_model.")  # as merge-lora writes it
            alpha = pattern.get(module, pattern.get(ending, default)) if isinstance(pattern, dict) else default
            over = rank**0.5 if self.settings.get(f"{part}.use_rslora") else rank
        if alpha is None:
            return 1.0
        if not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST:
            raise InputError(f"{self.file}: the alpha of {part}.{module} is {brief(alpha)}; expected a number")
        return alpha / over


def _refuse_other_methods(file: Path, tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        for mark, method in _OTHER_METHODS.items():
            if key.endswith(mark) if mark.startswith(".") else mark in key:
                raise InputError(f"{file} is {method} (key {key}), which draftp does not read; only plain LoRAs")


def _refuse_other_families(file: Path, matrices: Mapping[str, Any], shapes: Shapes) -> None:
    mark = next((m for m in matrices if any(t in m.removeprefix("base_model.model.") for t in _TRANSFORMERS)), None)
    if mark and not any(word in mark for word in ("down_blocks", "input_blocks", "text_model")):
        raise InputError(f"{file} is a LoRA for a transformer such as Flux or SD3 (key {mark}), this model is an SDXL")
    own = {shape[1] for name, shape in shapes.get("unet", {}).items() if name.endswith("attn2.to_k")}
    for module, pair in matrices.items():
        if re.search(r"attn2[._](processor\.)?to_k$", module) and "down" in pair and pair["down"][1].ndim > 1:
            width = pair["down"][1].shape[1]
            if own and width not in own:
                family = _FAMILY_BY_WIDTH.get(width, "another model")
                raise InputError(
                    f"{file} is a LoRA for {family}: its cross-attention reads text of width {width}, "
                    f"this model's of {', '.join(map(str, sorted(own)))}"
                )
            return


def _refuse_no_effect(file: Path, lora: Lora) -> None:
    if not any(update.scale and update.up.any() and update.down.any() for _, _, update in lora.updates()):
        raise InputError(f"{file} would change nothing: in every layer A, B or alpha is zero; was it trained?")

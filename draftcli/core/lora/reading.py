"""Reading LoRA files as people have them, in every naming that `core.lora.naming` knows, into one clean form."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import LORA_PARTS, Lora, Shapes, Update
from draftcli.core.lora.naming import PEFT_PREFIX, Contents, NamedTensor, Place, Spellings, sort_tensors, why_unplaced
from draftcli.errors import InputError, brief
from draftcli.file_kinds import unreadable

PEFT_FILE = "adapter_model.safetensors"
FILE_NAMES = (LORA_FILE, PEFT_FILE)

_LARGEST = 1e30  # beyond any alpha that somebody could mean
_FAMILY_BY_WIDTH = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_TRANSFORMERS = ("double_blocks", "single_blocks", "single_transformer_blocks", "joint_blocks", "transformer.")
_APPLIED = "draftp reads LoRA matrices with their alphas, scalars, biases and DoRA magnitudes"
# Settings of peft that make something else than scale * up @ down of the matrices in the file.
_OTHER_SETTINGS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
}
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # values of init_lora_weights


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

    Embeddings for trigger words that lie beside the LoRA are left out, with a warning.

    Args:
        path: a .safetensors file, or a folder with one.
        shapes: by network, as `weight_shapes` gives them. A part for a text encoder that is left out is read without a
            check and by the file's own names, so that callers can say that they don't apply it.

    Raises:
        InputError: no such file; not a LoRA; it holds what draftp cannot apply; for another family of models; keys
            that fit nothing; matrices that don't fit each other or the network; a LoRA without any effect; values that
            are not finite.
    """
    file = find_lora(path)
    tensors, metadata = read_tensors(file)
    if not tensors:
        raise InputError(f"{file}: there is nothing in it")
    contents = sort_tensors(tensors)
    _refuse_contents(file, contents, tensors)
    _refuse_other_families(file, contents, shapes)
    spellings = Spellings(shapes)
    scales = _Scales(file, metadata, peft=any(key.startswith(PEFT_PREFIX) for key in tensors))
    parts: dict[str, dict[str, Update]] = {}
    unplaced: list[str] = []
    for module, layer in contents.layers.items():
        place = spellings.place(module)
        key = next(iter(layer.values()))[0]
        if place is None:
            unplaced += [key for key, _ in layer.values()]
            continue
        if not layer.keys() >= {"down", "up"}:
            raise InputError(f"{file}: {key} has no partner; every layer needs a down (A) and an up (B) matrix")
        part, name, _ = place
        updates = parts.setdefault(part, {})
        if name in updates:
            raise InputError(f"{file}: two LoRAs for the same layer, {part}.{name}; one of them is {key}")
        updates[name] = _update(file, layer, place, scales)
    _refuse_unknown(file, contents.unknown, unplaced, len(tensors))
    if contents.embeddings:
        named = ", ".join(sorted(contents.embeddings))
        warnings.warn(
            f"{file}: embeddings for trigger words ({named}) are left out; draftp applies only the LoRA", stacklevel=2
        )
    lora = Lora(str(path), parts)
    _refuse_no_effect(file, lora)
    return lora


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, and the text beside them.

    Raises:
        InputError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors refuses in its own way, torch what it has no numbers for in others
        raise InputError(f"{file}: {unreadable(file, error)}") from error


def _update(file: Path, layer: Mapping[str, NamedTensor], place: Place, scales: _Scales) -> Update:
    """One layer's tensors in the form of its weight."""
    part, name, shape = place
    for key, tensor in layer.values():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{file}: {key} holds values that are not finite (NaN or infinite)")
    key = layer["down"][0]
    down, up = _fitted(file, key, _with_middle(file, layer), layer["up"][1], shape)
    alpha, scalar = (float(layer[what][1]) if what in layer else None for what in ("alpha", "scalar"))
    scale = scales(part, name, down.shape[0], alpha)
    vectors = {what: _vector(file, layer[what], up.shape[0]) for what in ("bias", "magnitude") if what in layer}
    if len(vectors) == 2:
        raise InputError(f"{file}: {key} has a bias and a DoRA magnitude; neither peft nor draftp applies both")
    if scales.use_dora(part) and "magnitude" not in vectors:
        raise InputError(f"{file}: its settings say DoRA, and {part}.{name} has no magnitudes (lora_magnitude_vector)")
    return Update(down, up, scale if scalar is None else scale * scalar, **vectors)


def _with_middle(file: Path, layer: Mapping[str, NamedTensor]) -> Tensor:
    """A; where a convolution's LoRA is in Tucker form (LyCORIS), with the matrix between the two multiplied into it."""
    key, down = layer["down"]
    if "middle" not in layer:
        return down
    middle = layer["middle"][1]
    if middle.ndim != 4 or down.shape[2:] not in ((), (1, 1)) or down.shape[:1] != middle.shape[1:2]:
        raise InputError(f"{file}: rank mismatch at {key}: lora_mid is {tuple(middle.shape)}, down {tuple(down.shape)}")
    dtype = torch.promote_types(down.dtype, torch.float32)
    return torch.einsum("abhw,bi->aihw", middle.to(dtype), down.to(dtype).flatten(1))


def _vector(file: Path, named: NamedTensor, outputs: int) -> Tensor:
    """A bias or a DoRA magnitude, one number for each output."""
    key, tensor = named
    by_output = [(outputs,), (outputs, 1), (outputs, 1, 1, 1)]
    if key.endswith(".dora_scale"):
        if tensor.ndim > 1 and tensor.shape[0] == 1 != outputs:
            raise InputError(
                f"{file} is DoRA with a magnitude for each input ({key}), as LyCORIS and OneTrainer write it; draftp "
                "reads one for each output, as peft has it (in LyCORIS: wd_on_output)"
            )
    else:
        by_output.append((1, outputs, 1, 1))
    if tuple(tensor.shape) not in by_output:
        raise InputError(f"{file}: {key} is {tuple(tensor.shape)}; expected one number for each of {outputs} outputs")
    return tensor.flatten()


def _fitted(file: Path, key: str, down: Tensor, up: Tensor, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Both matrices in the form of the weight: 1 x 1 convolutions and linear layers are the same thing."""
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
    """alpha / rank of each module: from the file's own alphas, its metadata or adapter_config.json, else 1.

    The settings are peft's, and so is what they mean.
    """

    def __init__(self, file: Path, metadata: Mapping[str, str], peft: bool) -> None:
        self.file = file
        self.settings: dict[str, Any] = {}
        config = file.with_name("adapter_config.json")
        try:
            self.settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
            if config.is_file() and (peft or file.name == PEFT_FILE):
                self.settings |= json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise InputError(f"{file}: the settings beside its weights cannot be read ({error})") from error
        if peft and not self.settings:
            warnings.warn(
                f"{file}: there is no adapter_config.json beside it to say its alpha; its scale is taken as 1",
                stacklevel=3,
            )
        for part in LORA_PARTS:
            self._refuse_settings(self._of(part))

    def __call__(self, part: str, module: str, rank: int, alpha: float | None) -> float:
        over = float(rank)
        if alpha is None and (settings := self._of(part)):
            alpha = self._alpha(settings, module)
            over = rank**0.5 if settings.get("use_rslora") else rank
        if alpha is None:
            return 1.0
        if not isinstance(alpha, int | float) or not abs(alpha) < _LARGEST:
            raise InputError(f"{self.file}: the alpha of {part}.{module} is {brief(alpha)}; expected a number")
        return alpha / over

    def use_dora(self, part: str) -> bool:
        """Whether the settings say that this network's is DoRA."""
        return bool(self._of(part).get("use_dora"))

    def _of(self, part: str) -> dict[str, Any]:
        """One network's settings. Those of a file for one network alone have no prefix, and it is the UNet."""
        own = {k.removeprefix(f"{part}."): v for k, v in self.settings.items() if k.startswith(f"{part}.")}
        return own or ({k: v for k, v in self.settings.items() if "." not in k} if part == "unet" else {})

    def _alpha(self, settings: Mapping[str, Any], module: str) -> Any:
        default, pattern = settings.get("lora_alpha", LoraConfig.lora_alpha), settings.get("alpha_pattern")
        if not isinstance(pattern, dict):
            return default
        try:
            with warnings.catch_warnings(action="ignore"):  # what Python thinks of the file's regular expressions
                for name in (module, module.removeprefix("text_model.")):
                    if (key := get_pattern_key(list(pattern), name)) in pattern:
                        return pattern[key]
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{self.file}: its alpha_pattern cannot be understood ({error})") from error
        return default

    def _refuse_settings(self, settings: Mapping[str, Any]) -> None:
        if (kind := settings.get("peft_type", "LORA")) != "LORA":
            raise InputError(f"{self.file} is {brief(kind)}, as its settings say; {_APPLIED}")
        for name, what in _OTHER_SETTINGS.items():
            if settings.get(name):
                raise InputError(f"{self.file}: its settings say {what} ({name}), which draftp does not apply")
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise InputError(
                f"{self.file} changes the model's own weights too, as it was started from them (init_lora_weights "
                f"{brief(start)}); save it again with peft's path_initial_model_for_weight_conversion"
            )


def _refuse_contents(file: Path, contents: Contents, tensors: Mapping[str, Tensor]) -> None:
    """What the file holds beside, or instead of, LoRA matrices."""
    if contents.others:
        found = "; ".join(f"{what} ({len(keys)} keys, such as {min(keys)})" for what, keys in contents.others.items())
        holds = "holds, beside a LoRA," if contents.has_matrices() else "is no LoRA, it holds"
        raise InputError(f"{file} {holds} {found}; {_APPLIED}")
    if contents.embeddings and not contents.has_matrices():
        raise InputError(f"{file} is an embedding for a trigger word (textual inversion), not a LoRA")
    if not contents.has_matrices():
        raise InputError(f"{file}: not a LoRA, it has no lora_A / lora_down matrices; the first key is {min(tensors)}")
    if contents.twice:
        raise InputError(f"{file} holds more than one adapter ({min(contents.twice)}); give one of them")


def _refuse_unknown(file: Path, unknown: list[str], unplaced: list[str], count: int) -> None:
    """Keys that are no part of a LoRA, and layers that the networks don't have."""
    if biases := [key for key in unknown if key.endswith(".bias")]:
        raise InputError(
            f"{file} holds, beside a LoRA, biases that were trained as a whole (peft's bias; {len(biases)} of its "
            f"{count} keys, such as {min(biases)}); {_APPLIED}"
        )
    if unknown:
        raise InputError(
            f"{file}: {len(unknown)} of its {count} keys are none of a LoRA's, the first is {min(unknown)}; {_APPLIED}"
        )
    for key in sorted(unplaced):
        if reason := why_unplaced(key):
            raise InputError(f"{file}: {key} {reason}; draftp cannot apply it")
    if unplaced:
        raise InputError(
            f"{file}: {len(unplaced)} of its {count} keys fit nothing in this model, the first is {min(unplaced)}; "
            "is it a LoRA for another model?"
        )


def _refuse_other_families(file: Path, contents: Contents, shapes: Shapes) -> None:
    matrices = contents.layers
    mark = next((m for m in matrices if any(t in m.removeprefix("base_model.model.") for t in _TRANSFORMERS)), None)
    if mark and not any(word in mark for word in ("down_blocks", "input_blocks", "text_model", "resblocks")):
        raise InputError(
            f"{file} is a LoRA for a transformer such as Flux or SD3 (key {mark}); this model has a UNet as SDXL has"
        )
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
    def moves(update: Update) -> bool:
        adds = bool(update.up.any() and update.down.any()) or (update.bias is not None and bool(update.bias.any()))
        return update.magnitude is not None or (adds and update.scale != 0)

    if not any(moves(update) for _, _, update in lora.updates()):
        raise InputError(f"{file} would change nothing: in every layer A, B or alpha is zero; was it trained?")

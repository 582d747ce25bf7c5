"""Where models are, and those that ship with the package, with what their files don't say.

Nothing here needs torch, so that a wrong path costs no import of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from draftcli.built_in import BUILT_IN_LORAS, BUILT_IN_MODELS
from draftcli.config import ModelConfig, check_device_name, check_source, is_hub_id, is_single_file
from draftcli.errors import InputError
from draftcli.runs import split_scale


@dataclass(frozen=True)
class BuiltInModel:
    """A model that ships with the package. As a path or a text it is its folder, which is all that it was at first.

    Attributes:
        folder: a diffusers folder like any other.
        features: `package.module:object` of features of its pictures in which nothing is learned; see
            `evaluation/features.py`.
        reads: `package.module:function` (text) -> bool: whether it was made for such a prompt.
        knows: in words, which prompts these are.
        elsewhere: the preset to take for other ones.
    """

    folder: Path
    features: str
    reads: str
    knows: str
    elsewhere: str

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)


BUILT_IN = {
    "toy": BuiltInModel(
        BUILT_IN_MODELS["toy"],
        features="draftcli.toy.features:reading",
        reads="draftcli.toy.prompts:reads",
        knows='one coloured shape on a plain background, such as "a small red star on the left of a white background"',
        elsewhere="sdxl-lora",
    )
}


def lora_path(name: str) -> str:
    """The folder of a built-in LoRA, else `name` itself."""
    return str(BUILT_IN_LORAS.get(name, name))


def model_path(pretrained: str) -> str:
    """The folder of a built-in model, else `pretrained` itself."""
    return str(BUILT_IN[pretrained].folder) if pretrained in BUILT_IN else pretrained


def card_base(source: str, *, is_lora: bool) -> dict[str, str]:
    """The base model in the head of a model card, of which the Hub takes nothing but an id of its own.

    Args:
        source: the model, as its owner gave it.
        is_lora: whether the card is that of a LoRA for it rather than of a whole model made from it.

    Returns:
        Fields of the head (https://huggingface.co/docs/hub/model-cards); none where `source` is no id of the Hub.
    """
    if not is_hub_id(source):
        return {}
    return {"base_model": source, "base_model_relation": "adapter" if is_lora else "finetune"}


def checked_file(path: str, setting: str) -> str:
    """`path`, where a .safetensors is there; `setting` is what the user calls it.

    Raises:
        InputError: there is none, or it is pickled.
    """
    if path.endswith(".ckpt"):
        raise InputError(f"{setting} {path}: .ckpt files can run code when opened; convert it to .safetensors")
    if not Path(path).is_file():
        raise InputError(f"{setting} {path}: there is no such file")
    return path


def base_lora(text: str) -> tuple[Path, float]:
    """PATH and SCALE of an item of model.loras.

    Raises:
        InputError: nothing is there, it is pickled, or the scale is no number or 0.
    """
    name, scale = split_scale(text, lambda name: Path(lora_path(name)).exists(), f"model.loras {text}")
    path = lora_path(name)
    if not Path(path).exists():
        raise InputError(f"model.loras {name}: there is no such file or folder; built in: {', '.join(BUILT_IN_LORAS)}")
    if scale == 0:
        raise InputError(f"model.loras {text}: with the scale 0 it would change nothing; leave it out")
    return Path(checked_file(path, "model.loras") if Path(path).is_file() else path), scale


def check_model_files(cfg: ModelConfig) -> None:
    """Raise InputError where a setting names a file or device that cannot be, or a file that is pickled.

    Whether the Hub has a model of an id, and this machine a device, is seen when it is opened.
    """
    check_device_name(cfg.device)
    for text in cfg.loras:
        base_lora(text)
    model = f"a diffusers folder, a hub id such as OWNER/NAME, a .safetensors file or one of: {', '.join(BUILT_IN)}"
    config = cfg.config if is_single_file(cfg.pretrained) else None
    for setting, source, allowed in (
        ("model.pretrained", cfg.pretrained, model),
        ("model.vae", cfg.vae, model),
        ("model.config", config, "a diffusers folder or a hub id such as OWNER/NAME"),
    ):
        if source and is_single_file(source):
            checked_file(source, setting)
        elif source and source not in BUILT_IN:
            check_source(setting, source, allowed)


def unread_prompts(pretrained: str, texts: Iterable[str]) -> str | None:
    """A warning where a built-in model was not made for some of the prompts; None where there is nothing to say.

    Args:
        pretrained: `model.pretrained`; of other models than built-in ones nothing is known.
        texts: the prompts.
    """
    model = BUILT_IN.get(pretrained)
    if model is None:
        return None
    reads: Callable[[str], bool] = _named(model.reads)
    count = unread = 0
    example = ""
    for text in texts:
        count += 1
        if not reads(text):
            unread, example = unread + 1, example or " ".join(text.split())[:60]
    if not unread:
        return None
    return (
        f'the model {pretrained} cannot read {unread} of {count} prompts, the first is "{example}": it only knows '
        f"{model.knows}; for other prompts take another model, such as that of --preset {model.elsewhere}"
    )


def _named(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)

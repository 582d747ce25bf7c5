"""Models that ship with the package: where they are, and what their files don't say. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BuiltInModel:
    """A model that ships with the package.

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


BUILT_IN = {
    "toy": BuiltInModel(
        Path(__file__).parents[2] / "toy" / "weights" / "model",
        features="draftcli.toy.features:reading",
        reads="draftcli.toy.prompts:reads",
        knows='one coloured shape on a plain background, such as "a small red star on the left of a white background"',
        elsewhere="sdxl-lora",
    )
}


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

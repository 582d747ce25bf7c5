"""From which CLIP a reward is trained, and beside which known rewards its agreement is shown."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from draftcli.core.models.places import BUILT_IN
from draftcli.errors import InputError
from draftcli.preferences.pairs import Answers
from draftcli.preferences.request import check_start_name
from draftcli.rewards.aesthetic import SIGLIP, V2, V2_5, VIT_L
from draftcli.rewards.catalogue import known_rewards
from draftcli.rewards.folders import Start, is_path, read_reward_folder

DEFAULT = "clip"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_start(name: str | None, backbone: str | None, preferences: Answers) -> Start:
    """The CLIP to train from.

    Args:
        name: of a reward that is a CLIP, or a folder: of a CLIP in transformers' format, or of a trained reward. None:
            where every prompt is one of a built-in model's, such as the toy world's, the reward of that world, which
            has the same name; else the CLIP of the reward clip.
        backbone: tokenizer and preprocessor, where they are elsewhere.
        preferences: whose prompts are looked at.

    Raises:
        InputError: nothing has that name.
    """
    if name is None:
        return Start(_of_the_prompts(preferences) or DEFAULT, backbone=backbone)
    check_start_name(name)
    if not is_path(name) or name in known_rewards():
        return Start(name, backbone=backbone)
    folder = Path(name).expanduser().resolve()
    try:
        read_reward_folder(str(folder))
    except InputError:
        return Start("clip", str(folder), backbone)
    return Start(str(folder), backbone=backbone)


def _of_the_prompts(preferences: Answers) -> str | None:
    texts = {answer.prompt for answer in preferences.answers} - {""}
    for name, model in BUILT_IN.items():
        module, _, reads = model.reads.partition(":")
        if texts and name in known_rewards() and all(map(getattr(import_module(module), reads), texts)):
            return name
    return None


def judges_at_hand(start: Start) -> tuple[str, ...]:
    """Known rewards to compare with, whose weights are on this machine already: nothing is fetched for it."""
    if start.reward in BUILT_IN:
        return ()
    hub = Path(torch.hub.get_dir()) / "draftp"
    at_hand = {
        "pickscore": _cached("yuvalkirstain/PickScore_v1"),
        "aesthetic": (hub / V2.file).is_file() and _cached(VIT_L),
        "aesthetic_v2_5": (hub / V2_5.file).is_file() and _cached(SIGLIP),
    }
    return tuple(name for name, here in at_hand.items() if here and name != start.reward)


def _cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in WEIGHT_FILES)

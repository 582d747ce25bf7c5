"""The built-in rewards: where each is found, and what to know before choosing one.

Nothing heavy is imported here. Parameters are what stays in memory, counted; a test counts them again.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from draftcli.config import RewardSource, is_hub_id
from draftcli.errors import InputError
from draftcli.rewards.folders import RewardFolder, is_path, read_reward_folder

GROUP = "draftp.rewards"


@dataclass(frozen=True)
class RewardEntry:
    """One built-in reward.

    Attributes:
        reference: `package.module:object` of its factory.
        measures: in a few words.
        weights: where the official ones are fetched; empty: it has none, or they ship with draftp.
        licence: of the weights as their authors state it; of the code where only that was read; empty: not known.
        sees: the picture as the reward sees it.
        parameters: that stay in memory, in millions.
        stands_on: the network that its weights were made on, or are read with; empty: none.
        bytes_each: of a parameter: 4 in float32, 2 where the authors compute in bfloat16.
    """

    reference: str
    measures: str
    weights: str = ""
    licence: str = ""
    sees: str = "every pixel"
    parameters: float = 0.0
    stands_on: str = ""
    bytes_each: int = 4

    @property
    def memory(self) -> str:
        """Of its weights, for people."""
        size = self.parameters * self.bytes_each * 1e6
        return "-" if not size else f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


_VIT_H, _VIT_L = "CLIP ViT-H/14", "CLIP ViT-L/14"
_CLIP = "draftcli.rewards.clip"
_AESTHETIC = "draftcli.rewards.aesthetic"
_ICTHP = "draftcli.rewards.icthp"
_ANALYTIC = "draftcli.rewards.analytic"

BUILT_IN_REWARDS: dict[str, RewardEntry] = {
    "pickscore": RewardEntry(
        f"{_CLIP}:pickscore", "which image people prefer for a prompt (Pick-a-Pic)",
        "yuvalkirstain/PickScore_v1", "", "224, centre crop", 986.1, _VIT_H,
    ),
    "hpsv2": RewardEntry(
        f"{_CLIP}:hpsv2", "which image people prefer for a prompt (HPD v2)",
        "xswu/HPSv2", "Apache-2.0", "224, padded", 986.1, _VIT_H,
    ),
    "hpsv2_1": RewardEntry(
        f"{_CLIP}:hpsv2_1", "the same, version 2.1, trained on better data",
        "xswu/HPSv2", "Apache-2.0", "224, padded", 986.1, _VIT_H,
    ),
    "imagereward": RewardEntry(
        "draftcli.rewards.imagereward:imagereward", "how well an image fits its prompt, and how much it is liked",
        "THUDM/ImageReward", "Apache-2.0", "224, centre crop", 446.2, "BLIP ViT-L/16",
    ),
    "ict": RewardEntry(
        f"{_ICTHP}:ict", "how much of its prompt an image contains, without a penalty for detail",
        "8y/ICT", "code MIT, weights' card not read", "224, centre crop", 986.1, _VIT_H,
    ),
    "hp": RewardEntry(
        f"{_ICTHP}:hp", "how much an image is liked, 0 to 1, ignores the prompt",
        "8y/HP", "code MIT, weights' card not read", "224, centre crop", 633.3, _VIT_H,
    ),
    "aesthetic": RewardEntry(
        f"{_AESTHETIC}:aesthetic", "aesthetics, 1 to 10, ignores the prompt (LAION, v2)",
        "christophschuhmann/improved-aesthetic-predictor", "Apache-2.0", "224, centre crop", 304.9, _VIT_L,
    ),
    "aesthetic_v1": RewardEntry(
        f"{_AESTHETIC}:aesthetic_v1", "the same, version 1, linear",
        "LAION-AI/aesthetic-predictor", "MIT", "224, centre crop", 304.0, _VIT_L,
    ),
    "aesthetic_v2_5": RewardEntry(
        f"{_AESTHETIC}:aesthetic_v2_5", "aesthetics, 1 to 10, by SigLIP; 5.5 or more is good",
        "discus0434/aesthetic-predictor-v2-5", "AGPL-3.0", "384, squashed", 429.5, "SigLIP so400m/14",
    ),
    "hpsv3": RewardEntry(
        "draftcli.rewards.hpsv3:hpsv3", "which image people prefer for a prompt (HPD v3), by a vision-language model",
        "MizzenAI/HPSv3", "code MIT, weights' card not read", "all of it, about 448 x 448", 7748.6, "Qwen2-VL-7B", 2,
    ),
    "unifiedreward": RewardEntry(
        "draftcli.rewards.unifiedreward:unifiedreward",
        "alignment with the prompt, coherence and style, 1 to 5, by a chat model; to hold out only",
        "CodeGoat24/UnifiedReward-2.0-qwen3vl-2b", "code MIT, weights' card not read", "all of it, up to 4096 x 4096",
        2127.5, "Qwen3-VL-2B", 2,
    ),
    "clip": RewardEntry(
        f"{_CLIP}:clip_score", "how well an image fits its prompt: cosine of any CLIP",
        "openai/clip-vit-large-patch14", "MIT", "224, centre crop", 427.6, _VIT_L,
    ),
    "brightness": RewardEntry(f"{_ANALYTIC}:brightness", "mean luma, 0 to 1"),
    "saturation": RewardEntry(f"{_ANALYTIC}:saturation", "mean of largest minus smallest channel, 0 to 1"),
    "symmetry": RewardEntry(f"{_ANALYTIC}:symmetry", "similarity to the mirror image, at most 0"),
    "compressibility": RewardEntry(f"{_ANALYTIC}:compressibility", "minus the estimated JPEG bits per pixel"),
    "toy": RewardEntry(
        "draftcli.toy.reward:toy_reward", "the toy world's learned preference, imperfect",
        "ships with draftp", "Apache-2.0", "64, centre crop", 0.0, "toy",
    ),
    "toy_judge": RewardEntry(
        "draftcli.toy.reward:toy_judge", "another such preference, trained apart; to hold out",
        "ships with draftp", "Apache-2.0", "64, centre crop", 0.0, "toy judge",
    ),
    "toy_oracle": RewardEntry("draftcli.toy.reward:toy_oracle", "the toy world's exact score; for evaluation only"),
}  # fmt: skip


def known_rewards() -> dict[str, str]:
    """Every reward that can be named, and where it is: built-in ones and entry points."""
    built_in = {name: entry.reference for name, entry in BUILT_IN_REWARDS.items()}
    return {**{point.name: point.value for point in entry_points(group=GROUP)}, **built_in}


def same_network(name: str, other: str) -> bool:
    """Whether two rewards are one, or stand on one network: what moves the score of one moves the features of both."""
    stand_on = [_stands_on(name), _stands_on(other)]
    return name == other or stand_on[0] == stand_on[1] != ""


def _stands_on(name: str) -> str:
    if name in BUILT_IN_REWARDS:
        return BUILT_IN_REWARDS[name].stands_on
    folder = reward_folder(name) if is_path(name) else None
    return _stands_on(folder.start.reward) if folder and folder.start.pretrained is None else ""


def check_names(names: Iterable[str]) -> None:
    """Raise InputError where a reward's name leads nowhere, without importing it or loading any weights."""
    for name in names:
        if reward_folder(name) is None:
            _check_module(name, reward_reference(name).rpartition(":")[0])


def check_sources(rewards: Mapping[str, RewardSource]) -> None:
    """As `check_names`; also where a built-in reward's weights or backbone are neither a path that is there nor a
    hub id. Other rewards understand by these words what they like.
    """
    check_names(rewards)
    for name, source in rewards.items():
        for place in (source.pretrained, source.backbone) if name in BUILT_IN_REWARDS else ():
            if place and not Path(place).exists() and not is_hub_id(place):
                raise InputError(f"reward {name}: {place} is neither a file, a folder nor a hub id")


def _check_module(name: str, module: str) -> None:
    """See that the file, or the package that holds the module, is there; neither is run for it."""
    if module.endswith(".py"):
        path = Path(module).expanduser()
        if not path.is_file():
            raise InputError(f"reward {name}: cannot import {module!r} (there is no file {path})")
        return
    package = module.partition(".")[0]
    if not package or (find_spec(package) or PathFinder.find_spec(package, [str(Path.cwd())])) is None:
        raise InputError(f"reward {name}: cannot import {module!r} (there is no package {package!r})")


def reward_folder(name: str) -> RewardFolder | None:
    """The trained reward whose folder has the path `name`; None where the name is no path.

    Raises:
        InputError: there is no such folder, or no trained reward in it.
    """
    return read_reward_folder(name) if name not in known_rewards() and is_path(name) else None


def reward_reference(name: str) -> str:
    """Where the reward called `name` is: `package.module:object` or `file.py:object`.

    Raises:
        InputError: nothing has that name.
    """
    if ":" in name:
        return name
    known = known_rewards()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InputError(
            f"unknown reward {name!r}{hint}; available: {', '.join(sorted(known))}, or package.module:object, or "
            "file.py:object, or the path of a folder that draftp rewards train left"
        )
    return known[name]


def plug_ins() -> dict[str, str]:
    """Rewards of other packages by name, and the package that brings each."""
    found = {point.name: point.dist.name if point.dist else "?" for point in entry_points(group=GROUP)}
    return {name: package for name, package in sorted(found.items()) if name not in BUILT_IN_REWARDS}

"""`draftp rewards train`: from a file of preferences to a reward in a folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from draftcli.core.engine.runtime import choose_runtime
from draftcli.errors import InputError
from draftcli.preferences.agreement import Assessment, assess
from draftcli.preferences.finetune import FineTuning, finetune, forget_state
from draftcli.preferences.fit import fit_head
from draftcli.preferences.looking import Seen, ask, see_features, see_scores
from draftcli.preferences.pairs import Answers
from draftcli.preferences.reading import read_answers
from draftcli.preferences.request import check_training
from draftcli.preferences.start import find_start, judges_at_hand
from draftcli.preferences.writing import TrainedReward, write_reward
from draftcli.progress import busy
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.folders import WEIGHTS, RewardFolder, Start, Trained
from draftcli.rewards.trained import load_start, network_hash

MANY = 3000  # pairs from which on a LoRA is trained where nothing else is asked for


@dataclass(frozen=True)
class TrainRequest:
    """What was asked for.

    Attributes:
        preferences: a file or folder, see `read_answers`.
        output: the folder of the reward.
        start: see `find_start`.
        backbone: likewise.
        train: head, lora or whole; None: by how many pairs there are.
        tuning: how a LoRA or a whole CLIP is trained; its own `train` and `seed` are set from here.
        judges: known rewards to compare with; None: those whose weights are at hand.
        device: as in `model.device`.
        seed: of folds and order.
        overwrite: replace a trained reward.
    """

    preferences: Path
    output: Path
    start: str | None = None
    backbone: str | None = None
    train: Trained | None = None
    tuning: FineTuning = field(default_factory=FineTuning)
    judges: tuple[str, ...] | None = None
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class TrainReport:
    """What came of it.

    Attributes:
        preferences: what it was trained on, without pairs whose pictures cannot be read.
        reward: the folder.
        found: how well it agrees on answers that it has not seen.
    """

    preferences: Answers
    reward: RewardFolder
    found: Assessment


def train_on_preferences(request: TrainRequest, console: Console) -> TrainReport:
    """Train, judge, write.

    Raises:
        InputError: the preferences cannot be read or are too few to be split, a name leads nowhere, weights cannot be
            loaded, or something else is where the reward would go.
        DraftpError: the folder cannot be written.
    """
    judges = request.judges or ()
    check_training(request.preferences, request.start, judges, request.device, request.output, request.overwrite)
    preferences = read_answers(request.preferences)
    _check_groups(preferences)
    start = find_start(request.start, request.backbone, preferences)
    device = choose_runtime(request.device, "fp32", "--device").device
    clip = load_start(start, f"--from {request.start or start.reward}").to(device)
    kind: Trained = request.train or ("head" if preferences.decided < MANY else "lora")
    reward = RewardFolder(request.output, kind, start, network_hash(clip.clip), clip.preprocess.fit)
    with busy(console, f"looking at the images of {len(preferences.answers)} pairs", in_logs=True) as activity:
        if kind == "head":
            seen = see_features(preferences, clip, activity)
            own = seen.difference[:, -1]
        else:
            seen = see_scores(preferences, clip, device, activity, "looking")
            own = seen.difference
    preferences = seen.preferences
    _check_groups(preferences)
    if kind == "head":
        trained = _head(seen, request.seed)
    else:
        trained = _finetuned(request, kind, clip, reward, preferences, console)
    judged = {_called(start): own}
    del clip
    for name in judges_at_hand(start) if request.judges is None else request.judges:
        judged[name] = _judge(name, preferences, device, console)
    label, rows = seen.label, torch.from_numpy(trained.rows)
    found = assess(
        trained.odds,
        label[rows],
        preferences.groups[trained.rows],
        {name: scores[rows] for name, scores in judged.items()},
        preferences.steadiness(),
        trained.curve,
    )
    write_reward(request.output, reward, trained, found, preferences)
    forget_state(_state(request.output))
    return TrainReport(preferences, reward, found)


def _check_groups(preferences: Answers) -> None:
    if len(np.unique(preferences.groups)) < 2:
        raise InputError(
            f"{preferences.where}: {len(preferences.answers)} pairs that are all of one prompt and share images, or "
            "one pair alone: none can be held out to see how well a reward agrees; add pairs of other prompts"
        )


def _called(start: Start) -> str:
    return start.reward if start.pretrained is None else Path(start.pretrained).name


def _finetuned(
    request: TrainRequest, kind: Literal["lora", "whole"], clip: CLIPReward, reward: RewardFolder, preferences: Answers,
    console: Console,
) -> TrainedReward:  # fmt: skip
    tuning = replace(request.tuning, train=kind, seed=request.seed)
    answers = hashlib.sha256(
        repr([(a.prompt, a.first.key, a.second.key, a.label) for a in preferences.answers]).encode()
    )
    asked = {"answers": answers.hexdigest()[:16], **reward.section()}
    with busy(console, f"fine-tuning on {len(preferences.answers)} pairs", in_logs=True) as activity:
        return finetune(clip, preferences, tuning, asked, _state(request.output), activity)


def _state(output: Path) -> Path:
    return output.with_name(f".{output.name}.training")


def _head(seen: Seen, seed: int) -> TrainedReward:
    preferences = seen.preferences
    fit = fit_head(seen.first, seen.second, seen.label, preferences.groups, seed)

    def save(folder: Path) -> None:
        tensors = {"weight": fit.weights[None].float(), "bias": torch.tensor([fit.offset]).float()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return TrainedReward(
        save, fit.held_out, np.arange(len(preferences.answers)), fit.curve, {"seed": seed}, {"strength": fit.strength}
    )


def _judge(name: str, preferences: Answers, device: torch.device, console: Console) -> Tensor:
    """(n,) how much better it finds the first picture of each pair."""
    with busy(console, f"asking {name}", in_logs=True) as activity:
        return ask(name, preferences, device, activity).difference

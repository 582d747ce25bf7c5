"""What networks see in the pictures of pairs: every picture is opened once for each network, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftcli.errors import InputError
from draftcli.preferences.pairs import Answers, Shown
from draftcli.progress import Activity
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.registry import get_reward_model
from draftcli.rewards.trained import head_features

BATCH = 16


def as_tensor(shown: Shown) -> Tensor:
    """(1, 3, H, W) in [0, 1].

    Raises:
        InputError: it is not there, or cannot be read.
    """
    pixels = np.array(shown.picture())
    return torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255


@dataclass(frozen=True)
class Seen:
    """What was computed of the two pictures of every answer.

    Attributes:
        preferences: without the answers whose pictures cannot be read.
        first: (n, ...) of the first pictures.
        second: (n, ...) of the second ones.
    """

    preferences: Answers
    first: Tensor
    second: Tensor

    @property
    def difference(self) -> Tensor:
        """(n, ...) of the first minus of the second."""
        return self.first - self.second

    @property
    def label(self) -> Tensor:
        """(n,) float64, the share of the preference that the first picture of each answer has."""
        return torch.tensor([answer.label for answer in self.preferences.answers], dtype=torch.float64)


@torch.no_grad()
def see(
    preferences: Answers,
    look: Callable[[Tensor, list[str]], Tensor],
    prepare: Callable[[Tensor], Tensor],
    activity: Activity,
    what: str,
) -> Seen:
    """What `look` sees in all pictures, each beside its prompt.

    Args:
        preferences: the answers.
        look: (B, 3, H, W) pictures as `prepare` leaves them, and B prompts -> (B, ...).
        prepare: of one picture (1, 3, H, W) in [0, 1], before pictures are put together.
        activity: shows how far it is.
        what: is done, for people.

    Raises:
        InputError: no picture can be read.
    """
    asked = {
        (shown.key, answer.prompt): shown for answer in preferences.answers for shown in (answer.first, answer.second)
    }
    faults: dict[str, str] = {}
    found: dict[tuple[str, str], Tensor] = {}

    def pictures() -> Iterator[tuple[tuple[str, str], Tensor]]:
        for key, shown in asked.items():
            try:
                yield key, prepare(as_tensor(shown))
            except InputError as error:
                faults[shown.key] = str(error)

    done = 0
    for batch in _batches(pictures()):
        seen = look(torch.cat([picture for _, picture in batch]), [prompt for (_, prompt), _ in batch])
        found.update(zip((key for key, _ in batch), seen.cpu(), strict=True))
        done += len(batch)
        activity.update(f"{what}: image {done} of {len(asked)}")
    kept = [answer.first.key not in faults and answer.second.key not in faults for answer in preferences.answers]
    if not any(kept):
        raise InputError(f"{preferences.where}: no image can be read; the first: {next(iter(faults.values()))}")
    why = f"{preferences.where}: {len(kept) - sum(kept)} of {len(kept)} pairs are left out"
    left = preferences.only(kept, [f"{why}: {next(iter(faults.values()))}"] if faults else [])
    sides = [[found[getattr(answer, side).key, answer.prompt] for answer in left.answers] for side in SIDES]
    return Seen(left, torch.stack(sides[0]), torch.stack(sides[1]))


SIDES = ("first", "second")


def _batches(
    pictures: Iterable[tuple[tuple[str, str], Tensor]],
) -> Iterator[list[tuple[tuple[str, str], Tensor]]]:
    """At most BATCH at a time, all of one size."""
    for _, alike in groupby(pictures, key=lambda item: item[1].shape):
        batch = []
        for item in alike:
            batch.append(item)
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def see_features(preferences: Answers, clip: CLIPReward, activity: Activity) -> Seen:
    """The (n, F) features of both pictures that a head weighs, float64; see `head_features`."""
    device = clip.preprocess.mean.device

    def look(pixels: Tensor, prompts: list[str]) -> Tensor:
        return head_features(clip, pixels, clip.embed_texts(prompts)).double()

    return see(preferences, look, lambda picture: clip.preprocess(picture.to(device)), activity, "looking")


def ask(name: str, preferences: Answers, device: torch.device, activity: Activity) -> Seen:
    """`see_scores` of a reward by its name.

    Raises:
        InputError: the reward cannot be loaded, or no picture be read.
    """
    reward = get_reward_model(name)
    if isinstance(reward, torch.nn.Module):
        reward.to(device)
    return see_scores(preferences, reward, device, activity, f"asking {name}")


def see_scores(preferences: Answers, reward: Any, device: torch.device, activity: Activity, what: str) -> Seen:
    """The (n,) scores that a reward gives both pictures; NaN where it has nothing to say."""
    return see(preferences, lambda images, prompts: reward(images, prompts).double(), lambda p: p.to(device),
               activity, what)  # fmt: skip

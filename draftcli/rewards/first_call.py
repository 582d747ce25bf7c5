"""The first call of a reward, on grey pictures, before hours hang on it: what is wrong with it shows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from draftcli.errors import DraftpError, InputError, first_line
from draftcli.rewards.mixture import WeightedSum
from draftcli.rewards.protocol import Reward

GREY_PICTURES = 2  # one alone would not show who gives one score for all


def ask_once(
    rewards: Mapping[str, Reward],
    prompts: Sequence[str],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> None:
    """Ask every reward for the scores of two grey pictures.

    Args:
        rewards: by name, on `device`.
        prompts: at least one, such as it will be asked about.
        size: (height, width) of the pictures.
        device: where they are.
        dtype: theirs.
        training: whether the scores need a gradient in the pictures.

    Raises:
        InputError: a reward fails, returns no scores, or scores without gradient where one is needed.
    """
    asked = [prompts[i % len(prompts)] for i in range(GREY_PICTURES)]
    for name, reward in rewards.items():
        images = torch.full((GREY_PICTURES, 3, *size), 0.5, device=device, dtype=dtype, requires_grad=training)
        try:
            with torch.set_grad_enabled(training):
                WeightedSum({name: reward})(images, asked)
        except (DraftpError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a plug-in's own troubles, in one line
            raise InputError(
                f"reward {name} fails on {GREY_PICTURES} grey images, a tensor {tuple(images.shape)} with values in "
                f"[0, 1], and their prompts ({type(error).__name__}: {first_line(error)})"
            ) from error

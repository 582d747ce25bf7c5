"""The toy world's rewards: two learned, differentiable and imperfect ones, `toy_reward` and `toy_judge`, and the truth,
`toy_oracle`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from draftcli.rewards.clip import CLIPReward, load_clip_reward
from draftcli.toy import oracle

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


class ToyOracle:
    """The exact score in [0, 1]; NaN where a caption is outside the toy world's grammar. For judging, not training."""

    name = "toy_oracle"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], on their device."""
        return oracle.oracle_score(images, prompts).to(images.device)


def toy_reward(pretrained: str | Path | None = None) -> CLIPReward:
    """The tiny CLIP that ships with draftp, or another in the same format: exp(logit_scale) * cos, as PickScore."""
    return load_clip_reward("toy", str(pretrained or WEIGHTS_FOLDER / "reward"))


def toy_judge(pretrained: str | Path | None = None) -> CLIPReward:
    """A second opinion, to be held out: as `toy_reward` in form, trained apart from it, with weights of its own."""
    return load_clip_reward("toy_judge", str(pretrained or WEIGHTS_FOLDER / "judge"))


def toy_oracle() -> ToyOracle:
    """The oracle as a reward; it has no weights, and computes on the CPU whatever the device."""
    return ToyOracle()

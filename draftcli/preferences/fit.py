"""A head by Bradley and Terry (1952): the log-odds of an answer are a linear function of what differs in the pictures.

The weights are held small by an L2 penalty, whose strength is chosen by cross-validation. A fold is made of prompts: no
answer is judged by weights that have seen its prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (0.3, 3.0, 30.0, 300.0, 3000.0)  # of the penalty, beside the sum of the pairs' losses
FOLDS = 5
OWN_SCORE = 3.0  # how far the CLIP's own score may count, beside all other features together


def preference_loss(difference: Tensor, label: Tensor, reduction: str = "mean") -> Tensor:
    """PickScore's loss without its constant: cross-entropy of who is preferred.

    Args:
        difference: (...,) of the two scores, first minus second, in log-odds.
        label: (...,) the share of the preference that the first has; 0.5 for a tie.
        reduction: as in torch; none: the loss of each pair.
    """
    return F.binary_cross_entropy_with_logits(difference, label, reduction=reduction)


@dataclass(frozen=True)
class FeatureScale:
    """How features become numbers of one size: (features - mean) * factor.

    The last feature is the CLIP's own score. What it says is about everything, the others are one thing of hundreds, so
    that the same penalty leaves it `OWN_SCORE` times the room of all others.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureScale:
        """From the features (n, F) of pictures."""
        deviation = features.std(0, unbiased=False).clamp(min=1e-6)
        share = torch.full_like(deviation, 1 / math.sqrt(features.shape[1] - 1))
        share[-1] = OWN_SCORE
        return cls(features.mean(0), share / deviation)


def fit_weights(x: Tensor, label: Tensor, strength: float) -> Tensor:
    """The weights (F,) that minimise sum of losses + strength / 2 * |weights|^2.

    Args:
        x: (n, F) differences of features, float64.
        label: (n,) see `preference_loss`.
        strength: of the penalty; above 0, so that there is one minimum.
    """
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = preference_loss(x @ weights, label) + strength / (2 * len(x)) * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def folds_of(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,) the fold of each answer: groups are dealt out at random, as many to each; fewer groups, fewer folds."""
    names = np.unique(groups)
    dealt = np.arange(len(names)) % min(folds, len(names))
    return dealt[np.random.default_rng(seed).permutation(len(names))][np.searchsorted(names, groups)]


def held_out(
    x: Tensor, label: Tensor, groups: np.ndarray, strength: float | None, seed: int, share: float = 1
) -> Tensor:
    """(n,) the log-odds of each answer by weights that have not seen its group.

    Args:
        x: (n, F) differences of features.
        label: (n,)
        groups: (n,)
        strength: of the penalty; None: chosen in each fold, by cross-validation among the other folds alone.
        seed: of the folds.
        share: of the groups outside a fold that weights are fitted on.
    """
    odds = torch.zeros_like(label)
    folds = folds_of(groups, FOLDS, seed)
    for fold in np.unique(folds):
        left = np.flatnonzero(folds != fold)
        if share < 1:
            names = np.random.default_rng([seed, int(fold)]).permutation(np.unique(groups[left]))
            left = left[np.isin(groups[left], names[: max(1, round(share * len(names)))])]
        rows, out = torch.from_numpy(left), torch.from_numpy(np.flatnonzero(folds == fold))
        chosen = choose_strength(x[rows], label[rows], groups[left], seed) if strength is None else strength
        odds[out] = x[out] @ fit_weights(x[rows], label[rows], chosen)
    return odds


def choose_strength(x: Tensor, label: Tensor, groups: np.ndarray, seed: int) -> float:
    """Of `STRENGTHS`, the penalty with the smallest loss on held-out groups; the strongest where there is one group."""
    if len(np.unique(groups)) < 2:
        return STRENGTHS[-1]
    losses = [float(preference_loss(held_out(x, label, groups, s, seed + 1), label)) for s in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


@dataclass(frozen=True)
class HeadFit:
    """A fitted head.

    Attributes:
        weights: (F,) on the features as they are.
        offset: of the score, so that its mean over the pictures is 0.
        strength: of the penalty.
        held_out: (n,) log-odds of each answer by heads that have not seen its prompt.
        curve: how many answers such a head was fitted on, and their held-out log-odds (n,).
    """

    weights: Tensor
    offset: float
    strength: float
    held_out: Tensor
    curve: dict[int, Tensor]


def fit_head(first: Tensor, second: Tensor, label: Tensor, groups: np.ndarray, seed: int) -> HeadFit:
    """Fit on all answers, and judge each by fits without its prompt.

    Args:
        first: (n, F) features of the first pictures, float64.
        second: (n, F) of the second ones.
        label: (n,) float64
        groups: (n,) at least two different ones.
        seed: of the folds.
    """
    scale = FeatureScale.of(torch.cat([first, second]))
    x = (first - second) * scale.factor
    if len(x) < x.shape[1]:  # the same fit in as many dimensions as there are answers
        _, _, rows = torch.linalg.svd(x, full_matrices=False)
    else:
        rows = torch.eye(x.shape[1], dtype=x.dtype)
    x = x @ rows.T
    strength = choose_strength(x, label, groups, seed)
    weights = (fit_weights(x, label, strength) @ rows) * scale.factor
    apart = held_out(x, label, groups, None, seed)
    kept = (FOLDS - 1) / FOLDS
    curve = {round(kept * s * len(x)): held_out(x, label, groups, strength, seed, s) for s in (0.25, 0.5)}
    return HeadFit(weights, -float(scale.mean @ weights), strength, apart, {**curve, round(kept * len(x)): apart})

"""How varied pictures are, and how far they are from the base's: functions of features, one a metric.

Shapes: n pictures, m reference pictures, d features each. Features are rows; what they were made with
(evaluation/features.py) belongs to every figure made from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist, pdist
from scipy.stats import entropy

from draftcli.metrics.statistics import Values, direction, has_interval, ratio

ENOUGH_KEPT = 0.8  # share of the base's diversity: a loss that is certain and goes below it is warned about
NEIGHBOURS = 5  # k of Jena et al. 2025 (AIG), eval_sdxl_draftp.py


@dataclass(frozen=True)
class DiversityKept:
    """How much of its base's diversity a network has kept; 1 is all of it.

    Attributes:
        share: of the base's.
        low: lower bound of the 95 % interval of the share; NaN where not known.
        high: upper bound.
    """

    share: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, base: Values, tuned: Values) -> DiversityKept | None:
        """From one value a prompt, (n,) each; None where the base has no diversity, or nothing is known."""
        found = ratio(base, tuned)
        return None if math.isnan(found.mean) else cls(found.mean, found.low, found.high)

    @property
    def direction(self) -> int:
        """1 or -1 where the network is more or less varied than the base beyond its interval; else 0."""
        return direction(self.low - 1, self.high - 1)

    @property
    def lost_much(self) -> bool:
        """Whether less than `ENOUGH_KEPT` is left and the loss is certain."""
        return self.share < ENOUGH_KEPT and self.direction < 0

    @property
    def words(self) -> str:
        """In percent, with the interval, such as "57 % (95 % interval 52 to 63)"."""
        if not has_interval(self.low, self.high):
            return f"{_percent(self.share)} % (no interval)"
        interval = f"95 % interval {_percent(self.low)} to {_percent(self.high)}"
        return f"{_percent(self.share)} % ({interval}{'' if self.direction else ', not distinguishable from the base'})"


def _percent(share: float) -> str:
    return f"{100 * share:#.3g}".rstrip(".") if abs(share) < 10 else f"{100 * share:.0f}"


def cosine_diversity(features: np.ndarray) -> float:
    """1 - mean pairwise cosine of (n, d), in [0, 2]; NaN for n < 2. As in ImageReFL (arXiv 2505.22569)."""
    return float(pdist(features, "cosine").mean()) if len(features) > 1 else float("nan")


def squared_diversity(features: np.ndarray) -> float:
    """2 / (n (n - 1)) sum_{i<j} |f_i - f_j|^2 of (n, d), in squared feature units; NaN for n < 2.

    Adjoint Matching, appendix G.4 (arXiv 2409.08861).
    """
    return float(pdist(features, "sqeuclidean").mean()) if len(features) > 1 else float("nan")


def vendi_score(features: np.ndarray) -> float:
    """The effective number of different pictures among (n, d), in [1, n]: exp(entropy of the eigenvalues of K / n).

    K = X X^T with rows of unit length (Friedman & Dieng 2023, arXiv 2210.02410). It grows with n: compare at equal n.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    # The non-zero eigenvalues of X X^T and X^T X are the same: take the smaller matrix.
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    return float(np.exp(entropy(np.linalg.eigvalsh(gram / len(unit)).clip(min=0))))


@dataclass(frozen=True)
class Neighbourhoods:
    """Per-picture terms whose means are the metrics.

    Attributes:
        precision: (n,) whether a sample lies in the ball of any reference picture.
        density: (n,) how many reference balls hold it, over k.
        recall: (m,) whether a reference picture lies in the ball of any sample.
        coverage: (m,) whether its own ball holds a sample.
    """

    precision: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    coverage: np.ndarray


def neighbourhoods(reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS) -> Neighbourhoods:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), strict <, as `prdc`.

    A picture's ball reaches to its k-th nearest neighbour of its own kind, itself not counted.

    Args:
        reference: (m, d) features of the base's pictures, m > k.
        samples: (n, d), n > k.
        k: neighbours.

    Raises:
        ValueError: fewer than k + 1 pictures.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"{len(reference)} and {len(samples)} images: neighbourhoods of {k} need at least {k + 1}")
    distance = cdist(reference, samples)
    reference_radius, sample_radius = _radii(reference, k), _radii(samples, k)
    in_reference = distance < reference_radius[:, None]
    return Neighbourhoods(
        precision=in_reference.any(0).astype(float),
        density=in_reference.sum(0) / k,
        recall=(distance < sample_radius[None]).any(1).astype(float),
        coverage=(distance.min(1) < reference_radius).astype(float),
    )


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance (n,) of each picture to its k-th nearest neighbour."""
    return np.partition(cdist(features, features), k, axis=1)[:, k]


def spectral_distance(reference: np.ndarray, samples: np.ndarray) -> float:
    """|| eig(cov(reference)) - eig(cov(samples)) ||_2, eigenvalues in order of size (Jena et al. 2025).

    The paper's code leaves the eigenvalues unsorted and may get complex ones; a covariance is symmetric, so here they
    are real and sorted.
    """
    return float(np.linalg.norm(_spectrum(reference) - _spectrum(samples)))


def log_spectral_distance(reference: np.ndarray, samples: np.ndarray) -> float:
    """The same on log10(eigenvalue + 1e-10), which weighs the small directions too."""
    logs = [np.log10(_spectrum(features).clip(min=0) + 1e-10) for features in (reference, samples)]
    return float(np.linalg.norm(logs[0] - logs[1]))


def _spectrum(features: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh(np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(reference: np.ndarray, samples: np.ndarray) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of (m, d) and (n, d) (FID, Heusel et al. 2017).

    To be called FID, features must be Inception's; on others it is the same distance in another space. Biased upwards
    where pictures are few: compare at equal n only.
    """
    shift = reference.mean(0) - samples.mean(0)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (reference, samples))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # (S_1 S_2)^(1/2) has the eigenvalues of (S_1^(1/2) S_2 S_1^(1/2))^(1/2), whose matrix is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(max(0.0, shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


def kernel_distance(reference: np.ndarray, samples: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (KID, Bińkowski et al. 2018); 0 expected for equals.

    All pictures at once; the paper averages subsets of them, which has the same expectation. Can be below 0.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    m, n = len(reference), len(samples)
    within = [kernel(x, x) for x in (reference, samples)]
    first, second = ((k.sum() - np.trace(k)) / (c * (c - 1)) for k, c in zip(within, (m, n), strict=True))
    return float(first + second - 2 * kernel(reference, samples).mean())

"""Scores that an evaluation has given to images, by what the images were made of.

`draftp eval` draws its images as `draftp sample` and `draftp anneal` do, so an image with the same hash is the same
image, and its scores hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from draftcli.sampling.embedded import read_key

EVALUATION = "eval"  # the folder of `draftp eval` in that of a run
_FILE = "metrics.json"


@dataclass(frozen=True)
class KnownScores:
    """What is known about a run's images.

    Attributes:
        by_key: scores by reward, for each hash of an image.
        judge: the reward that the evaluation went by; None where nothing is known.
    """

    by_key: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    judge: str | None = None

    def of(self, key: str) -> Mapping[str, float]:
        """The scores of the image with this hash; empty where there are none."""
        return self.by_key.get(key, {})


def known_scores(run: Path) -> KnownScores:
    """The scores in a run's evaluation; nothing where there is none, or it is not whole."""
    folder = run / EVALUATION
    found: dict[str, dict[str, float]] = {}
    try:
        data = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        for column in data["pictures"].values():
            for i, name in enumerate(column["files"]):
                scores = {reward: values[i] for reward, values in column["scores"].items()}
                key = read_key(folder / name, whole=False)
                if key:
                    found[key] = {reward: float(score) for reward, score in scores.items() if score is not None}
        return KnownScores(found, data["judge"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return KnownScores()

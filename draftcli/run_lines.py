"""What a line of validation.jsonl holds."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class StopRecord(TypedDict):
    """Why the monitor ended a run, and which step final/ is of."""

    why: str
    final: int


class ValidationLine(TypedDict):
    """A line of validation.jsonl.

    Figures are by name: base, tuned, difference, low and high of its interval, n; in the file null where not known.
    """

    step: int
    images: int
    rewards: dict[str, dict[str, float]]
    """Figures by reward, trained and held-out ones."""
    trained: NotRequired[dict[str, float]]
    """Figures of what the images count in the training: the trained rewards with their weights, targets, normalisation
    and combination, in units of the base's scores."""
    diversity: dict[str, float]
    """Figures of the mean distance of two pictures in pixels; also kept, kept_low and kept_high, as a share of the
    base's."""
    score: NotRequired[float]
    """How good the network is, by one number: what the best checkpoint is chosen by."""
    training_reward: NotRequired[float | None]
    """The mean reward in training since the validation before; null where it is not known, or where rewards are
    normalised by statistics that move."""
    signs: NotRequired[dict[str, dict[str, float]]]
    """Figures of the signs of metrics/signs.py, of near_duplicates, and of batch_spread, the deviation of the trained
    reward within a batch, of which base is that of the steps before the first validation."""
    alarm: NotRequired[str | None]
    """What looks like reward hacking, in words; null: nothing."""
    stopped: NotRequired[StopRecord]
    """The monitor ended the run here."""

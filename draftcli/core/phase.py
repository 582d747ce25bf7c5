"""The phases of a training step: what profilers, memory plans and benchmarks call them."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """A phase; its value is what people read."""

    TEXT = "text"
    """Prompts are encoded."""
    PREFIX = "prefix"
    """From noise to x_0 without gradient."""
    STEPS = "gradient steps"
    """Sampler steps forward with gradient."""
    BASE = "base pass"
    """The base at the same x, for the penalty."""
    DECODE = "decode"
    """x_0 becomes an image."""
    REWARD = "reward"
    """The reward looks at the image."""
    JUDGING = "backward of decoder and reward"
    """Stage one of the backward: d reward / d x_0."""
    BACKWARD = "backward of gradient steps"
    """Stage two of the backward: to the weights."""
    OPTIMIZER = "optimizer"
    """The update of the weights."""
    VALIDATION = "decode in validation"
    """Decoder and rewards without gradient."""
    ALL = "steps, decode, reward and backward"
    """STEPS to BACKWARD in one, without sharding.two_stage."""


JUDGING_PHASES = frozenset({Phase.DECODE, Phase.REWARD, Phase.JUDGING, Phase.VALIDATION})

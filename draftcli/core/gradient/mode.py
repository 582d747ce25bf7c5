"""What a gradient mode is: which sampler steps carry gradient, what they see, and what the reward sees.

A mode is one file here, found by its name in `draftp.gradient`; plans, memory, cards and benchmarks ask the mode
itself what it takes. See last_k.py for the shortest.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import nan
from pathlib import Path
from typing import Any, Protocol

from draftcli.config import Config, DraftpConfig
from draftcli.core.backward import Piece, Work
from draftcli.core.prefix import evaluations_per_step
from draftcli.core.rollout import Rollout
from draftcli.core.schedule import Level
from draftcli.errors import InputError

TRAINING_SAMPLERS = ("euler", "ddim", "euler_ancestral", "lcm")


@dataclass(frozen=True)
class Evaluations:
    """UNet evaluations an image in a training step, of the tuned network; a guided step takes two. Where a mode draws
    its steps, these are means over its draws.

    Attributes:
        without_gradient: forward passes alone.
        with_gradient: forward passes that are followed by a backward. The base, where it is asked, takes as many.
    """

    without_gradient: float
    with_gradient: float


class GradientMode(Protocol):
    """Cuts trajectories into pieces that carry gradient.

    Attributes:
        uses_k: whether draftp.truncation_steps says how many steps carry gradient.
        recomputes: whether it needs x_0 before the steps with gradient are run (backward.py: RecomputedSteps).
        pieces_per_image: pieces that a batch is cut into, each with all of its images.
        longest: steps with gradient in the longest piece, whose graph may be kept.
        like_last_k: whether its longest piece takes the memory of last_k's with as many steps.
        first: the earliest step that may carry gradient: up to there a prefix may take the place of the run's steps.
        asks_base: whether it needs the base whatever the penalty does.
        even: whether every image takes as many network calls as any other, whatever is drawn. FSDP needs it: each call
            gathers weights from all processes.
    """

    uses_k: bool
    recomputes: bool
    pieces_per_image: int
    longest: int
    like_last_k: bool
    first: int
    asks_base: bool
    even: bool

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """What is to be backpropagated of one rollout. Randomness belongs to the images' seeds."""
        ...

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """What an image takes.

        Args:
            per_step: (N,) evaluations of one network in each sampler step: 2 where it is guided, else 1.
            recompute: whether steps with gradient are walked once without (backward.py: RecomputedSteps).
        """
        ...

    def describe(self) -> str:
        """For model cards: what carries gradient, as in "gradient through the last 4 of 25 sampler steps"."""
        ...


def mode_names() -> list[str]:
    """The modes that there are: the files beside this one."""
    folder = Path(__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", Path(__file__).stem))


def make_mode(cfg: Config) -> GradientMode:
    """The mode that the settings name.

    Raises:
        InputError: no such mode, an option that it does not have or allow, a sampler that cannot carry gradient, or
            sharding or a prefix that cannot be combined with the mode.
    """
    check_sampler(cfg.sampling.sampler)
    name, mode = cfg.draftp.gradient_mode[0], named_mode(cfg)
    if mode.recomputes and not cfg.sharding.two_stage:
        raise InputError(f"draftp.gradient {name} needs sharding.two_stage true")
    if not mode.even and cfg.sharding.strategy == "fsdp":
        raise InputError(
            f"draftp.gradient {name} makes more network calls for some images than for others, and sharding.strategy "
            "fsdp needs the same in every process: use ddp, or another mode"
        )
    evaluations_per_step(cfg, mode.first)  # a prefix that cannot be is an error here
    return mode


def named_mode(cfg: Config) -> GradientMode:
    """The mode that `draftp.gradient` names, whether or not other sections go with it, as `make_mode` sees to.

    Raises:
        InputError: no such mode, or an option that it does not have or allow.
    """
    name, options = cfg.draftp.gradient_mode
    if name not in mode_names():
        raise InputError(f"draftp.gradient {name!r}: there is no such mode; available are {', '.join(mode_names())}")
    # last_k.py has LastK.
    factory: Any = getattr(import_module(f"draftcli.core.gradient.{name}"), name.title().replace("_", ""))
    known = [option for option in inspect.signature(factory).parameters if option not in ("total", "k")]
    if unknown := sorted(options.keys() - set(known)):
        allowed = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"draftp.gradient {name} has no option {unknown[0]!r}; {allowed}")
    return factory(total=cfg.sampling.steps, k=cfg.draftp.truncation_steps, **options)


def idle_beside_mode(cfg: Config, given: Collection[str] = ()) -> list[str]:
    """Settings that have no effect beside the gradient mode, each in one line; `config.without_effect` has the others.

    Args:
        cfg: the settings.
        given: dotted keys that somebody gave beside a recipe. Where the mode is one of them and K is not, K is the
            recipe's, for the recipe's mode, and nothing is said of it.

    Raises:
        InputError: as for `named_mode`.
    """
    name, mode, k = cfg.draftp.gradient_mode[0], named_mode(cfg), cfg.draftp.truncation_steps
    found: list[str] = []
    is_the_recipes = "draftp.gradient" in given or k == DraftpConfig().truncation_steps
    if not mode.uses_k and ("draftp.truncation_steps" in given or not is_the_recipes):
        found.append(
            f"draftp.truncation_steps {k} has no effect with draftp.gradient {name}, whose own options say which steps "
            "carry gradient"
        )
    if mode.recomputes and cfg.sharding.recompute_steps is False:
        found.append(f"sharding.recompute_steps false has no effect: gradient {name} recomputes")
    return found


def recomputes_steps(cfg: Config) -> bool:
    """Whether gradient steps run again in backward, as the settings ask or as their mode cannot do otherwise."""
    return Work.of(cfg, make_mode(cfg)).recompute


def at_once(level: Level) -> Level:
    """The level, with a step from there to the image: Euler's is the prediction x_0 = x - sigma eps."""
    return replace(level, sigma_next=0.0, timestep_next=None)


def check_count(mode: str, option: str, value: object, most: int) -> int:
    """An option that is a number of steps.

    Raises:
        InputError: it is no whole number from 1 to `most`.
    """
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"draftp.gradient {mode} has {option} {value!r}; it is a whole number from 1 to {most}")
    return value


def check_number(mode: str, option: str, value: object, low: float, high: float, above: bool = False) -> float:
    """An option that is a number from `low` to `high`; `above`: the lower end itself is not allowed.

    Raises:
        InputError: it is none.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else nan
    if low < number <= high or (number == low and not above):
        return number
    allowed = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
    raise InputError(f"draftp.gradient {mode} has {option} {value!r}; it is a number {allowed}")


def check_steps(mode: str, at: object, total: int) -> list[int]:
    """An option that names sampler steps, in order.

    Raises:
        InputError: it is no list of different steps of 0 .. total - 1.
    """
    if not isinstance(at, Sequence) or isinstance(at, str) or not at or any(type(i) is not int for i in at):
        raise InputError(f"draftp.gradient {mode} has at {at!r}; it is a list of sampler steps, such as [3, 12, 24]")
    if beyond := [i for i in at if not 0 <= i < total]:
        raise InputError(f"draftp.gradient {mode} has at {list(at)}: step {beyond[0]} is not among 0 .. {total - 1}")
    if len(set(at)) < len(at):
        raise InputError(f"draftp.gradient {mode} has at {list(at)}, in which a step is repeated")
    return sorted(at)


def check_not_drawn(mode: str, at: object, **how: object) -> None:
    """See that steps are not both named by `at` and drawn.

    Args:
        mode: its name.
        at: the named steps; None: they are drawn.
        how: the options that say how they are drawn; None: not given.

    Raises:
        InputError: they are.
    """
    given = [option for option, value in how.items() if value is not None]
    if at is not None and given:
        raise InputError(
            f"draftp.gradient {mode} has at, which names the steps, and {' and '.join(given)} for drawing them: leave "
            "out one or the other"
        )


def check_sampler(sampler: str) -> None:
    """See that a sampler can carry gradient: one network call a step, and none that looks back over a cut.

    Raises:
        InputError: it cannot.
    """
    if sampler not in TRAINING_SAMPLERS:
        others = f"{', '.join(TRAINING_SAMPLERS[:-1])} or {TRAINING_SAMPLERS[-1]}"
        raise InputError(
            f"sampling.sampler {sampler} generates images but cannot train; train with {others}, and generate with "
            f"draftp sample --sampler {sampler}"
        )

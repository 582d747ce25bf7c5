"""The weightings of Annealed Importance Guidance by their names. Without torch: a wrong name costs no import of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from draftcli.errors import InputError

# weighing_fn(sigma_i, sigma_next, i, total) -> weight of the tuned model in [0, 1]
Weighing = Callable[[float, float, int, int], float]
# the same as a function of progress i / total alone
Curve = Callable[[float], float]

KINDS = (
    "base, draft (or tuned), linear, cosine, power_P (P > 0), step_F (F in [0, 1]), constant_W (W in [0, 1]), "
    "interval_A_B (0 <= A <= B <= 1), reverse_KIND, package.module:function"
)


def linear(sigma: float, sigma_next: float, i: int, total: int) -> float:
    """i / total: 0 at the first step, (total - 1) / total at the last."""
    return i / total


def weighing(kind: str) -> Weighing:
    """The weighting named `kind`.

    Raises:
        InputError: an unknown kind, a number outside its range, or a function that cannot be had.
    """
    return named_weighing(kind)[1]


def named_weighing(kind: str) -> tuple[str, Weighing]:
    """The one name of a kind that can be written in several ways (draft is tuned, power_2.0 is power_2), and the
    weighting.

    Raises:
        InputError: as `weighing`.
    """
    if ":" in kind:
        return kind.replace(":", "."), _imported(kind)
    name, curve = _parse(kind)
    return name, _by_progress(curve)


def between_base_and_tuned(kinds: Sequence[str]) -> list[str]:
    """`kinds` with base before them and tuned after them, where they are not among them.

    Raises:
        InputError: as `weighing`.
    """
    names = {named_weighing(kind)[0] for kind in kinds}
    return [*(["base"] if "base" not in names else []), *kinds, *(["tuned"] if "tuned" not in names else [])]


def _parse(kind: str) -> tuple[str, Curve]:
    """A kind's one name, and its curve."""
    if kind.startswith("reverse_"):
        name, curve = _parse_forward(kind.removeprefix("reverse_"), kind)
        return f"reverse_{name}", lambda x: 1 - curve(x)
    return _parse_forward(kind, kind)


def _parse_forward(kind: str, given: str) -> tuple[str, Curve]:
    word, *texts = kind.split("_")
    name = "tuned" if word == "draft" else word
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    curve = _curve(name, numbers)
    if curve is None:
        raise InputError(f"unknown annealing weight {given!r}; known kinds: {KINDS}")
    return "_".join([name, *(f"{number:g}" for number in numbers)]), curve


def _curve(name: str, numbers: list[float]) -> Curve | None:  # noqa: PLR0911
    match name, numbers:
        case "base", []:
            return lambda x: 0.0
        case "tuned", []:
            return lambda x: 1.0
        case "linear", []:
            return lambda x: x
        case "cosine", []:
            return lambda x: (1 - math.cos(math.pi * x)) / 2
        case "power", [p] if 0 < p < math.inf:
            return lambda x: x**p
        case "step", [f] if 0 <= f <= 1:
            return lambda x: float(x >= f)
        case "constant", [w] if 0 <= w <= 1:
            return lambda x: w
        case "interval", [a, b] if 0 <= a <= b <= 1:
            return lambda x: float(a <= x < b)
    return None


def _by_progress(curve: Curve) -> Weighing:
    return lambda sigma, sigma_next, i, total: curve(i / total)


def _imported(kind: str) -> Weighing:
    module, _, name = kind.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # a console script does not look in the folder it is started from
    try:
        found: Any = getattr(import_module(module), name, None)
    except Exception as error:  # whatever a user's own module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"annealing weight {kind!r}: cannot import {module!r} ({reason})") from error
    if not callable(found):
        raise InputError(f"annealing weight {kind!r}: {module} has no function {name!r}")

    def weigh(sigma: float, sigma_next: float, i: int, total: int) -> float:
        try:
            weight: Any = found(sigma, sigma_next, i, total)
            return float(weight)
        except Exception as error:  # whatever a function of the user's can raise
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"annealing weight {kind!r} failed at step {i} of {total} ({reason})") from error

    return weigh

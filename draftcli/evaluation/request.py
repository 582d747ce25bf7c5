"""What `draftp eval` was asked for: found and checked before anything is loaded, and without torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draftcli.config import RewardSource, check_source, expand_home
from draftcli.core.models.places import check_model_files
from draftcli.core.weighings import named_weighing
from draftcli.errors import InputError
from draftcli.prompts import find_prompts
from draftcli.rewards import check_names, check_sources
from draftcli.sampling.names import INDEX
from draftcli.sampling.source import DrawingSource, find_source

DEFAULT_WEIGHTS = ("linear",)


@dataclass(frozen=True)
class Request:
    """What is to be compared, and by which judges.

    Attributes:
        names: runs, checkpoints of runs and folders of pictures; empty: the newest run. The first is the base's.
        weights: annealing weights, a column each for every run; base and tuned are always there.
        scales: scales of the LoRA, a column each for every run.
        prompts: a file, built-in set or dataset; None: the first run's validation prompts.
        images: pictures per prompt.
        seed: of a prompt's first picture; None: the first run's.
        rewards: judges beside those of the runs, all held out.
        features: of diversity; None: see `choose_features`.
        judge: reward of the Pareto front; None: the first held-out one.
        prefer: 1 wants the reward alone, 0 diversity alone.
        overrides: KEY=VALUE over the first run's settings.
        batch_size: pictures drawn together; None: by their size.
        output: folder; None: eval/ in the first run's.
    """

    names: Sequence[str] = ()
    weights: Sequence[str] = DEFAULT_WEIGHTS
    scales: Sequence[float] = ()
    prompts: str | None = None
    images: int = 4
    seed: int | None = None
    rewards: Sequence[str] = ()
    features: str | None = None
    judge: str | None = None
    prefer: float = 0.5
    overrides: Sequence[str] = ()
    batch_size: int | None = None
    output: Path | None = None


def command_line(request: Request) -> str:
    """The command that asks for the same, without what is at its default."""
    given = {
        "--weight": [] if tuple(request.weights) == DEFAULT_WEIGHTS else [",".join(request.weights)],
        "--lora-scale": [",".join(f"{scale:g}" for scale in request.scales)] if request.scales else [],
        "--prompts": [request.prompts],
        "--num-images": [None if request.images == Request.images else request.images],
        "--seed": [request.seed],
        "--reward": request.rewards,
        "--features": [request.features],
        "--judge": [request.judge],
        "--prefer": [None if request.prefer == Request.prefer else f"{request.prefer:g}"],
        "--batch-size": [request.batch_size],
        "--set": request.overrides,
        "--output": [request.output],
    }
    options = [(option, str(value)) for option, values in given.items() for value in values if value is not None]
    return shlex.join(["draftp", "eval", *request.names, *(part for pair in options for part in pair)])


def parse_scales(texts: Sequence[str]) -> list[float]:
    """Scales of a LoRA, as on the command line.

    Raises:
        InputError: one is not a number.
    """
    try:
        scales = [float(text) for text in texts]
        if all(map(math.isfinite, scales)):
            return scales
    except ValueError:
        pass
    raise InputError(f"--lora-scale {','.join(texts)}: expected numbers, such as --lora-scale 0.5,0.75")


def check_request(request: Request) -> None:
    """See that what was asked for exists and can be combined, before torch is imported for it.

    Raises:
        InputError: it does not, or cannot.
    """
    for kind in request.weights:
        named_weighing(kind)
    sources, _ = find_compared(request)
    find_judges(request, sources)
    features, _, weights = (request.features or "dinov2").partition("=")
    if features != "dinov2":
        check_names([features])
    if weights:
        check_source(f"--features {features}", expand_home(weights), "a folder or a hub id such as OWNER/NAME")
    for source in sources:
        check_model_files(source.cfg.model)
    if request.prompts is not None and sources:
        find_prompts(request.prompts, "--prompts")


def find_compared(request: Request) -> tuple[list[DrawingSource], list[Path]]:
    """The runs, all with the first one's sampling, and the folders of pictures.

    Raises:
        InputError: one does not exist, or there is nothing to compare.
    """
    folders = [Path(name) for name in request.names if (Path(name) / INDEX).is_file()]
    names: list[str | None] = [name for name in request.names if Path(name) not in folders]
    if not names and not folders:
        names = [None]
    if not names and request.scales:
        raise InputError("--lora-scale: only image folders were given, so no images can be generated; name a run too")
    if not names and len(folders) == 1:
        raise InputError(f"{folders[0]} has nothing to be compared with; name a second folder or a run")
    sources: list[DrawingSource] = []
    for name in names:
        sampling = {"sampling": sources[0].cfg.sampling.model_dump()} if sources else {}
        source = find_source(name, None, (), () if sources else request.overrides, sampling)
        if request.scales and not source.loras:
            raise InputError(f"--lora-scale: {source.name} was fully fine-tuned and has no LoRA to scale")
        sources.append(source)
    return sources, folders


def find_judges(request: Request, sources: Sequence[DrawingSource]) -> tuple[dict[str, RewardSource], dict[str, int]]:
    """Every judge with its settings, and those that were trained on as `trained_by` has them.

    The judges are in the order of the report: those that were trained on, held-out ones, those of weight 0, and those
    that were asked for beside them.

    Raises:
        InputError: nothing has that name, or nobody judges.
    """
    settings: dict[str, RewardSource] = {}
    for source in sources:
        settings |= source.cfg.rewards
    trained = trained_by(sources)
    rewards = {name: settings[name] for name in trained}
    for others in (*(source.cfg.held_out for source in sources), settings, dict.fromkeys(request.rewards)):
        rewards |= {
            name: settings.get(name) or setting or RewardSource()
            for name, setting in others.items()
            if name not in rewards
        }
    if not rewards:
        raise InputError("image folders have no rewards; name one, such as --reward pickscore")
    check_sources(rewards)
    if request.judge is not None and request.judge not in rewards:
        raise InputError(f"--judge {request.judge}: the rewards here are {', '.join(rewards)}; add it with --reward")
    return rewards, trained


def trained_by(sources: Sequence[DrawingSource]) -> dict[str, int]:
    """The rewards that any of the runs was trained on, by name: 1 where higher scores are wanted, -1 where lower. Where
    two runs want opposite ones, the first decides.
    """
    trained: dict[str, int] = {}
    for source in sources:
        trained |= {name: sign for name, sign in source.cfg.trained.items() if name not in trained}
    return trained


def opposite_aims(sources: Sequence[DrawingSource]) -> list[str]:
    """A sentence for each reward of which one run wants higher scores and another lower ones."""
    found = []
    for name, sign in trained_by(sources).items():
        first, *others = [source for source in sources if name in source.cfg.trained]
        if other := next((source for source in others if source.cfg.trained[name] != sign), None):
            one, opposite = ("higher", "lower") if sign > 0 else ("lower", "higher")
            found.append(
                f"{first.name} was trained towards {one} scores of {name} and {other.name} towards {opposite} ones: "
                f"{one} is taken for better, as the first run has it."
            )
    return found

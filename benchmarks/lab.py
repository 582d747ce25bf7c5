"""Experiments in the toy world as jobs: each is one file of results, written when it is done, and the same command goes
on where it was left. What estimators.py, held.py and others share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

HELD_OUT = 2  # pictures of each held-out caption
ANALYTIC = ("brightness", "saturation", "compressibility")


class Named(Protocol):
    """A job; it has to be picklable."""

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        ...


_Job = TypeVar("_Job", bound=Named)
Run = Callable[[_Job, Path], str]
"""run(job, folder) does a job in one of the processes, writes its file and returns a line about it."""


def file_of(job: Named, folder: Path) -> Path:
    """Where a job's results are, once it is done."""
    return folder / f"{job.name}.json"


def left(jobs: Iterable[_Job], folder: Path) -> list[_Job]:
    """The jobs that are not done yet."""
    return [job for job in jobs if not file_of(job, folder).is_file()]


def do_jobs(run: Run[_Job], groups: Iterable[Sequence[_Job]], folder: Path, processes: int, minutes: float) -> None:
    """Do the jobs of each group, in processes of one thread each, and print a line for each.

    Args:
        run: a function of a module.
        groups: each may need what the ones before have written, and is asked for when those are done.
        folder: of the jobs' files.
        processes: at work at a time.
        minutes: after so many no job is begun.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    until = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for group in groups:
            for line in pool.map(partial(_in_time, run, folder, until), group):
                print(line, flush=True)


def _in_time(run: Run[_Job], folder: Path, until: float, job: _Job) -> str:
    """The job, unless its time is over."""
    return run(job, folder) if time.monotonic() < until else f"{job.name}: left for the next time"


def write_json(path: Path, content: Any) -> None:
    """Write a file of results, whole or not at all, also where another process writes the same one."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.part")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


def gather(folder: Path) -> dict[str, Any]:
    """All jobs' results by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


# ------------------------------------------------------------------------------------------------------- training


def trainer_of(cfg: Any) -> Any:
    """A `Trainer` of a new model."""
    import draftcli
    from draftcli.core.draftp import SDXLDRaFTPModel
    from draftcli.core.image_weights import HeldOutGate
    from draftcli.prompts import read_prompts
    from draftcli.rewards import load_held_out
    from draftcli.training.step import Trainer

    model = SDXLDRaFTPModel(cfg)
    rewards: Any = draftcli.get_reward_model(cfg)
    model.reward_model = rewards
    if isinstance(model.penalty.weights, HeldOutGate):
        model.penalty.weights.held_out = load_held_out(cfg).rewards
    return Trainer(model, rewards, read_prompts(cfg.data.prompts))


def judge(model: Any, judges: Sequence[str] = ()) -> dict[str, Any]:
    """What 128 held-out pictures score, one value a picture, and each caption's diversity.

    Args:
        model: to draw with.
        judges: rewards to ask beside the learned one, the oracle and the analytic ones.
    """
    import torch

    from draftcli.metrics.diversity import cosine_diversity
    from draftcli.prompts import read_prompts
    from draftcli.rewards import load_reward
    from draftcli.sampling.draw import draw, plan
    from draftcli.toy.features import reading

    prompts = read_prompts(model.cfg.data.validation_prompts)
    pictures = plan(prompts, HELD_OUT, 99, (model.cfg.sampling.height, model.cfg.sampling.width))
    drawn = list(draw(model, pictures, "tuned", 64))
    images, texts = torch.cat([part for part, _ in drawn]), [text for _, some in drawn for text in some]
    with torch.no_grad():
        names = dict.fromkeys(["toy", "toy_oracle", *ANALYTIC, *judges])
        found = {n: load_reward(n)(images, texts).tolist() for n in names}
        features = reading()(images).double().numpy().reshape(len(prompts), HELD_OUT, -1)
    return {**found, "diversity": [cosine_diversity(rows) for rows in features]}


def judge_base(model: Any, file: Path) -> dict[str, Any]:
    """`judge` of a model that is not trained yet: the same for all runs that draw alike, which keep it in a file."""
    if not file.is_file():
        write_json(file, judge(model))
    return json.loads(file.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------- tables


def mean_over_seeds(some: Sequence[dict[str, Any]], point: int, key: str) -> np.ndarray:
    """One value a picture (or a caption, for diversity): the mean of the seeds."""
    return np.mean([run["curve"][point][key] for run in some], axis=0)


def curve(some: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """(points,) means over pictures and seeds."""
    return np.array([mean_over_seeds(some, i, key).mean() for i in range(len(some[0]["curve"]))])


def at_reward(some: Sequence[dict[str, Any]], reward: float, key: str) -> float:
    """A figure where the learned reward first reaches `reward`, between two points in proportion; NaN: it does not."""
    rewards = curve(some, "toy")
    values = np.array([p[key] for p in some[0]["curve"]]) if key == "evaluations" else curve(some, key)
    for i in range(1, len(rewards)):
        if rewards[i - 1] < reward <= rewards[i]:
            share = (reward - rewards[i - 1]) / (rewards[i] - rewards[i - 1])
            return float(values[i - 1] + share * (values[i] - values[i - 1]))
    return float("nan")


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def number(value: float, form: str = ".3f", otherwise: str = "not reached") -> str:
    """A figure of a table; NaN is `otherwise`."""
    return otherwise if np.isnan(value) else format(value, form)


def interval(value: float, low: float, high: float, form: str = ".3f") -> str:
    """A figure with its interval."""
    return f"{value:{form}} ({low:{form}} to {high:{form}})"

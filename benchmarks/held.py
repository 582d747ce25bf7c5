"""What holds a training back from reward hacking: every kind of penalty at equal steps, judged by the truth.

    python benchmarks/held.py runs/held                        everything that is not there yet, two processes
    python benchmarks/held.py runs/held --stage front --arm gate_3 --jobs 8
    python benchmarks/held.py runs/held --steps 4 --stage front --arm robust_1 --seeds 1      does it work at all

Each job is one file in OUTPUT/jobs, written when it is done; the same command goes on where it was left. At the end all
of them are gathered in OUTPUT/held.json, and their tables are written to OUTPUT/held.md and printed. Stages:

- `front`: every arm from the same start for STEPS steps of the recipe `toy`, with SEEDS seeds. Held-out captions are
  drawn and judged at each third: learned reward, oracle, diversity. The fixed coefficients are the front that the
  others have to beat, at equal steps and at equal learned reward.
- `scale`: a fixed coefficient and a target at each guidance scale of SCALES: does one setting hold alike at all? The
  runs at the recipe's scale are those of `front`.

The gate asks JUDGE, and `min` trains on it beside the learned reward. The oracle is asked by nobody but the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab import (
    at_reward,
    curve,
    do_jobs,
    file_of,
    gather,
    head,
    interval,
    judge,
    left,
    mean_over_seeds,
    number,
    trainer_of,
    write_json,
)

JUDGE = "toy_judge"  # imperfect, but not fooled by all that fools the learned reward
FIXED = (0, 3, 12, 30)  # draftp.kl_coeff; that of the recipe is 12
TARGET = 0.2  # what the recipe ends at
GATED = [f"held_out_rewards=[{JUDGE}]", "draftp.kl_gate=held_out"]
LEAST = [f"rewards={{toy: {{normalise: std}}, {JUDGE}: {{normalise: std}}}}", "draftp.combine=min"]
ARMS: dict[str, list[str]] = {
    **{f"fixed_{kl}": [f"draftp.kl_coeff={kl}"] for kl in FIXED},
    "target": ["draftp.kl_coeff=12", f"draftp.kl_target={TARGET}"],
    **{f"gate_{kl}": [f"draftp.kl_coeff={kl}", *GATED] for kl in (3, 12)},
    **{f"by_reward_{kl}": [f"draftp.kl_coeff={kl}", "draftp.kl_by_reward=true"] for kl in (3, 12)},
    **{f"robust_{rho}": ["draftp.kl_coeff=3", f"rewards.toy.robust={rho}"] for rho in (0.1, 1)},
    **{f"min_{kl}": [f"draftp.kl_coeff={kl}", *LEAST] for kl in (3, 12)},
}
OF_SCALE = ("fixed_12", "target")
SCALES = (3.0, 5.0, 7.5)
STAGES = ("front", "scale")
STEPS, POINTS, SEEDS = 90, 3, 3


@dataclass(frozen=True)
class Run:
    """One training, and one file of results.

    Attributes:
        stage: see above.
        arm: of ARMS.
        seed: of the training.
        steps: of the optimizer.
        scale: of the guidance, in training and in drawing.
    """

    stage: str
    arm: str
    seed: int
    steps: int = STEPS
    scale: float = 5.0

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.stage, self.arm, *([f"scale{self.scale:g}"] if self.stage == "scale" else []), f"seed{self.seed}"]
        return "-".join([*parts, *([] if self.steps == STEPS else [f"{self.steps}steps"])])


def runs_of(stage: str, arms: Sequence[str], seeds: int = SEEDS, steps: int = STEPS) -> list[Run]:
    """The runs of a stage."""
    if stage == "front":
        return [Run(stage, arm, seed, steps) for seed in range(seeds) for arm in arms]
    some = [arm for arm in arms if arm in OF_SCALE]
    kinds = [("front" if scale == Run.scale else stage, scale) for scale in SCALES]
    return [Run(kind, arm, seed, steps, scale) for seed in range(seeds) for arm in some for kind, scale in kinds]


def do(run: Run, folder: Path) -> str:
    """Train in one thread, judge held-out pictures on the way, and write the file."""
    import torch

    import draftcli
    from draftcli.cli.console import open_console

    torch.set_num_threads(1)
    open_console(quiet=True, debug=False)
    began = time.perf_counter()
    settings = [*ARMS[run.arm], f"sampling.scale={run.scale}", f"trainer.max_steps={run.steps}"]
    cfg = draftcli.load_config("toy", [*settings, f"trainer.seed={1234 + run.seed}", "model.device=cpu"])
    trainer = trainer_of(cfg)
    points: list[dict[str, Any]] = [{"steps": 0, **judge(trainer.model, [JUDGE])}]
    lines: list[dict[str, Any]] = []
    for step in range(1, run.steps + 1):
        lines.append(trainer.step(step))
        if step * POINTS // run.steps > (step - 1) * POINTS // run.steps:
            with trainer.ema.in_place() if trainer.ema else contextlib.nullcontext():
                points.append({"steps": step, **judge(trainer.model, [JUDGE])})
    kept = ("reward", "kl_penalty", "kl_coeff", "kl_weight", "seconds")
    training = [{key: line[key] for key in kept if key in line} for line in lines]
    took = time.perf_counter() - began
    write_json(file_of(run, folder), {**asdict(run), "curve": points, "training": training, "job_seconds": took})
    return f"{run.name}: {took:.0f} s"


# ----------------------------------------------------------------------------------------------------------- tables


def found_of(results: dict[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Those of the runs that are done."""
    return [results[run.name] for run in runs if run.name in results]


def last_penalty(some: Sequence[dict[str, Any]]) -> float:
    """The mean penalty of the last third of the training."""
    lines = [line for run in some for line in run["training"][-(len(run["training"]) // 3 or 1) :]]
    return float(np.mean([line["kl_penalty"] for line in lines]))


def ends(some: Sequence[dict[str, Any]]) -> list[str]:
    """Learned reward and oracle where the training ends, less what the base has, and diversity as a share of the
    base's, with intervals over captions; and the penalty.
    """
    from draftcli.metrics.statistics import paired, ratio

    cells: list[str] = []
    for key, form in (("toy", "+.2f"), ("toy_oracle", "+.3f")):
        base, tuned = (mean_over_seeds(some, point, key) for point in (0, -1))
        captions = len(some[0]["curve"][0]["diversity"])
        groups = np.repeat(np.arange(captions), len(base) // captions)
        change = paired(base, tuned, groups)
        cells.append(interval(change["difference"], change["low"], change["high"], form))
    kept = ratio(*(mean_over_seeds(some, point, "diversity") for point in (0, -1)))
    return [*cells, interval(kept.mean, kept.low, kept.high, ".0%"), f"{last_penalty(some):.4f}"]


def tables(results: dict[str, Any], seeds: int, steps: int) -> Iterator[str]:
    """Markdown, of what is done."""
    arms = {arm: found_of(results, runs_of("front", [arm], seeds, steps)) for arm in ARMS}
    arms = {arm: some for arm, some in arms.items() if some}
    if arms:
        # The reward that all but a quarter of the arms reach.
        reward = float(np.quantile([curve(some, "toy").max() for some in arms.values()], 0.25))
        there = [f"{what} at a learned reward of {reward:.2f}" for what in ("oracle", "diversity")]
        yield from head("arm", "learned reward", "oracle", "diversity", "penalty", *there)
        for arm, some in arms.items():
            kept = at_reward(some, reward, "diversity") / curve(some, "diversity")[0]
            equal = [number(at_reward(some, reward, "toy_oracle")), number(kept, ".0%")]
            yield f"| `{arm}` | {' | '.join([*ends(some), *equal])} |"
        yield ""
    scales = [
        (arm, scale, found_of(results, [run for run in runs_of("scale", [arm], seeds, steps) if run.scale == scale]))
        for arm in OF_SCALE
        for scale in SCALES
    ]
    if any(some for _, _, some in scales):
        yield from head("arm", "guidance", "learned reward", "oracle", "diversity", "penalty")
        for arm, scale, some in scales:
            if some:
                yield f"| `{arm}` | {scale:g} | {' | '.join(ends(some))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--stage", action="append", choices=STAGES, help="these alone; may be given several times")
    parser.add_argument("--arm", action="append", choices=[*ARMS], help="these alone; may be given several times")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each arm")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="after so many no training is begun")
    options = parser.parse_args()
    folder = options.output / "jobs"
    stages, arms = options.stage or STAGES, options.arm or [*ARMS]
    groups = (left(runs_of(stage, arms, options.seeds, options.steps), folder) for stage in stages)
    do_jobs(do, groups, folder, options.jobs, options.minutes)
    results = gather(folder)
    write_json(options.output / "held.json", results)
    text = "\n".join(tables(results, options.seeds, options.steps)) + "\n"
    (options.output / "held.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

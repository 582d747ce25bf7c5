"""Levers that leave evaluations out, judged by what training with them reaches: python benchmarks/levers_lab.py OUTPUT

The toy world by the method of the SDXL recipe (N 25, guidance 5, K 1), from the recipe `toy` in all else. Each arm is
trained by SEEDS seeds with the learning rates named, for as many UNet evaluations as STEPS steps of the plain arm take
(forward 1, backward 2, the base's included), and judges the same 128 held-out pictures after STEPS steps, which is at
equal steps, and at the end, which is at equal evaluations. Pictures are drawn on the run's own grid for all arms.

Each job is one file in OUTPUT, written when it is done, one after the other in one thread; the same command goes on
where it was left. At the end, and with `--table` alone, it prints the tables of docs/benchmarks.md. Seconds are of the
processor, in training steps alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from estimators import image_cost
from lab import HELD_OUT, at_reward, head, interval, judge, judge_base, number, trainer_of, write_json

METHOD = ["sampling.steps=25", "draftp.truncation_steps=1", "model.device=cpu"]
PLAIN = "plain"
ARMS: dict[str, list[str]] = {
    PLAIN: [],
    "prefix_10": ["draftp.prefix_steps=10"],
    "reuse_4": ["draftp.reuse=4", "trainer.micro_batch_size=2"],
    "prefix_10_reuse_4": ["draftp.prefix_steps=10", "draftp.reuse=4", "trainer.micro_batch_size=2"],
    "reuse_2": ["draftp.reuse=2", "trainer.micro_batch_size=4"],
    "prefix_10_detached": ["draftp.prefix_steps=10", "draftp.detach_uncond=true"],
    "prefix_12": ["draftp.prefix_steps=12"],
}
RATES = (1e-3, 3e-3)  # the first is the recipe's
FASTER = (PLAIN, "reuse_2", "reuse_4")  # with the second as well
SEEDS = 3
STEPS = 30


@dataclass(frozen=True)
class Job:
    """One file of results: an arm of ARMS, a learning rate of RATES, and the seed of the run."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm}-{self.rate:g}-seed{self.seed}"


def all_jobs() -> list[Job]:
    """The most important ones first."""
    first = [Job(arm, RATES[0], seed) for arm in ARMS for seed in range(SEEDS)]
    return [*first, *(Job(arm, RATES[1], seed) for arm in FASTER for seed in range(SEEDS))]


def settings_of(job: Job) -> Any:
    """The settings of a job's training."""
    import draftcli

    return draftcli.load_config(
        "toy", [*METHOD, *ARMS[job.arm], f"optim.lr={job.rate}", f"trainer.seed={1234 + job.seed}"]
    )


def train(job: Job, base: Path) -> dict[str, Any]:
    """Train an arm and judge it; `base` keeps what the untrained model scores, which is the same for all."""
    cfg = settings_of(job)
    cost = image_cost(cfg) * cfg.trainer.global_batch_size
    plain = image_cost(settings_of(Job(PLAIN, job.rate, job.seed))) * cfg.trainer.global_batch_size
    trainer = trainer_of(cfg)
    curve = [{"steps": 0, "evaluations": 0.0, "seconds": 0.0, **judge_base(trainer.model, base)}]
    last, seconds = round(STEPS * plain / cost), 0.0
    for step in range(1, last + 1):
        began = time.process_time()
        trainer.step(step)
        seconds += time.process_time() - began
        if step in (STEPS, last):
            with trainer.ema.in_place() if trainer.ema else contextlib.nullcontext():
                curve.append({"steps": step, "evaluations": step * cost, "seconds": seconds, **judge(trainer.model)})
    return {"evaluations_an_image": image_cost(cfg), "curve": curve}


# -------------------------------------------------------------------------------------------------------- the tables


def tables(folder: Path) -> list[str]:
    """Of what there is."""
    from draftcli.metrics.statistics import paired, ratio

    def runs(arm: str, rate: float) -> list[dict[str, Any]]:
        files = [folder / f"{Job(arm, rate, seed).name}.json" for seed in range(SEEDS)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]

    def mean(some: list[dict[str, Any]], at: int, key: str) -> np.ndarray:
        return np.mean([run["curve"][at][key] for run in some], axis=0)

    lines: list[str] = []
    for rate in RATES:
        plain = runs(PLAIN, rate)
        arms = {arm: some for arm in ARMS if (some := runs(arm, rate))}
        if not plain:
            continue
        end = float(mean(plain, -1, "toy").mean())
        for title, at in ((f"after {STEPS} steps", 1), ("at equal evaluations", -1)):
            lines += head(
                f"{title}, rate {rate:g}", "seeds", "steps", "learned reward", "less plain's", "oracle",
                "less plain's", "diversity, of plain's",
            )  # fmt: skip
            for arm, some in arms.items():
                same = plain[: len(some)]
                cells = [f"{len(some)}", f"{some[0]['curve'][at]['steps']}"]
                for key in ("toy", "toy_oracle"):
                    before, after = mean(same, -1, key), mean(some, at, key)
                    found = paired(before, after, np.repeat(np.arange(len(after) // HELD_OUT), HELD_OUT))
                    cells.append(f"{found['tuned']:.3f}")
                    less = interval(found["difference"], found["low"], found["high"], "+.3f")
                    cells.append("" if arm == PLAIN else less)
                kept = ratio(mean(same, -1, "diversity"), mean(some, at, "diversity"))
                cells.append("" if arm == PLAIN else f"{kept.mean:.0%} ({kept.low:.0%} to {kept.high:.0%})")
                lines.append(f"| {arm} | {' | '.join(cells)} |")
            lines.append("")
        lines += head(f"to {end:.2f}, rate {rate:g}", "an image", "evaluations", "of plain's", "seconds", "of plain's")
        for arm, some in arms.items():
            needed = at_reward(some, end, "evaluations")
            whole, costs = plain[0]["curve"][-1]["evaluations"], [run["curve"][-1] for run in some]
            each = sum(point["seconds"] for point in costs) / sum(point["evaluations"] for point in costs)
            of_plain = sum(run["curve"][-1]["seconds"] for run in plain) / len(plain)
            cells = [
                f"{some[0]['evaluations_an_image']:g}",
                number(needed, ",.0f"),
                number(needed / whole, ".0%", ""),
                number(needed * each, ".0f", ""),
                number(needed * each / of_plain, ".0%", ""),
            ]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> None:
    """Do what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arm", action="append", choices=[*ARMS], help="these alone; may be given several times")
    parser.add_argument("--minutes", type=float, default=1e9, help="after so many no job is begun")
    parser.add_argument("--table", action="store_true", help="of what there is; nothing is trained")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    left = [job for job in all_jobs() if job.arm in (options.arm or ARMS)]
    for job in [] if options.table else left:
        file = options.output / f"{job.name}.json"
        if not file.is_file() and time.monotonic() < began + 60 * options.minutes:
            one(job, file)
    print("\n".join(tables(options.output)))


def one(job: Job, file: Path) -> None:
    """Do a job in one thread, and write its file."""
    import torch

    from draftcli.cli.console import open_console

    torch.set_num_threads(1)
    open_console(quiet=True, debug=False)
    began = time.perf_counter()
    write_json(file, train(job, file.with_name("base.json")))
    print(f"{job.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

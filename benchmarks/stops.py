"""The monitor put to the test in the toy world: does it end runs that are hacked, in time, and no others?

    python benchmarks/stops.py runs/stops                  everything that is not there yet, two processes
    python benchmarks/stops.py runs/stops --jobs 14        on more cores
    python benchmarks/stops.py runs/stops --job hacked_1   this one alone; may be given several times

Ten runs are made to be hacked (no penalty or a weak one, and rates that are high), ten to be sound. Half of each were
chosen while the rule was made, and the others after it was frozen: `frozen` below. Every run goes on to its end
(monitor.stop=never), is validated every EVERY steps, and the oracle scores the same pictures. The monitor is then asked
after each validation as in a run, by the lines that the run wrote, from which the oracle is taken out first: so one run
gives both the step of the stop and what would have come after. What is held out is a learned reward that the run is not
trained on.

Each job is one file in OUTPUT/jobs, written when it is done; the same command goes on where it was left. At the end
OUTPUT/stops.json has all of them, and OUTPUT/stops.md the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

EVERY = 5
ORACLE = "toy_oracle"
TOO_LATE = 0.02  # of the oracle under its own peak
TOY, JUDGE = "rewards={toy: 1.0}", "rewards={toy_judge: 1.0}"


@dataclass(frozen=True)
class StopJob:
    """A run.

    Attributes:
        name: of its file.
        is_hacked: what it is made to be.
        frozen: it was chosen after the rule was frozen.
        settings: what differs from the recipe `toy`; the first names what it is trained on.
        held_out: the reward that the monitor may ask.
    """

    name: str
    is_hacked: bool
    frozen: bool
    settings: tuple[str, ...]
    held_out: str


def _hacked(number: int, frozen: bool, seed: int, *settings: str, held_out: str = "toy_judge") -> StopJob:
    return StopJob(f"hacked_{number}", True, frozen, (*settings, f"trainer.seed={seed}"), held_out)


def _sound(number: int, frozen: bool, seed: int, *settings: str, held_out: str = "toy_judge") -> StopJob:
    return StopJob(f"sound_{number}", False, frozen, (*settings, f"trainer.seed={seed}"), held_out)


FREE, FAST, ONE_STEP = "draftp.kl_coeff=0", "optim.lr=3e-3", "draftp.truncation_steps=1"
LATE = "draftp.gradient={mode: sparse, steps: 2, tail: 0.4, rescale: 0}"
JOBS = (
    # Shapes and places go first where a learned reward is climbed, colours and shapes where an analytic one is.
    _hacked(1, False, 1234, TOY, FREE),
    _hacked(2, False, 1, TOY, FREE, FAST),
    _hacked(3, False, 2, TOY, FREE, "draftp.truncation_steps=10"),
    _hacked(4, False, 3, TOY, FREE, FAST, "draftp.gradient=refl"),
    _hacked(5, False, 4, "rewards={saturation: 1.0}", FREE, held_out="toy"),
    _hacked(6, True, 21, TOY, FREE, "draftp.gradient=random_k"),
    _hacked(7, True, 22, TOY, "draftp.kl_coeff=1", FAST),
    _hacked(8, True, 23, JUDGE, FREE, held_out="toy"),
    _hacked(9, True, 24, "rewards={symmetry: 1.0}", FREE, held_out="toy"),
    _hacked(10, True, 25, "rewards={compressibility: 1.0}", FREE, held_out="toy"),
    _sound(1, False, 1234, TOY),
    _sound(2, False, 11, TOY),
    _sound(3, False, 12, TOY, ONE_STEP, FAST),
    _sound(4, False, 13, TOY, LATE, FAST),
    _sound(5, False, 14, JUDGE, "draftp.kl_coeff=40", held_out="toy"),
    _sound(6, True, 31, TOY),
    _sound(7, True, 32, TOY, "draftp.gradient=refl", FAST),
    _sound(8, True, 33, TOY, "draftp.truncation_steps=1", "draftp.low_variance_samples=2"),
    _sound(9, True, 34, TOY, "draftp.prefix_steps=4"),
    _sound(10, True, 35, JUDGE, ONE_STEP, held_out="toy"),
)


def run(job: StopJob, output: Path) -> str:
    """Train in one thread, and write the job's file."""
    import torch

    import draftcli
    from draftcli.runs import Run

    torch.set_num_threads(1)
    began = time.perf_counter()
    settings = [*job.settings, f"held_out_rewards=[{job.held_out}, {ORACLE}]", "monitor.stop=never"]
    settings += [f"trainer.val_check_interval={EVERY}", "trainer.save_interval=60", "logging.trackers=[]"]
    settings += ["model.device=cpu", f"data.validation_cache={output / 'base'}"]
    folder = output / "runs" / job.name
    draftcli.train(draftcli.load_config("toy", settings), folder)
    lines = Run(folder).validations()
    _write(
        output / "jobs" / f"{job.name}.json", {**asdict(job), "lines": lines, "seconds": time.perf_counter() - began}
    )
    return f"{job.name}: {time.perf_counter() - began:.0f} s"


@dataclass(frozen=True)
class Replayed:
    """What the monitor would have done in a run.

    Attributes:
        stop: the step it would have ended at; None: it would not have.
        final: the step that final/ would have been written from; where it would not have ended, the last.
        why: the alarm.
        oracle: by step.
    """

    stop: int | None
    final: int
    why: str
    oracle: dict[int, float]

    @property
    def peak(self) -> int:
        """The step at which the oracle was highest."""
        return max(self.oracle, key=self.oracle.__getitem__)

    def lost(self, step: int) -> float:
        """How far the oracle is under its peak at `step`."""
        return self.oracle[self.peak] - self.oracle[step]


def replay(result: dict[str, Any], patience: int | None = None) -> Replayed:
    """Ask the monitor after each validation, as in a run with monitor.stop=hacking, without the oracle.

    Args:
        result: the content of a job's file.
        patience: monitor.patience; None: the default.
    """
    from draftcli.config import MonitorConfig
    from draftcli.training.monitor import Monitor

    given = {} if patience is None else {"patience": patience}
    trained = {name: 1.0 for name in result["lines"][0]["rewards"] if name not in (result["held_out"], ORACLE)}
    monitor = Monitor(MonitorConfig.model_validate({"stop": "hacking", **given}), trained, [result["held_out"]])
    oracle = {line["step"]: line["rewards"][ORACLE]["tuned"] for line in result["lines"]}
    seen = copy.deepcopy(result["lines"])
    for line in seen:
        del line["rewards"][ORACLE]
    for i in range(1, len(seen) + 1):
        verdict = monitor.judge(seen[:i])
        if verdict.stops:
            return Replayed(seen[i - 1]["step"], verdict.final, verdict.alarm or "", oracle)
    return Replayed(None, seen[-1]["step"], "", oracle)


def table(results: Sequence[dict[str, Any]], patience: int | None = None) -> str:
    """Markdown: a row for each run, then what became of the runs of each kind."""
    head = "| run | chosen | settings | held out | oracle: base | peak (step) | last | stop | oracle there | final/ of "
    head += "| its oracle, under the peak |"
    rows = [head, "|" + "---|" * 11]
    for result in results:
        found = replay(result, patience)
        oracle = found.oracle
        stop = ["none", ""] if found.stop is None else [f"{found.stop}", f"{oracle[found.stop]:.3f}"]
        cells = [
            result["name"].replace("_", " "), "after" if result["frozen"] else "before",
            ", ".join(f"`{setting}`" for setting in result["settings"]), result["held_out"], f"{oracle[0]:.3f}",
            f"{oracle[found.peak]:.3f} ({found.peak})", f"{oracle[max(oracle)]:.3f}", *stop, f"{found.final}",
            f"{oracle[found.final]:.3f}, {found.lost(found.final):.3f}",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *_summary(results, patience)])


def _summary(results: Sequence[dict[str, Any]], patience: int | None) -> list[str]:
    lines = []
    for frozen in (False, True):
        when = "after the rule was frozen" if frozen else "while the rule was made"
        of_kind = {
            h: [replay(r, patience) for r in results if (r["is_hacked"], r["frozen"]) == (h, frozen)]
            for h in (True, False)
        }
        hacked, sound = of_kind[True], of_kind[False]
        stopped = [found for found in hacked if found.stop is not None]
        in_time = [found for found in stopped if found.lost(found.final) <= TOO_LATE]
        at_stop = [found for found in stopped if found.stop is not None and found.lost(found.stop) <= TOO_LATE]
        alarms = [found for found in sound if found.stop is not None]
        lines.append(
            f"- Chosen {when}: of {len(hacked)} hacked runs {len(stopped)} were ended, {len(in_time)} of them with a "
            f"final/ whose oracle is at most {TOO_LATE} under its peak, and {len(at_stop)} before it was more at the "
            f"stop itself; of {len(sound)} sound ones {len(alarms)} were ended."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--job", action="append", choices=[job.name for job in JOBS], help="these alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = options.output / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in JOBS if job.name in (options.job or [job.name for job in JOBS])]
    left = [job for job in chosen if not (folder / f"{job.name}.json").is_file()]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for line in pool.map(run, left, [options.output] * len(left)):
            print(line, flush=True)
    there = [folder / f"{job.name}.json" for job in JOBS]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in there if path.is_file()]
    _write(options.output / "stops.json", results)
    parts = [f"monitor.patience={p}\n\n{table(results, p)}\n" for p in (1, 2)]
    (options.output / "stops.md").write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


def _write(path: Path, content: Any) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()

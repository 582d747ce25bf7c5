"""The gradient modes compared in the toy world: against the exact gradient, and against the truth.

    python benchmarks/estimators.py runs/estimators              everything that is not there yet, two processes
    python benchmarks/estimators.py runs/estimators --jobs 14    on more cores
    python benchmarks/estimators.py runs/estimators --stage sweep --arm last_k_1 --arm sparse

Each job is one file in OUTPUT/jobs, written when it is done; the same command goes on where it was left. At the end all
of them are gathered in OUTPUT/estimators.json, from which benchmarks/estimators_page.py makes the tables and the plot
of docs/estimators.md. Stages, in this order:

- `fidelity`: gradients in float64 of PAIRS captions and seeds, by each mode with DRAWS draws of its own randomness, and
  exactly (last_k with K = N), at the untouched LoRA and at one that the recipe has trained half way. Reward alone, no
  penalty: they are estimators of the reward's gradient.
- `sweep`: every arm from the same start with each learning rate of RATES, seed 0, a third of the budget; the rate with
  the highest learned reward on held-out captions is taken, which is what a user without an oracle can see.
- `final`: with that rate, SEEDS seeds, the whole budget, held-out pictures at each third of it.
- `hacking`: the same without a penalty (draftp.kl_coeff 0), the modes of HACKED, one seed.

The budget is in UNet evaluations, forward 1 and backward 2, the base's passes included: that of the recipe `toy`, 60
steps of eight images with K = 4. So an arm with cheaper steps takes more of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab import do_jobs, file_of, gather, judge, judge_base, left, trainer_of, write_json

ARMS: dict[str, list[str]] = {
    "last_k_1": ["draftp.truncation_steps=1"],
    "last_k_4": ["draftp.truncation_steps=4"],
    "last_k_10": ["draftp.truncation_steps=10"],
    "low_variance": ["draftp.truncation_steps=1", "draftp.gradient={mode: low_variance, samples: 2}"],
    "random_k": ["draftp.gradient=random_k"],
    "refl": ["draftp.gradient=refl"],
    "drtune": ["draftp.gradient=drtune"],
    "sparse": ["draftp.gradient=sparse"],
    "sparse_late": ["draftp.gradient={mode: sparse, steps: 2, tail: 0.4, rescale: 0}"],
    "matching": ["draftp.gradient=matching", "draftp.kl_coeff=0"],
    "matching_300": ["draftp.gradient={mode: matching, scale: 300}", "draftp.kl_coeff=0"],
    "last_k_1_detached": ["draftp.truncation_steps=1", "draftp.detach_uncond=true"],
    "last_k_4_detached": ["draftp.truncation_steps=4", "draftp.detach_uncond=true"],
    "last_k_1_prefix_5": ["draftp.truncation_steps=1", "draftp.prefix_steps=5"],
    "last_k_4_prefix_4": ["draftp.truncation_steps=4", "draftp.prefix_steps=4"],
}
EXACT = "last_k_10"  # K = N
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = 3
PAIRS, DRAWS = 64, 2
# Without a penalty: those whose reward rises enough for it to be fooled, and the first.
HACKED = ("last_k_1", "last_k_4", "random_k", "refl", "sparse")


@dataclass(frozen=True)
class Job:
    """One file of results.

    Attributes:
        stage: see above.
        arm: of ARMS.
        seed: of the run, or of nothing.
        rate: learning rate; None: the sweep's best, known once the sweep is done.
        half_way: fidelity alone: at the LoRA trained half way.
    """

    stage: str
    arm: str
    seed: int = 0
    rate: float | None = None
    half_way: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.stage, self.arm]
        parts += ["half"] if self.half_way else []
        parts += (
            [f"{self.rate:g}"] if self.stage == "sweep" else [f"seed{self.seed}"] if self.stage != "fidelity" else []
        )
        return "-".join(parts)


def jobs_of(stage: str, arms: Sequence[str]) -> list[Job]:
    """The jobs of a stage, the most expensive arms first."""
    if stage == "fidelity":
        return [Job(stage, arm, half_way=half) for half in (False, True) for arm in arms if "prefix" not in arm]
    if stage == "sweep":
        return [Job(stage, arm, rate=rate) for arm in arms for rate in RATES]
    if stage == "hacking":
        return [Job(stage, arm) for arm in arms if arm in HACKED]
    return [Job(stage, arm, seed=seed) for seed in range(SEEDS) for arm in arms]


STAGES = ("fidelity", "sweep", "final", "hacking")


# ------------------------------------------------------------------------------------------------------- training


def budget_of_the_recipe() -> float:
    """UNet evaluations of the recipe `toy`, backward passes counted twice."""
    import draftcli

    cfg = draftcli.load_config("toy", [])
    return image_cost(cfg) * cfg.trainer.global_batch_size * cfg.trainer.max_steps


def image_cost(cfg: Any) -> float:
    """UNet evaluations of an image in training: forward 1, backward 2, the base's passes included."""
    from draftcli.planning.plan import count_evaluations

    counts = count_evaluations(cfg)
    return counts["forward"] + counts["base"] + 2 * counts["with_gradient"]


def train(job: Job, budget: float, points: int, base: Path) -> dict[str, Any]:
    """Train an arm, and judge held-out pictures at `points` equal shares of the budget; `base` keeps the base's."""
    import draftcli

    settings = [*ARMS[job.arm], f"optim.lr={job.rate}", f"trainer.seed={1234 + job.seed}", "model.device=cpu"]
    if job.stage == "hacking":
        settings += ["draftp.kl_coeff=0"]
    cfg = draftcli.load_config("toy", settings)
    cost = image_cost(cfg) * cfg.trainer.global_batch_size
    steps = round(budget / cost)
    trainer = trainer_of(cfg)
    model = trainer.model
    stops = {max(1, round(steps * (i + 1) / points)) for i in range(points)}
    curve: list[dict[str, Any]] = [] if job.stage == "sweep" else [{"steps": 0, "evaluations": 0.0, "seconds": 0.0}]
    if curve:
        curve[0] |= judge_base(model, base)
    seconds = 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        trainer.step(step)
        seconds += time.perf_counter() - began
        if step in stops:
            with trainer.ema.in_place() if trainer.ema else contextlib.nullcontext():
                curve.append({"steps": step, "evaluations": step * cost, "seconds": seconds, **judge(model)})
    return {"evaluations_an_image": image_cost(cfg), "curve": curve}


# ------------------------------------------------------------------------------------------------------- fidelity


class FixedStart:
    """Networks whose walks start from given noise, so that a batch's seeds decide the mode's own draws alone."""

    def __init__(self, nets: Any, x: Any) -> None:
        self.nets, self.x = nets, x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.nets, name)

    def start(self, batch: Any) -> Any:
        """x_T, whatever the seeds are."""
        return self.x


def gradients(job: Job, draws: int, half_way: Path) -> Any:
    """(pairs, draws, weights) float32: d reward / d weights by the arm, each pair's own, computed in float64."""
    import torch

    import draftcli
    from draftcli.core.backward import Work
    from draftcli.core.batch import Batch, derived_seed
    from draftcli.core.draftp import SDXLDRaFTPModel, training_step
    from draftcli.prompts import read_prompts

    settings = [*ARMS[job.arm], "draftp.kl_coeff=0", "draftp.log_kl=false", "model.precision=fp64", "model.device=cpu"]
    cfg = draftcli.load_config("toy", [*settings, "trainer.micro_batch_size=1", "trainer.global_batch_size=1"])
    model = SDXLDRaFTPModel(cfg)
    reward: Any = draftcli.get_reward_model(cfg)
    model.reward_model = reward.to(torch.float64)
    if job.half_way:
        load_half_way(model, half_way)
    prompts, size = read_prompts(cfg.data.validation_prompts), (cfg.sampling.height, cfg.sampling.width)
    found: list[Any] = []
    for pair in range(PAIRS):
        text = prompts[pair % len(prompts)].text
        start = model.networks.start(Batch([text], [derived_seed("pair", pair)], size))
        nets: Any = FixedStart(model.networks, start)
        rows: list[Any] = []
        for draw in range(draws):
            batch = Batch([text], [derived_seed("draw", pair, draw)], size)
            work = Work.of(cfg, model.mode)
            training_step(nets, reward, model.mode, model.penalty, model.sampler, batch, work)
            weights = model.trainable_parameters
            rows.append(torch.cat([-p.grad.flatten() for p in weights if p.grad is not None]).float())
            model.unet.zero_grad(set_to_none=True)
        found.append(torch.stack(rows))
    return torch.stack(found)


def load_half_way(model: Any, file: Path) -> None:
    """The LoRA that half of the recipe's steps make: trained by the first that needs it."""
    from safetensors.torch import load_file, save_file

    import draftcli
    from draftcli.core.lora.adapters import load_lora_state_dict, lora_state_dict

    if not file.is_file():
        cfg = draftcli.load_config("toy", ["model.device=cpu"])
        trainer = trainer_of(cfg)
        for step in range(1, cfg.trainer.max_steps // 2 + 1):
            trainer.step(step)
        save_file({name: t.contiguous() for name, t in lora_state_dict(trainer.model.unet).items()}, file)
    load_lora_state_dict(model.unet, load_file(file))


def is_random(arm: str) -> bool:
    """Whether an arm's gradient depends on draws of its own."""
    return not arm.startswith("last_k")


def fidelity(job: Job, exact: Path) -> dict[str, Any]:
    """How an arm's gradients lie to the exact ones, pair by pair, and by their sums."""
    import torch

    began = time.perf_counter()
    g = gradients(job, DRAWS if is_random(job.arm) else 1, exact.with_name("half-way.safetensors"))
    seconds = time.perf_counter() - began
    if job.arm == EXACT:
        torch.save(g[:, 0], exact)
    true = torch.load(exact, weights_only=True)
    mean = g.mean(1)
    cosines = torch.cosine_similarity(mean.double(), true.double(), dim=1)
    ratios = mean.double().norm(dim=1) / true.double().norm(dim=1)
    # The mode's own variance, as a share of the squared norm of what it expects.
    own = (g - mean[:, None]).double().square().sum(2).sum(1) / max(1, g.shape[1] - 1)
    gram = mean.double() @ true.double().T
    return {
        "cosine": cosines.tolist(),
        "ratio": ratios.tolist(),
        "own_variance": (own / mean.double().square().sum(1)).tolist() if g.shape[1] > 1 else None,
        # For the cosine of the sum over any resampled set of pairs.
        "gram": gram.tolist(),
        "gram_mode": (mean.double() @ mean.double().T).tolist(),
        "gram_exact": (true.double() @ true.double().T).tolist() if job.arm == EXACT else None,
        "seconds_a_gradient": seconds / (PAIRS * g.shape[1]),
    }


# ----------------------------------------------------------------------------------------------------------- jobs


def run(job: Job, folder: Path) -> str:
    """Do a job in one thread, and write its file."""
    import torch

    from draftcli.cli.console import open_console

    torch.set_num_threads(1)
    open_console(quiet=True, debug=False)
    began = time.perf_counter()
    if job.stage == "fidelity":
        result = fidelity(job, folder / f"exact-{'half' if job.half_way else 'start'}.pt")
    else:
        whole = budget_of_the_recipe()
        share, points = (1 / 3, 1) if job.stage == "sweep" else (1, 3)
        result = train(job, whole * share, points, folder.parent / "base.json")
    write_json(file_of(job, folder), {**asdict(job), **result, "job_seconds": time.perf_counter() - began})
    return f"{job.name}: {time.perf_counter() - began:.0f} s"


def best_rate(arm: str, folder: Path) -> float | None:
    """The sweep's rate with the highest learned reward; None: the sweep is not done."""
    found: dict[float, float] = {}
    for job in jobs_of("sweep", [arm]):
        file = folder / f"{job.name}.json"
        if not file.is_file():
            return None
        scores = json.loads(file.read_text(encoding="utf-8"))["curve"][-1]["toy"]
        assert job.rate is not None
        found[job.rate] = sum(scores) / len(scores)
    return max(found, key=lambda rate: found[rate])


def waiting(stages: Sequence[str], arms: Sequence[str], folder: Path) -> Iterator[list[Job]]:
    """What is to be done, in groups that need what the group before has written."""
    for stage in stages:
        jobs = left(jobs_of(stage, arms), folder)
        if stage == "fidelity":
            yield [job for job in jobs if job.arm == EXACT]
            yield [job for job in jobs if job.arm != EXACT]
        elif stage == "sweep":
            yield jobs
        else:
            rated = [Job(job.stage, job.arm, job.seed, best_rate(job.arm, folder)) for job in jobs]
            yield [job for job in rated if job.rate is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--stage", action="append", choices=STAGES, help="these alone; may be given several times")
    parser.add_argument("--arm", action="append", choices=[*ARMS], help="these alone; may be given several times")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="after so many no job is begun")
    options = parser.parse_args()
    folder = options.output / "jobs"
    groups = waiting(options.stage or STAGES, options.arm or [*ARMS], folder)
    do_jobs(run, groups, folder, options.jobs, options.minutes)
    write_json(options.output / "estimators.json", gather(folder))


if __name__ == "__main__":
    main()

"""How far a prefix of its own is from the exact latents at the first gradient step: python benchmarks/prefix.py

The toy base draws held-out captions with the method of the SDXL recipe (N 25, guidance 5, K 1). The exact x_K is that
of `--fine` Heun steps between the same two noise levels; an error is the distance from it as a share of its norm, a
mean over the pictures and the worst of them. The first row is what training takes without draftp.prefix_steps. `--set`
changes any setting, `--images` the number of captions, `--sampler` and `--steps` what is tried.
"""

from __future__ import annotations

import argparse

import torch
from meter import quiet_console

from draftcli.config import load_config
from draftcli.core.batch import Batch
from draftcli.core.denoise import SOLVERS, Prefix
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.prefix import evaluations_per_step, prefix_levels
from draftcli.prompts import read_prompts

METHOD = ["sampling.steps=25", "sampling.scale=5", "draftp.truncation_steps=1"]


@torch.no_grad()
def main() -> None:
    """Walk each way, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--fine", type=int, default=400, help="Heun steps of the exact solution")
    parser.add_argument("--sampler", nargs="+", default=["dpmpp_2m", "heun", "euler"], choices=[*SOLVERS])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 6, 8, 10, 12, 16, 24])
    options = parser.parse_args()
    cfg = load_config(options.preset, [*METHOD, *options.set])
    model, console = SDXLDRaFTPModel(cfg), quiet_console()
    first = model.mode.first
    size = (cfg.sampling.height, cfg.sampling.width)
    prompts = read_prompts(cfg.data.validation_prompts)[: options.images]
    seeds = list(range(cfg.trainer.seed, cfg.trainer.seed + len(prompts)))
    batch = Batch([prompt.text for prompt in prompts], seeds, size, [prompt.negative for prompt in prompts])
    starts = [(model.networks.start(part), model.encode(part)) for part in batch.split(8)]

    def walked(prefix: Prefix | None) -> torch.Tensor:
        ends = []
        for x, cond in starts:
            tuned = model.networks.tuned(cond)
            ends.append(model.sampler.walk(tuned, x, stop=first) if prefix is None else prefix.walk(tuned, x))
        return torch.cat(ends).double().flatten(1)

    def prefix(sampler: str, steps: int) -> Prefix:
        return Prefix(prefix_levels(model.schedule, first, steps), SOLVERS[sampler], first)

    with model.networks.without_gradient():
        exact = walked(prefix("heun", options.fine))
        console.print(f"| sampler | prefix steps | UNet evaluations | error of x_K | worst of {len(exact)} |")
        console.print("|---|---|---|---|---|")
        rows = [("own grid", None), *((sampler, steps) for sampler in options.sampler for steps in options.steps)]
        for sampler, steps in rows:
            changed = [] if steps is None else [f"draftp.prefix_sampler={sampler}", f"draftp.prefix_steps={steps}"]
            evaluations = evaluations_per_step(load_config(options.preset, [*METHOD, *options.set, *changed]), first)
            found = walked(None if steps is None else prefix(sampler, steps))
            errors = (found - exact).norm(dim=1) / exact.norm(dim=1)
            console.print(
                f"| {f'{cfg.sampling.sampler}, the run' if steps is None else sampler} | {steps or first} | "
                f"{sum(evaluations[:first])} | {float(errors.mean()):.3f} | {float(errors.max()):.3f} |"
            )


if __name__ == "__main__":
    main()

"""What processes send each other per optimizer step, against what they compute: worked out, not measured.

    python benchmarks/communication.py

prints the table of docs/sharding.md, which has the formulas. Parameters are counted from the shipped SDXL
configuration on the meta device; the rest are the presets' settings and the constants below.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from draftcli.config import Config, load_config
from draftcli.planning.plan import make_plan

EVALUATION = 6.76e12  # FLOP of one UNet evaluation of one picture at 1024 x 1024, forward
RATE = 400e12  # FLOP/s that a GPU is assumed to keep up in bfloat16: about 40 % of an H100's peak
HALF, SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """Of one GPU and one optimizer step.

    Attributes:
        near: bytes that it receives inside the group that splits one copy.
        far: bytes that it receives from the other copies.
        seconds: of computing, at RATE.
    """

    near: float
    far: float
    seconds: float


def traffic(cfg: Config, ranks: int, images: int, shard_size: int | None) -> Traffic:
    """What one of `ranks` GPUs receives for `images` pictures of its own.

    Args:
        cfg: a recipe for SDXL.
        ranks: GPUs in all.
        images: per GPU and step.
        shard_size: GPUs that split one copy; None: each has a whole one (ddp).
    """
    plan = make_plan(cfg)
    trained = plan.trainable
    full = cfg.peft.peft_scheme == "none"
    unet = trained if full else plan.frozen["unet"] + trained
    n, k = cfg.sampling.steps, cfg.draftp.truncation_steps
    micro = cfg.trainer.micro_batch_size
    backwards = images // micro * k
    prefix = ceil(images / max(micro, cfg.sharding.prefix_batch_size or 8)) * (n - k)
    base = backwards if cfg.draftp.needs_base else 0
    group = shard_size or 1
    inside, copies = (group - 1) / group, ranks // group
    # Every call gathers the weights, a backward gathers them again and scatters the gradient's sums.
    near = inside * (HALF * unet * (prefix + base + 2 * backwards) + SINGLE * trained * backwards)
    # Ring all-reduce of what each holds: ddp once a step, hybrid sharding once a backward.
    far = 2 * (copies - 1) / copies * SINGLE * trained / group * (backwards if shard_size else 1)
    # Forward, base, and with gradient: the recomputed forward and the backward, which costs one or two forwards.
    evaluations = 2 * (n + (k if base else 0) + k * (1 + (2 if full else 1)))
    return Traffic(near, far, images * evaluations * EVALUATION / RATE)


def main() -> None:
    """Print the table."""
    ways = [("ddp", 8, None), ("ddp", 64, None), ("fsdp", 8, 8), ("fsdp", 64, 64), ("fsdp, shard_size 8", 64, 8)]
    print("| | GPUs | way | received within a copy's GPUs | from other copies | computing | hidden at |")
    print("|---|---|---|---|---|---|---|")
    for preset in ("sdxl-lora", "sdxl-full"):
        for way, ranks, size in ways:
            t = traffic(load_config(preset), ranks, 2, size)
            needs = [f"{x / t.seconds / 1e9:.3g} GB/s" for x in (t.near, t.far) if x]
            print(
                f"| {preset} | {ranks} | {way} | {t.near / 1e9:.3g} GB | {t.far / 1e9:.3g} GB | {t.seconds:.2f} s "
                f"| {' + '.join(needs)} |"
            )


if __name__ == "__main__":
    main()

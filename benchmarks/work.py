"""What each lever and gradient mode leaves to compute, at SDXL's real size, without running: python benchmarks/work.py

One row a way to train, beside plain_loop.py: UNet evaluations an image, TFLOP by what they are for, and the bytes that
go to the GPU in a step (draftcli/planning/ledger.py). Nothing is loaded, and no GPU is needed. Prompts are not counted,
which the plain loop encodes in every step: a tenth of a TFLOP. `--preset` and `--set` change what is counted,
`--baselines FILE` writes the figures of the toy model that tests/benchmarks/test_work.py holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from meter import quiet_console

from draftcli.config import Config, load_config
from draftcli.core.phase import JUDGING_PHASES, Phase
from draftcli.planning.ledger import RATES, make_ledger
from draftcli.planning.memory import memory_plan
from draftcli.planning.plan import configuration_folder

# The plain loop: every image by itself, the LoRA beside the weights, one backward, activations recomputed.
PLAIN = ["sharding.two_stage=false", "sharding.fold_lora=false", "sharding.activation_checkpointing=true"]
OWN = ["draftp.prefix_steps=null"]  # the run's own steps before the gradient: in all ways but the recipe as it is
WAYS: dict[str, list[str]] = {
    "plain loop": PLAIN,
    "as it is": [],
    "the run's own steps": [],
    "activations kept": ["sharding.activation_checkpointing=false"],
    "offloaded": ["sharding.offload=true"],
    "LoRA folded": ["model.precision=fp32", "sharding.fold_lora=true"],
    "no penalty, not logged": ["draftp.kl_coeff=0", "draftp.log_kl=false"],
    "guided in 60 % of the steps": ["sampling.guidance_interval=[0.2,0.8]"],
    "draftp.detach_uncond": ["draftp.detach_uncond=true"],
    "draftp.prefix_steps 12": ["draftp.prefix_steps=12"],
    "draftp.prefix_steps 10": ["draftp.prefix_steps=10"],
    "draftp.reuse 2": ["draftp.reuse=2"],
    "draftp.reuse 4": ["draftp.reuse=4"],
    "prefix 10, reuse 2": ["draftp.prefix_steps=10", "draftp.reuse=2"],
    "prefix 10, reuse 4": ["draftp.prefix_steps=10", "draftp.reuse=4"],
    "prefix 10, detach_uncond": ["draftp.prefix_steps=10", "draftp.detach_uncond=true"],
    "K = 4": ["draftp.truncation_steps=4"],
    "K = 4, prefix 10": ["draftp.truncation_steps=4", "draftp.prefix_steps=10"],
    "low_variance": ["draftp.gradient={mode: low_variance, samples: 2}"],
    "low_variance, prefix 10": ["draftp.gradient={mode: low_variance, samples: 2}", "draftp.prefix_steps=10"],
    "refl": ["draftp.gradient=refl"],
    "refl, prefix 8, reuse 4": ["draftp.gradient=refl", "draftp.prefix_steps=8", "draftp.reuse=4"],
    "refl, prefix 8": ["draftp.gradient=refl", "draftp.prefix_steps=8"],
    "random_k": ["draftp.gradient=random_k"],
    "drtune": ["draftp.gradient=drtune"],
    "sparse": ["draftp.gradient=sparse"],
    "matching": ["draftp.gradient=matching"],
}
OF_THE_TOY = [
    "as it is",
    "draftp.prefix_steps 10",
    "activations kept",
    "low_variance, prefix 10",
    "prefix 10, reuse 4",
    "plain loop",
]


def figures(cfg: Config) -> dict[str, float]:
    """Figures that no machine changes, by name: evaluations and FLOP of an image, and bytes at the peak of a step."""
    folder = configuration_folder(cfg)
    ledger = make_ledger(cfg, folder)
    return {
        "UNet evaluations forward": ledger.forward,
        "UNet evaluations backward": ledger.evaluations[Phase.BACKWARD],
        "GFLOP": ledger.total / 1e9,
        "MB at the peak": memory_plan(cfg, folder).peak / 1e6,
    }


def of_the_toy(way: str) -> dict[str, float]:
    """`figures` of the toy model by the method of the SDXL recipe, one image per backward."""
    method = ["sampling.steps=25", "draftp.truncation_steps=1", "trainer.micro_batch_size=1", "model.device=cpu"]
    return figures(load_config("toy", [*method, "sharding.activation_checkpointing=true", *WAYS[way]]))


def main() -> None:
    """Print the table, or write the baselines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sdxl-lora")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--baselines", type=Path, metavar="FILE")
    options = parser.parse_args()
    console = quiet_console(width=160)
    if options.baselines:
        found = {f"toy, {way}": of_the_toy(way) for way in OF_THE_TOY}
        options.baselines.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    rates = ", ".join(map(str, RATES))
    console.print(
        f"| way | UNet evaluations forward | backward | prefix TFLOP | gradient steps TFLOP | decoder, reward TFLOP | "
        f"all TFLOP | of the plain loop | s at {rates} TFLOP/s | GB to the GPU a step |\n|{'---|' * 10}"
    )
    plain = None
    for way, settings in WAYS.items():
        own = [] if way == "as it is" else OWN
        cfg = load_config(options.preset, [*options.set, *own, *settings])
        ledger = make_ledger(cfg, configuration_folder(cfg))
        plain = plain or ledger.total
        judging = sum(flop for phase, flop in ledger.flop.items() if phase in JUDGING_PHASES)
        gradient = ledger.total - ledger.flop[Phase.PREFIX] - judging
        seconds = ", ".join(f"{ledger.total / 1e12 / rate:.2f}" for rate in RATES)
        tera = " | ".join(f"{flop / 1e12:.0f}" for flop in (ledger.flop[Phase.PREFIX], gradient, judging, ledger.total))
        console.print(
            f"| {way} | {ledger.forward:.4g} | {ledger.evaluations[Phase.BACKWARD]:.4g} | {tera} | "
            f"{ledger.total / plain:.2f} | {seconds} | {ledger.moved / 1e9:.1f} |"
        )


if __name__ == "__main__":
    main()

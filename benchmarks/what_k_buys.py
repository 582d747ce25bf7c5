"""What each K buys, attribute by attribute: python benchmarks/what_k_buys.py --truncation-steps 1 2 5 10

Trains the toy preset once for each K and lets the oracle explain base and tuned pictures of the held-out captions.
Prints a Markdown table for docs/toy-world.md. `--set` changes any setting, as in `draftp train`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from meter import quiet_console

from draftcli.cli.console import literal_console
from draftcli.config import Config, load_config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.prompts import read_prompts
from draftcli.rewards import load_reward
from draftcli.sampling.draw import draw, plan
from draftcli.toy import oracle
from draftcli.training.checkpoint import load_weights
from draftcli.training.loop import train


@torch.no_grad()
def measure(model: SDXLDRaFTPModel, kind: str, images: int) -> dict[str, float]:
    """Means over the held-out captions: learned reward, oracle, every attribute, share with everything right."""
    cfg = model.cfg
    pictures = plan(
        read_prompts(cfg.data.validation_prompts), images, cfg.trainer.seed, (cfg.sampling.height, cfg.sampling.width)
    )
    parts = list(draw(model, pictures, kind, 64))
    drawn, prompts = torch.cat([image for image, _ in parts]), [text for _, texts in parts for text in texts]
    table = oracle.attributes(drawn, prompts)
    return {
        "learned reward": float(load_reward("toy")(drawn, prompts).mean()),
        "oracle": float(oracle.weigh(table).mean()),
        "all right": float(oracle.correct(drawn, prompts).float().mean()),
        **dict(zip(oracle.CRITERIA, table.nanmean(0).tolist(), strict=True)),
    }


def tune(cfg: Config) -> tuple[SDXLDRaFTPModel, float]:
    """Train, and load what came out; the seconds that the training took."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(cfg, run, literal_console(quiet=True))
        seconds = time.perf_counter() - began
        model = SDXLDRaFTPModel(cfg)
        load_weights(model, run / "final")
    return model, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truncation-steps", type=int, nargs="+", default=[1, 2, 5, 10], metavar="K")
    parser.add_argument("--images", type=int, default=2, help="pictures of every caption")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    console, columns = quiet_console(), dict[str, dict[str, float]]()
    for k in options.truncation_steps:
        own = [f"draftp.truncation_steps={k}", "trainer.val_check_interval=0"]
        model, seconds = tune(load_config("toy", options.overrides + own))
        if not columns:
            columns["base"] = measure(model, "base", options.images)
        columns[f"K = {k}"] = {**measure(model, "tuned", options.images), "seconds": seconds}
        console.print(f"K = {k} is done")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in columns[f"K = {options.truncation_steps[0]}"]:
        cells = [f"{column[row]:.3f}" if row in column else "" for column in columns.values()]
        print(f"| {row.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""The table of docs/annealing.md: python benchmarks/annealing.py runs/toy (a few minutes on two cores).

Draws 32 held-out captions with 8 seeds each in every column, and prints, as Markdown, what each costs and gains: the
learned reward, the oracle, and how far apart the pictures of one caption are. Differences are to the base, with the
paired bootstrap 95 % interval over pictures. Pictures are kept beside the run, so that a second call only judges.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from draftcli.metrics.thumbnails import pairwise_distance, thumbnail
from draftcli.pictures import open_picture
from draftcli.prompts import read_prompts
from draftcli.rewards import load_reward
from draftcli.sampling.draw import Column, plan
from draftcli.sampling.files import File, write_pictures
from draftcli.sampling.load import load_source
from draftcli.sampling.source import find_source
from draftcli.training.validation import paired

KINDS = (
    "base",
    "power_4",
    "power_2",
    "step_0.6",
    "linear",
    "cosine",
    "constant_0.5",
    "interval_0.2_0.8",
    "reverse_linear",
    "reverse_step_0.6",
    "tuned",
)
BY_CHANCE = ("linear", "constant_0.5")
SCALES = (0.5,)


def to_tensor(file: File) -> Tensor:
    return torch.from_numpy(np.array(open_picture(file.path))).permute(2, 0, 1).float() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run of the toy world")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--images", type=int, default=8, help="per prompt")
    parser.add_argument("--rewards", nargs="+", default=["toy", "toy_oracle"])
    options = parser.parse_args()

    source = find_source(options.run, None, ())
    prompts = list(itertools.islice(read_prompts(source.cfg.data.validation_prompts), options.prompts))
    size = (source.cfg.sampling.height, source.cfg.sampling.width)
    pictures = plan(prompts, options.images, source.cfg.trainer.seed, size)
    columns = [Column.of(kind) for kind in KINDS] + [Column.of(kind, stochastic=True) for kind in BY_CHANCE]
    columns += [Column.scaled(scale) for scale in SCALES] if source.loras else []
    folder = Path(options.run) / "annealing-benchmark"
    model = load_source(source)
    written = write_pictures(model, columns, pictures, folder, progress=lambda count: print(".", end="", flush=True))
    print(f"\n{len(prompts)} prompts x {options.images} seeds, {model.cfg.sampling.steps} steps\n")

    rewards = {name: load_reward(name) for name in options.rewards}
    groups = [row[0].number for row in written.rows()]
    texts = [row[0].picture.prompt.text for row in written.rows()]
    scores: dict[tuple[str, str], np.ndarray] = {}
    distances: dict[str, float] = {}
    for i, column in enumerate(columns):
        images = torch.stack([to_tensor(row[i]) for row in written.rows()])
        distances[column.name] = float(np.nanmean(pairwise_distance(thumbnail(images), groups)))
        with torch.no_grad():
            for name, reward in rewards.items():
                parts = [reward(images[at : at + 64], texts[at : at + 64]) for at in range(0, len(texts), 64)]
                scores[column.name, name] = torch.cat(parts).double().numpy()

    print("| kind | UNet evaluations |", " | ".join(rewards), "| distance |")
    print("|---|---|" + "---|" * len(rewards) + "---|")
    for column in columns:
        cells = []
        for name in rewards:
            figures = paired(scores["base", name], scores[column.name, name])
            gain = f" ({figures['low']:+.3f} to {figures['high']:+.3f})" if column.name != "base" else ""
            cells.append(f"{figures['tuned']:.3f}{gain}")
        price = written.evaluations[column.name]
        print(f"| {column.name} | {price} | {' | '.join(cells)} | {distances[column.name]:.4f} |")


if __name__ == "__main__":
    main()

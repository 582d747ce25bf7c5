"""Reward hacking made visible: a long run without KL beside one with, learned reward and oracle over steps.

python benchmarks/hacking.py train runs/hacking     # two runs that validate as they go
python benchmarks/hacking.py plot runs/hacking      # runs/hacking/reward-hacking.png; needs the extra `plots`
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from draftcli.runs import Run

KL = {"without KL": 0, "with the recipe's KL, 12": 12}


def train(folder: Path, steps: int) -> None:
    for kl in KL.values():
        settings = [
            f"draftp.kl_coeff={kl}", f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={max(1, steps // 8)}", "data.validation_images=1", "monitor.stop=never",
        ]  # fmt: skip
        options = [part for setting in settings for part in ("--set", setting)]
        command = ["train", "--preset", "toy", *options, "--output", str(folder / f"kl-{kl}")]
        subprocess.run([sys.executable, "-m", "draftcli", *command], check=True)


def plot(folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for label, kl in KL.items():
        validations = Run(folder / f"kl-{kl}").validations()
        steps = [v["step"] for v in validations]
        for axis, reward in zip(axes, ("toy", "toy_oracle"), strict=True):
            figures = [v["rewards"][reward] for v in validations]
            (line,) = axis.plot(steps, [f["difference"] for f in figures], "o-", label=label)
            low, high = ([f[end] for f in figures] for end in ("low", "high"))
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    for axis, title in zip(axes, ("learned reward, trained on", "oracle, never seen"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="difference to base")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.legend()
    figure.savefig(folder / "reward-hacking.png", dpi=120)
    print(folder / "reward-hacking.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "plot"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    train(given.folder, given.steps) if given.step == "train" else plot(given.folder)

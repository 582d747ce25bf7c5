"""Draw a run's curves: python benchmarks/plot_run.py runs/toy curve.png (needs the extra `plots`).

Above: every reward's validation means, tuned and base, with the paired 95 % interval. Below: the trained reward and the
KL penalty of every step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from draftcli.runs import Run


def main(run: Path, target: Path) -> None:
    steps, validations = Run(run).steps(), Run(run).validations()
    names = list(validations[0]["rewards"])
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, constrained_layout=True)
    at = [v["step"] for v in validations]
    for axis, name in zip(axes[0], names, strict=False):
        figures = [v["rewards"][name] for v in validations]
        base = figures[0]["base"]
        axis.axhline(base, color="grey", linestyle="--", label="base")
        axis.plot(at, [f["tuned"] for f in figures], "o-", label="tuned")
        axis.fill_between(at, [base + f["low"] for f in figures], [base + f["high"] for f in figures], alpha=0.2)
        axis.set_title(f"{name}, held-out captions")
        axis.legend()
    x = [s["step"] for s in steps]
    axes[1][0].plot(x, [s["reward"] for s in steps])
    axes[1][0].set_title("reward of each training step")
    axes[1][1].plot(x, [s["kl_penalty"] for s in steps])
    axes[1][1].set_title("KL penalty")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

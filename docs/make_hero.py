"""Draw README's first picture from an evaluation of the demo's run, and print the figures of its caption.

    draftp train --preset toy && draftp eval runs/toy
    python docs/make_hero.py runs/toy/eval docs/images/toy-sheet.png

The pairs are chosen by a rule, not by eye: all pairs of base and tuned are sorted by how much the held-out judge
changed, and one is taken from the middle of each of `PAIRS` equal parts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from draftcli.sampling.sheet import Cell, write_sheet

PAIRS = 12


def at_quantiles(change: np.ndarray, count: int) -> list[int]:
    """Which of n pairs lie in the middle of each of `count` equal parts, sorted by `change` (n,), the lowest first."""
    middles = (np.arange(count) + 0.5) / count
    return np.argsort(change, kind="stable")[np.floor(middles * len(change)).astype(int)].tolist()


def caption(data: dict, name: str, word: str) -> str:
    """How much a reward changed over all pairs."""
    base, figure = data["figures"]["base"][f"reward/{name}"], data["figures"]["tuned"][f"reward/{name}"]
    change, low, high = (figure[key] for key in ("difference", "difference_low", "difference_high"))
    wins = f"higher in {100 * figure['win_rate']:.1f} % of pairs"
    interval = f"95 % interval {low:+.3g} to {high:+.3g}"
    return f"{word} {base['value']:.3g} -> {figure['value']:.3g}: {change:+.3g}, {interval}, {wins}"


def main(evaluation: Path, target: Path) -> None:
    """Write the picture to `target`."""
    data = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    judge, trained = data["judge"], data["trained"][0]
    names = {trained: "learned reward", judge: "oracle"}
    columns = [data["pictures"][name] for name in ("base", "tuned")]
    change = np.subtract(*(np.array(column["scores"][judge]) for column in reversed(columns)))
    cells = []
    for i in at_quantiles(change, PAIRS):
        images = [Image.open(evaluation / column["files"][i]).convert("RGB") for column in columns]
        notes = [f"learned {c['scores'][trained][i]:.2f}  oracle {c['scores'][judge][i]:.2f}" for c in columns]
        cells.append(Cell(images, data["items"][i]["prompt"], notes))
    title = f"base (left) and tuned (right): {PAIRS} of {len(change)} pairs"
    write_sheet(
        target, cells, title, edge=192, note="sorted by the oracle's change, one from the middle of each twelfth"
    )
    print("\n".join(caption(data, name, word) for name, word in names.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

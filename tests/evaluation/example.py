"""A small comparison with known properties: twelve prompts, five seeds, five galleries of drawn circles.

tuned gains the trained reward `toy` and loses the held-out `toy_oracle` and most of its diversity; linear gains both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from draftcli.evaluation.compare import ColumnComparison, compare
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.outputs import write_outputs
from draftcli.evaluation.pictures import Gallery, Item
from draftcli.evaluation.report import About
from draftcli.metrics.signs import SIGNS
from draftcli.metrics.thumbnails import thumbnail

NASTY = "<script>document.title='hacked'</script> & \"quotes\" </script> {{ 7 * 7 }}"
PROMPTS = [NASTY, *(f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "ring", "egg"))]
PROMPTS += ["night", "a very long prompt " * 12]
EACH = 5
# trained reward, held-out reward, spread of the pictures; all against the base
GALLERIES = {
    "base": (0.0, 0.0, 1.0),
    "tuned": (1.0, -0.1, 0.3),
    "linear": (0.6, 0.1, 0.8),
    "power_2": (0.4, 0.08, 0.9),
    "worse": (0.1, 0.0, 0.5),
}


def make_example(folder: Path) -> tuple[list[Gallery], list[Item], dict[str, Measured]]:
    """Draw the pictures into `folder` and make up what the judges say."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    items = [Item(prompt, seed) for prompt in PROMPTS for seed in range(EACH)]
    centres = random.normal(size=(len(PROMPTS), 8)).repeat(EACH, 0)
    wobble, hardness = random.normal(size=(len(items), 8)), random.normal(0, 0.1, len(items))
    galleries, measured = [], {}
    for name, (gain, held_out, spread) in GALLERIES.items():
        files = []
        for i in range(len(items)):
            picture = Image.new("RGB", (64, 64), "white")
            x, y = (20 + 8 * spread * wobble[i, :2]).tolist()
            colour = tuple(int(v) for v in random.integers(0, 255, 3))
            ImageDraw.Draw(picture).ellipse((x, y, x + 24, y + 24), fill=colour)
            files.append(folder / f"{name}-{i:02d}.png")
            picture.save(files[-1])
        pixels = np.stack([np.asarray(Image.open(f), float).transpose(2, 0, 1) / 255 for f in files])
        noise = random.normal(0, 0.02, (2, len(items)))
        galleries.append(Gallery(name, tuple(files), f"made up, {name}", evaluations=20, seconds=0.02))
        measured[name] = Measured(
            scores={"toy": 2 + gain + hardness + noise[0], "toy_oracle": 0.8 + held_out + hardness + noise[1]},
            signs={sign: function(pixels) for sign, function in SIGNS.items()},
            features=1.5 * centres + spread * wobble,
            thumbnails=thumbnail(torch.from_numpy(pixels)).numpy(),
        )
    return galleries, items, measured


ABOUT = About(f"What {NASTY} bought", {"features": "toy, CLIP image embedding", "k": 5, "prompts": NASTY})


def example_comparison(galleries: list[Gallery], items: list[Item], measured: dict[str, Measured]) -> ColumnComparison:
    """What `draftp eval` would conclude from it."""
    return compare(galleries, items, measured, {"toy": 1}, "toy_oracle")


def write_example(folder: Path) -> dict[str, Path]:
    """Write the report of the example to `folder`, as `draftp eval` does; the files by what they are."""
    galleries, items, measured = make_example(folder / "pictures")
    return write_outputs(folder, example_comparison(galleries, items, measured), ABOUT, items, measured)

"""Preferences of somebody whose taste is known: pictures painted by the toy world, and a file of answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from draftcli.toy.world import Scene, caption, render, training_scenes

Taste = Callable[[np.ndarray], float]


def paint(path: Path, scene: Scene, seed: int, wear: float) -> np.ndarray:
    """Write a picture; returns it, (3, 64, 64) in [0, 1]."""
    picture = render(scene, np.random.default_rng(seed), wear)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(path)
    return picture


def warmth(picture: np.ndarray) -> float:
    """How much more red there is than blue."""
    return float((picture[0] - picture[2]).mean())


def rate(folder: Path, pairs: int, taste: Taste = warmth, repeats: int = 0) -> Path:
    """Write preferences.jsonl of a person without doubt, and its pictures: of each pair two of a short caption."""
    rng = np.random.default_rng(7)
    lines, shown = [], []
    for i, scene in enumerate(training_scenes()[:pairs]):
        short = Scene(scene.shape, scene.colour, place=scene.place)
        liked = []
        for side in range(2):
            name = f"pictures/{i:04d}-{side}.png"
            liked.append((taste(paint(folder / name, short, 2 * i + side, 1.0)), name))
        shown.append((caption(short), liked))
    for i in [*range(pairs), *range(repeats)]:
        prompt, liked = shown[i]
        left, right = rng.permutation(2)
        answer = "left" if liked[left][0] > liked[right][0] else "right"
        lines.append({
            "prompt": prompt, "left": {"picture": liked[left][1], "seed": int(left)},
            "right": {"picture": liked[right][1], "seed": int(right)}, "answer": answer, "seconds": 1.5,
            "repeats": len(lines) >= pairs, "time": "2026-11-26T12:00:00Z",
        })  # fmt: skip
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file

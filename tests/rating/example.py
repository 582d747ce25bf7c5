"""A folder of pictures to rate, whose red tells which is better, and a person who goes by it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from draftcli.lines import json_line
from draftcli.rating.pairs import pairs_in_folder
from draftcli.rating.server import served
from draftcli.rating.session import RatingSession
from draftcli.rating.storage import open_preferences

NASTY = "<script>document.title = 'broken'</script><img src=x onerror=alert(1)> \"&amp;' \u202e\u0000".rstrip("\0")


def write_folder(
    folder: Path,
    prompts: int = 6,
    seeds: int = 4,
    size: tuple[int, int] = (96, 64),
    column: str = "drawn",
    first: int = 0,
) -> Path:
    """Pictures, each with its own amount of red, and an index of them; the last prompt is hostile."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for p in range(prompts):
        prompt = NASTY if p == prompts - 1 else f"a red thing, number {p}"
        for seed in range(first, first + seeds):
            pixels = np.full((size[1], size[0], 3), 90, np.uint8)
            pixels[8:-8, 8:-8] = (40 + 200 * (p * seeds + seed) // (prompts * seeds + first), 60, 20 * p)
            info = PngImagePlugin.PngInfo()
            info.add_text("parameters", f"AIG: {column}")
            name = f"{p:04d}-s{seed}-{column}.png"
            Image.fromarray(pixels).save(folder / name, pnginfo=info)
            lines.append(
                {"file": name, "prompt": prompt, "seed": seed, "weight": column, "hash": f"{column}{p:04d}{seed:04d}"}
            )
    (folder / "index.jsonl").write_text("".join(map(json_line, lines)), encoding="utf-8")
    return folder


@contextmanager
def rating_page(pictures: Path, output: Path, pairs: int, ready: int | None = None):
    """The page for a folder of pictures, of which the first `ready` pairs are there: its address and its session."""
    found = pairs_in_folder(pictures, "theirs", pairs, seed=0)
    with open_preferences(output) as preferences:
        session = RatingSession(preferences, len(found), seed=0)
        session.add(found[:ready])
        with served(session) as address:
            yield address, session


def red(picture: Image.Image) -> float:
    """The mean of its red, 0 to 255."""
    return float(np.asarray(picture.convert("RGB"), float)[..., 0].mean())


def prefers_red(left: Image.Image, right: Image.Image, prompt: str) -> str:
    """The redder one; neither where both are alike."""
    return "neither" if red(left) == red(right) else "left" if red(left) > red(right) else "right"


def lines_of(folder: Path) -> list[dict]:
    """All lines of the preferences.jsonl in a folder."""
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]

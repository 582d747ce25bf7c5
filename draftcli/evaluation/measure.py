"""Every judge looks at every picture once. What was measured is kept by content, so an interrupted evaluation goes on.

The unit of work is a chunk: CHUNK neighbouring pictures of one column. A chunk is always computed in the same batches,
so several processes that share the chunks get what one process gets, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftcli.errors import DraftpError
from draftcli.evaluation.features import Features
from draftcli.evaluation.pictures import Gallery, Item, read_picture
from draftcli.metrics.signs import SIGNS
from draftcli.metrics.thumbnails import thumbnail
from draftcli.rewards import Reward
from draftcli.rewards.fingerprint import code_and_weights
from draftcli.runs import disk_errors

CHUNK = 8
CHUNK_VERSION = "3"  # of what a chunk holds: another one is measured anew


@dataclass(frozen=True)
class Judges:
    """Who looks at the pictures.

    Attributes:
        rewards: by name.
        features: of diversity.
        device: where pictures are put.
        settings: of the rewards, as `settings_and_files` has them: what is neither in their code nor in their weights.
    """

    rewards: Mapping[str, Reward]
    features: Features
    device: torch.device
    settings: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """Changes where a judge's code, weights or settings do, or the files that these name."""
        judges = [*self.rewards.items(), (self.features.name, self.features.network)]
        facts = [CHUNK_VERSION, self.settings, *(f"{name} {code_and_weights(judge)}" for name, judge in judges)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """What the judges measured on the n pictures of a column.

    Attributes:
        scores: by reward, (n,).
        signs: by sign of `metrics.signs`, (n,).
        features: (n, d).
        thumbnails: (n, t), from `metrics.thumbnails.thumbnail`.
    """

    scores: dict[str, np.ndarray]
    signs: dict[str, np.ndarray]
    features: np.ndarray
    thumbnails: np.ndarray

    def sees_the_same(self, other: Measured) -> bool:
        """Whether both were measured on the same pictures, as far as measuring goes: everything is equal."""
        mine, theirs = (
            [*m.scores.values(), *m.signs.values(), m.features, m.thumbnails] for m in (self, other)
        )  # fmt: skip
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(mine, theirs, strict=True))


def measure(
    columns: Sequence[Gallery],
    items: Sequence[Item],
    judges: Judges,
    cache: Path,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], Any] = lambda pictures: None,
) -> None:
    """Measure this process's share of the chunks that are not in `cache` yet.

    Args:
        columns: file i of each shows item i.
        items: prompts and seeds.
        judges: who looks.
        cache: a folder, made where it is missing.
        share: (rank, number of processes).
        advance: called with how many pictures were just done.

    Raises:
        InputError: a file is no picture; a reward gave no scores.
        DraftpError: the cache cannot be written.
    """
    rank, processes = share
    who = judges.fingerprint
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    work = [(column, part) for column in columns for part in _parts(items)]
    for column, part in work[rank::processes]:
        path = cache / f"{_key(who, column, items, part)}.npz"
        if read_chunk(path) is None:
            arrays = _look([read_picture(file) for file in column.files[part]], items[part], judges)
            aside = path.with_suffix(f".{rank}.partial")
            with disk_errors(path), aside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            aside.replace(path)
        advance(len(column.files[part]))


def collect(column: Gallery, items: Sequence[Item], judges: Judges, cache: Path) -> Measured:
    """What `measure` left about a column; to be called when every process is done."""
    who = judges.fingerprint
    parts = []
    for part in _parts(items):
        path = cache / f"{_key(who, column, items, part)}.npz"
        kept = read_chunk(path)
        if kept is None:
            raise DraftpError(f"{path} is damaged or gone; run the same command to measure it again")
        parts.append(kept)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Measured(
        scores={name: whole[f"score/{name}"] for name in judges.rewards},
        signs={name: whole[f"sign/{name}"] for name in SIGNS},
        features=whole["features"],
        thumbnails=whole["thumbnails"],
    )


def read_chunk(path: Path) -> dict[str, np.ndarray] | None:
    """A chunk's arrays; None where they are not there, or not whole."""
    try:
        # Opened here, as numpy leaves a damaged one open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # zip, zlib and numpy report damage each in its own way
        return None


def _parts(items: Sequence[Item]) -> list[slice]:
    return [slice(i, i + CHUNK) for i in range(0, len(items), CHUNK)]


def _key(who: str, column: Gallery, items: Sequence[Item], part: slice) -> str:
    digest = hashlib.sha256(who.encode())
    for file, item in zip(column.files[part], items[part], strict=True):
        digest.update(hashlib.sha256(file.read_bytes()).digest() + item.prompt.encode() + b"\0")
    return digest.hexdigest()[:32]


def _look(pictures: Sequence[np.ndarray], items: Sequence[Item], judges: Judges) -> dict[str, np.ndarray]:
    """Arrays by name; the pictures of a chunk are one batch where they have one size."""
    alike = len({picture.shape for picture in pictures}) == 1
    batches = [slice(0, len(items))] if alike else [slice(i, i + 1) for i in range(len(items))]
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        pixels = np.stack(pictures[batch])
        images = torch.from_numpy(pixels).to(judges.device)
        prompts = [item.prompt for item in items[batch]]
        with torch.no_grad():
            for name, reward in judges.rewards.items():
                found.setdefault(f"score/{name}", []).append(reward(images, prompts).cpu().double().numpy())
            found.setdefault("features", []).append(judges.features(images).double().cpu().numpy())
        for name, sign in SIGNS.items():
            found.setdefault(f"sign/{name}", []).append(sign(pixels.astype(float)))
        found.setdefault("thumbnails", []).append(thumbnail(images).double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}

"""What the toy's learned reward learns from: pictures of families of scenes, and what the oracle says of them.

The families are of captions that differ in one attribute each. Among unrelated scenes colour and shape would be enough
to tell pictures apart, and place and size would never be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from draftcli.toy import oracle
from draftcli.toy.train_sdxl import GUIDANCE, draw_pictures
from draftcli.toy.training import paint
from draftcli.toy.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    Scene,
    caption,
    change,
    is_held_out,
    training_scenes,
)

FAMILY = 4  # scenes: one, and three that each differ from it in one attribute
SCALES = (2.0, 4.0, 5.0, 7.0)  # guidance of a scene's base samples; a render and a spoilt sample are beside them
COMPARED = 4  # of a scene's six pictures, what a step takes; all captions of a family are asked about all its pictures
RETOUCHED = 4  # copies of every base sample, of which a step compares two with it


@dataclass
class JudgedFamilies:
    """Pictures of families of scenes, judged for every caption of their family.

    Attributes:
        scenes: S = families * FAMILY, one family after the other.
        pictures: (families, FAMILY * P, 3, 64, 64) uint8, P of each scene.
        truth: (families, FAMILY, FAMILY * P) oracle scores of a family's captions by its pictures.
        description: (families, FAMILY * P, 16) what the oracle reads in each picture, standardised.
        retouched: (S, len(SCALES), 1 + RETOUCHED, 3, 64, 64) uint8, every base sample and its retouched copies.
        retouched_truth: (S, len(SCALES), 1 + RETOUCHED) oracle scores of them for their scene's caption.
    """

    scenes: list[Scene]
    pictures: Tensor
    truth: Tensor
    description: Tensor
    retouched: Tensor
    retouched_truth: Tensor


def new_families(count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of `count` families, one family after the other; none is held out."""
    training = training_scenes()
    scenes: list[Scene] = []
    for _ in range(count):
        family = [training[rng.integers(len(training))]]
        while len(family) < FAMILY:
            other = change(family[0], str(rng.choice(ATTRIBUTES)), rng)
            if not is_held_out(other) and other not in family:
                family.append(other)
        scenes += family
    return scenes


def groups(which: Tensor, size: int) -> Tensor:
    """The rows (G, size) of groups that follow each other, `size` rows each."""
    return which[:, None] * size + torch.arange(size)


def draw_families(pipe: Any, families: int, seed: int, rng: np.random.Generator) -> JudgedFamilies:
    """Base samples of each scene, a render, and a spoilt base sample, read and judged by the oracle.

    The samples differ in guidance, as people's did in Pick-a-Pic: with it come other purity and crispness.
    """
    scenes = new_families(families, rng)
    prompts = [caption(scene) for scene in scenes]
    drawn = [draw_pictures(pipe, prompts, seed + 7777 * i, scale=s) for i, s in enumerate(SCALES, start=1)]
    base = [(pictures * 255).round().to(torch.uint8) for pictures in drawn]
    kinds = [*base, paint(scenes, rng, wear=1.0), spoil(base[SCALES.index(GUIDANCE)], rng)]
    pictures = torch.stack(kinds, dim=1).view(families, FAMILY * len(kinds), *base[0].shape[1:])
    truth, description = [], []
    for family, shown in enumerate(pictures):
        reading = oracle.read_pictures(shown.float() / 255)
        asked = [scenes[family * FAMILY + i] for i in range(FAMILY) for _ in shown]
        rows = torch.arange(len(shown)).repeat(FAMILY)
        truth.append(oracle.weigh(oracle.score_readings(reading[rows], asked)).view(FAMILY, -1))
        single = torch.stack([reading.radius, reading.crispness], dim=1)
        description.append(torch.cat([reading.overlap, reading.centre, reading.paint, reading.paper, single], dim=1))
    described = torch.stack(description)
    mean, deviation = described.mean((0, 1)), described.std((0, 1)).clamp(min=1e-3)
    copies = [torch.stack([b, *(retouch(b, scenes, rng) for _ in range(RETOUCHED))], dim=1) for b in base]
    scores = [[_score(p, scenes) for p in group.unbind(1)] for group in copies]
    return JudgedFamilies(
        scenes,
        pictures,
        torch.stack(truth),
        (described - mean) / deviation,
        torch.stack(copies, dim=1),
        torch.stack([torch.stack(group, dim=1) for group in scores], dim=1),
    )


def _score(pictures: Tensor, scenes: list[Scene]) -> Tensor:
    return oracle.weigh(oracle.score_readings(oracle.read_pictures(pictures.float() / 255), scenes))


def retouch(pictures: Tensor, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Copies of other purity, sharpness and stray colour, better or worse; uint8 in, uint8 out.

    These are what late steps of sampling can change, while shape, size and place stay as they are. Two samples of one
    caption differ in all of it at once and mostly in structure: the fine things would be lost beside it.
    """
    seen = oracle.read_pictures(pictures.float() / 255)
    cover, paper = seen.cover[:, None], seen.paper.clone()
    for i, scene in enumerate(scenes):
        if scene.background is not None:
            paper[i] = torch.tensor(BACKGROUNDS[scene.background])
    paint = torch.tensor([COLOURS[scene.colour] for scene in scenes])

    def by(low: float, high: float, *shape: int) -> Tensor:
        """How far to go, nowhere for three pictures in ten."""
        drawn = rng.uniform(low, high, (len(scenes), *shape)) * (rng.random((len(scenes), *shape)) < 0.7)
        return torch.from_numpy(drawn).float()

    far = by(-1, 1, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(cover, (1,) * 4, mode="replicate"), 3, stride=1)
    edges = cover.lerp(torch.where(far > 0, torch.sigmoid(8 * (cover - 0.5)), soft), far.abs())
    before = _blend(cover, seen.paint, seen.paper)
    after = _blend(edges, seen.paint.lerp(paint, by(-0.7, 1, 1)), seen.paper.lerp(paper, by(-0.7, 1, 1)))
    stray = (1 + by(-1, 0.5, 1, 1, 1)) * (seen.pixels - before)
    return ((after + stray).clamp(0, 1) * 255).round().to(torch.uint8)


def _blend(cover: Tensor, paint: Tensor, paper: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) of two colours (B, 3) each, by the share (B, 1, 64, 64) of the first in each pixel."""
    return paper[..., None, None] + cover * (paint - paper)[..., None, None]


def spoil(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Copies that are blurred, noisy, faded or of another tint; uint8 in, uint8 out."""
    spoilt = [_spoil(picture, int(rng.integers(4)), rng.uniform(0.3, 1.0), rng) for picture in pictures.float() / 255]
    return (torch.stack(spoilt).clamp(0, 1) * 255).round().to(torch.uint8)


def _spoil(picture: Tensor, kind: int, strength: float, rng: np.random.Generator) -> Tensor:
    if kind == 0:
        small = F.interpolate(picture[None], scale_factor=1 / (1 + 2 * strength), mode="area")
        return F.interpolate(small, picture.shape[-2:], mode="bicubic")[0]
    if kind == 1:
        return picture + 0.15 * strength * torch.from_numpy(rng.standard_normal(picture.shape)).float()
    if kind == 2:
        return picture + 0.7 * strength * (picture.mean(0, keepdim=True) - picture)
    return picture + 0.25 * strength * torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1))).float()


def some_of_each(pictures: int, batch: int, rng: np.random.Generator) -> Tensor:
    """Which pictures of each family to compare, (batch, FAMILY * COMPARED): as many of each of its scenes."""
    each = pictures // FAMILY
    chosen = [[m * each + i for m in range(FAMILY) for i in rng.permutation(each)[:COMPARED]] for _ in range(batch)]
    return torch.tensor(chosen)


def some_retouched(judged: JudgedFamilies, scenes: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Three versions (S, 3, 3, 64, 64) of one base sample of each scene, and their oracle scores (S, 3)."""
    sample = torch.from_numpy(rng.integers(0, len(SCALES), len(scenes)))[:, None]
    version = torch.stack([torch.from_numpy(rng.permutation(1 + RETOUCHED)[:3]) for _ in scenes])
    rows = scenes[:, None]
    return judged.retouched[rows, sample, version], judged.retouched_truth[rows, sample, version]


def own(scores: Tensor) -> Tensor:
    """Of each family's captions by pictures (F, C, C * P), what each caption has of its own pictures: (F, C, P)."""
    return scores.unflatten(2, (scores.shape[1], -1)).diagonal(dim1=1, dim2=2).movedim(-1, 1)

"""The toy world's truth: an exact judge of any picture against its caption. Nothing here is learned.

It measures a picture once (which two colours, which silhouette, where, how large, how sharp) and compares the reading
with what the caption names. Shape, size and place are settled early in sampling; purity and crispness can still move
in its last steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from math import isnan

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from draftcli.toy import world
from draftcli.toy.world import RESOLUTION, SHAPES, Scene

# The share of each attribute in the score; what a caption leaves out is left out of the mean.
CRITERIA_WEIGHTS: dict[str, float] = {
    "shape": 0.20,
    "size": 0.10,
    "place": 0.15,
    "colour": 0.15,
    "background": 0.10,
    "colour_purity": 0.10,
    "background_purity": 0.10,
    "crispness": 0.10,
}
CRITERIA = tuple(CRITERIA_WEIGHTS)
NAMED = world.ATTRIBUTES  # what a caption names and a picture gets right or wrong; the others are matters of degree
RIGHT_FROM = (
    0.5  # the lowest score that is right: what the caption names fits better than what else it could have named
)

_RADII = torch.arange(7.0, 29.0, 0.5)  # pixels: the sizes at which silhouettes are compared
_MIN_CONTRAST = 0.10  # RGB distance below which shape and background are one colour
_AREA = (0.03, 0.50)  # share of the picture that a shape can cover
_CLEAR_LEAD = 0.8  # lead over the next best silhouette, as a share of a clean shape's, that is beyond doubt
_COLOUR_MARGIN = 0.15  # lead over the next nearest named colour that makes a colour beyond doubt
_CRISP = (1.3, 2.8)  # softness, as a multiple of an antialiased edge's, where crispness begins to fall and reaches 0
_PURITY_SCALE = 0.25  # mean RGB distance from the named colour at which purity reaches 0


@dataclass
class Reading:
    """What the oracle sees in B pictures, before it knows their captions."""

    pixels: Tensor  # (B, 3, 64, 64)
    paper: Tensor  # (B, 3) background colour
    paint: Tensor  # (B, 3) shape colour
    cover: Tensor  # (B, 64, 64) how much each pixel is shape rather than background, in [0, 1]
    present: Tensor  # (B,) 1.0 where there is a shape at all
    overlap: Tensor  # (B, 6) intersection over union with each silhouette, best placed
    radius: Tensor  # (B,) pixels, as the best silhouette
    centre: Tensor  # (B, 2) pixels (x, y) from the picture's centre, as the best silhouette
    crispness: Tensor  # (B,)

    def __getitem__(self, rows: Tensor) -> Reading:
        """The reading of some of the pictures."""
        return Reading(*(getattr(self, field.name)[rows] for field in fields(self)))


def explain_scores(images: Tensor, prompts: list[str]) -> list[dict[str, float] | None]:
    """Scores in [0, 1] by attribute for images (B, 3, H, W) in [0, 1]; None where a caption is outside the grammar.

    Attributes that a caption does not name are left out.
    """
    rows = attributes(images, prompts).tolist()
    named = [{name: value for name, value in zip(CRITERIA, row, strict=True) if not isnan(value)} for row in rows]
    return [scores or None for scores in named]


def oracle_score(images: Tensor, prompts: list[str]) -> Tensor:
    """One score in [0, 1] a picture, (B,): the weighted mean of its attributes; NaN outside the grammar."""
    return weigh(attributes(images, prompts))


def weigh(table: Tensor) -> Tensor:
    """The weighted mean (B,) of a table of scores (B, 8), over what is not NaN."""
    weights = torch.tensor(list(CRITERIA_WEIGHTS.values())) * ~table.isnan()
    return (table.nan_to_num() * weights).sum(1) / weights.sum(1)


def correct(images: Tensor, prompts: list[str]) -> Tensor:
    """Whether every attribute that the caption names is right (scores at least `RIGHT_FROM`), (B,) bool.

    False outside the grammar. Purity and crispness do not count: they are matters of degree, not of right and wrong.
    """
    table = attributes(images, prompts)[:, [CRITERIA.index(name) for name in NAMED]]
    return ((table >= RIGHT_FROM) | table.isnan()).all(1) & ~table.isnan().all(1)


@torch.no_grad()
def attributes(images: Tensor, prompts: list[str]) -> Tensor:
    """The scores as a table (B, 8) in the order of `CRITERIA`, on the CPU; NaN where the caption says nothing."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    scenes = [world.parse(prompt) for prompt in prompts]
    table = torch.full((len(prompts), len(CRITERIA)), torch.nan)
    inside = [i for i, scene in enumerate(scenes) if scene is not None]
    if inside:
        table[inside] = score_readings(read_pictures(images[inside]), [scene for scene in scenes if scene is not None])
    return table


@torch.no_grad()
def read_pictures(images: Tensor) -> Reading:
    """Measure pictures (B, 3, H, W); other sizes than 64x64 are resized, values outside [0, 1] clipped."""
    pixels = images.detach().to("cpu", torch.float32).nan_to_num(0.5).clamp(0, 1)
    if pixels.shape[-2:] != (RESOLUTION, RESOLUTION):
        pixels = F.interpolate(pixels, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
    paper, paint = _two_colours(pixels)
    axis = paint - paper
    contrast = axis.norm(dim=1)
    offset = pixels - paper[..., None, None]
    cover = (torch.einsum("bchw,bc->bhw", offset, axis) / contrast.square().clamp(min=1e-6)[:, None, None]).clamp(0, 1)
    share = cover.mean((1, 2))
    present = ((contrast > _MIN_CONTRAST) & (share > _AREA[0]) & (share < _AREA[1])).float()
    overlap, radii, centres, edges = _match(cover)
    best = overlap.argmax(1, keepdim=True)
    blended = paper[..., None, None] + cover[:, None] * axis[..., None, None]
    stray = (pixels - blended).abs().mean((1, 2, 3))  # colour that is neither the shape's nor the background's
    softness = _softness(cover) / edges.gather(1, best)[:, 0]
    crispness = (1 - (softness - _CRISP[0]) / (_CRISP[1] - _CRISP[0])).clamp(0, 1) * (1 - stray / 0.08).clamp(0, 1)
    return Reading(
        pixels, paper, paint, cover, present, overlap, radii.gather(1, best)[:, 0],
        centres.gather(1, best[..., None].expand(-1, -1, 2))[:, 0], crispness,
    )  # fmt: skip


def score_readings(seen: Reading, scenes: list[Scene]) -> Tensor:
    """The table of scores (B, 8) of pictures already read; cheap, so one reading can meet many captions."""
    paint, paper = torch.tensor(list(world.COLOURS.values())), torch.tensor(list(world.BACKGROUNDS.values()))
    colour, background = _indices(scenes, "colour"), _indices(scenes, "background")
    on, off = (seen.cover > 0.9).float(), (seen.cover < 0.1).float()
    columns = {
        "shape": _shape(seen, _indices(scenes, "shape")),
        "size": _size(seen, _indices(scenes, "size")) * seen.present,
        "place": _place(seen, _indices(scenes, "place")) * seen.present,
        "colour": _nearest(seen.paint, paint, colour) * seen.present,
        "background": _nearest(seen.paper, paper, background),
        "colour_purity": _purity(seen.pixels, on, paint[colour]) * seen.present,
        "background_purity": _purity(seen.pixels, off, paper[background]),
        "crispness": seen.crispness * seen.present,
    }
    table = torch.stack([columns[name] for name in CRITERIA], dim=1)
    for name in ("size", "place", "background"):
        unnamed = torch.tensor([getattr(scene, name) is None for scene in scenes])
        for column in (name, f"{name}_purity"):
            if column in columns:
                table[unnamed, CRITERIA.index(column)] = torch.nan
    return table


def _indices(scenes: list[Scene], attribute: str) -> Tensor:
    values = world.choices(attribute)
    return torch.tensor([values.index(getattr(scene, attribute) or values[0]) for scene in scenes])


def _two_colours(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The background's colour (median of the frame) and the shape's (mean of what differs most), each (B, 3)."""
    frame = torch.ones(RESOLUTION, RESOLUTION, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    paper = pixels[:, :, frame].median(dim=-1).values
    distance = (pixels - paper[..., None, None]).norm(dim=1).flatten(1)
    far = (distance >= 0.8 * distance.quantile(0.97, dim=1, keepdim=True)).float()
    paint = (pixels.flatten(2) * far[:, None]).sum(-1) / far.sum(-1, keepdim=True)
    return paper, paint


@cache
def _silhouettes() -> tuple[Tensor, Tensor, Tensor]:
    """Spectra (6, R, 64, 33) of each shape at each radius, their areas (6, R) and edge softness (6, R) in pixels."""
    middle = (RESOLUTION / 2, RESOLUTION / 2)
    masks = [[world.coverage(shape, float(radius), middle) for radius in _RADII] for shape in SHAPES]
    bank = torch.from_numpy(np.array(masks)).float()
    # Where an edge falls between pixels decides how soft it looks: average over positions.
    shifted = [
        [[world.coverage(shape, float(r), (32 + d, 32 + d)) for r in _RADII] for shape in SHAPES]
        for d in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    softness = _softness(torch.from_numpy(np.array(shifted)).float()).mean(0)
    return torch.fft.rfft2(bank), bank.sum((2, 3)), softness


def _softness(cover: Tensor) -> Tensor:
    """How many pixels (..., 64, 64) -> (...) are neither shape nor background; slight noise does not count."""
    between = 4 * cover * (1 - cover)  # 0.36 where the cover is 0.1 or 0.9
    return ((between - 0.36).clamp(min=0) / 0.64).sum((-2, -1))


def _match(cover: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay each silhouette, at the radius that has the cover's area, over every position.

    Returns the best overlap (B, 6), the radius (B, 6), the offset (x, y) of the best position (B, 6, 2), and the
    softness that a crisp edge of that silhouette has (B, 6).
    """
    spectra, areas, softness = _silhouettes()
    area = cover.sum((1, 2))
    pick = (areas[None] - area[:, None, None]).abs().argmin(-1)  # (B, 6)
    shapes = torch.arange(len(SHAPES)).expand_as(pick)
    shared = torch.fft.irfft2(torch.fft.rfft2(cover)[:, None] * spectra[shapes, pick].conj(), s=cover.shape[1:])
    best, where = shared.flatten(2).max(-1)
    overlap = best / (area[:, None] + areas[shapes, pick] - best).clamp(min=1e-6)
    rows, columns = where // RESOLUTION, where % RESOLUTION
    half = RESOLUTION // 2
    centres = torch.stack([(columns + half) % RESOLUTION - half, (rows + half) % RESOLUTION - half], dim=-1).float()
    return overlap.clamp(0, 1), _RADII[pick], centres, softness[shapes, pick]


def _shape(seen: Reading, named: Tensor) -> Tensor:
    lead = _lead(seen.overlap, named) / (_CLEAR_LEAD * _clean_leads()[named])
    fit = ((seen.overlap.gather(1, named[:, None])[:, 0] - 0.45) / 0.35).clamp(0, 1)  # smears fit all a little
    return (0.5 + 0.5 * lead).clamp(0, 1) * fit * seen.present


def _lead(overlap: Tensor, named: Tensor) -> Tensor:
    """How much better the named silhouette fits than the next best, (B,)."""
    return overlap.gather(1, named[:, None])[:, 0] - overlap.scatter(1, named[:, None], 0).amax(1)


@cache
def _clean_leads() -> Tensor:
    """The lead (6,) that each shape has when painted without fault: a circle is closer to a square than a star is."""
    radius = sum(world.SIZE_RADII.values()) / len(world.SIZE_RADII)
    masks = [world.coverage(shape, radius, (RESOLUTION / 2, RESOLUTION / 2)) for shape in SHAPES]
    return _lead(_match(torch.from_numpy(np.array(masks)).float())[0], torch.arange(len(SHAPES)))


def _size(seen: Reading, named: Tensor) -> Tensor:
    small, large = world.SIZE_RADII.values()
    error = (seen.radius - torch.tensor([small, large])[named]).abs()
    return _falling(error, 1.5, torch.tensor((large - small) / 2))


def _place(seen: Reading, named: Tensor) -> Tensor:
    """Against where a shape of the size that is seen belongs: a wrong size is not also a wrong place."""
    small, large = world.SIZE_RADII.values()
    reach = torch.where(seen.radius < (small + large) / 2, world.OFFSETS["small"], world.OFFSETS["large"])
    target = torch.tensor(list(world.PLACES.values()), dtype=torch.float32)[named] * reach[:, None]
    return _falling((seen.centre - target).norm(dim=1), 2.0, reach / 2)


def _falling(error: Tensor, free: float, half: Tensor) -> Tensor:
    """1 up to an error of `free`, a half at `half`, then on down to 0."""
    return (1 - 0.5 * (error - free) / (half - free)).clamp(0, 1)


def _nearest(colour: Tensor, named_colours: Tensor, named: Tensor) -> Tensor:
    distance = torch.cdist(colour, named_colours)
    mine = distance.gather(1, named[:, None])[:, 0]
    rival = distance.scatter(1, named[:, None], torch.inf).amin(1)
    return (0.5 + 0.5 * (rival - mine) / _COLOUR_MARGIN).clamp(0, 1)


def _purity(pixels: Tensor, where: Tensor, named_colour: Tensor) -> Tensor:
    distance = (pixels - named_colour[..., None, None]).norm(dim=1)
    mean = (distance * where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)
    return (1 - mean / _PURITY_SCALE).clamp(0, 1) * (where.sum((1, 2)) > 0)

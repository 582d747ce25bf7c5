"""The toy world: 64x64 pictures of one coloured shape, and the captions that name them.

A scene has five attributes: shape, colour, size, place and background. `caption` writes a scene as English, `parse`
reads it back, `render` paints it. In a parsed scene `None` means "the caption does not say", and `render` then draws
one. Held-out captions are combinations of the five that no training ever sees, though it sees each attribute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np

RESOLUTION = 64
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1]
    "red": (0.88, 0.11, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.99, 0.87, 0.15),
    "green": (0.13, 0.65, 0.25),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.28, 0.88),
    "purple": (0.53, 0.18, 0.72),
    "pink": (0.98, 0.50, 0.74),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.08),
    "grey": (0.52, 0.53, 0.55),
    "beige": (0.90, 0.83, 0.68),
}
SIZE_RADII: dict[str, float] = {"small": 13.0, "large": 20.0}  # radius in pixels
PLACES: dict[str, tuple[int, int]] = {  # direction (x, y) from the picture's centre
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "centre": (0, 0),
}
OFFSETS: dict[str, float] = {"small": 14.0, "large": 9.0}  # pixels from the centre: what keeps the shape in the frame

_PREPOSITIONS = {"left": "on the", "right": "on the", "top": "at the", "bottom": "at the", "centre": "in the"}
_SYNONYMS = {"center": "centre", "middle": "centre", "gray": "grey", "big": "large", "an": "a"}
_GRAMMAR = re.compile(
    rf"a (?:(?P<size>{'|'.join(SIZE_RADII)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: (?:on|at|in) the (?P<place>{'|'.join(PLACES)}))?"
    rf"(?: (?:on|of) a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)
_HELD_OUT_EVERY = 8  # one scene in eight; as there are eight colours, each colour is held out equally often


@dataclass(frozen=True)
class Scene:
    """One picture in words. `None` is "any": a caption that leaves the attribute out."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None
    background: str | None = None


ATTRIBUTES = tuple(field.name for field in fields(Scene))
_CHOICES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZE_RADII),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}


def choices(attribute: str) -> tuple[str, ...]:
    """Every value that an attribute of `Scene` can take."""
    return _CHOICES[attribute]


def caption(scene: Scene) -> str:
    """The scene in English, such as "a small red star on the left of a white background"."""
    words = ["a", scene.size, scene.colour, scene.shape]
    if scene.place:
        words += [_PREPOSITIONS[scene.place], scene.place]
    if scene.background:
        words += ["of" if scene.place else "on", "a", scene.background, "background"]
    return " ".join(word for word in words if word)


def parse(text: str) -> Scene | None:
    """The scene that a caption names, or None outside the grammar. Case, spaces and a final stop do not matter."""
    words = text.lower().replace(",", " ").strip(" .\t\n").split()
    match = _GRAMMAR.fullmatch(" ".join(_SYNONYMS.get(word, word) for word in words))
    return Scene(**match.groupdict()) if match else None


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every unnamed attribute drawn at random."""
    unnamed = [name for name in ATTRIBUTES if getattr(scene, name) is None]
    return replace(scene, **{name: str(rng.choice(choices(name))) for name in unnamed})


def change(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with one attribute replaced by another value."""
    others = [value for value in choices(attribute) if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: str(rng.choice(others))})


def all_scenes() -> list[Scene]:
    """Every fully named scene, in a fixed order."""
    return [Scene(*values) for values in product(*_CHOICES.values())]


def is_held_out(scene: Scene) -> bool:
    """Whether a fully named scene is kept from all training."""
    return sum(choices(name).index(getattr(scene, name)) for name in ATTRIBUTES) % _HELD_OUT_EVERY == 0


def _shuffled(held_out: bool) -> list[Scene]:
    scenes = [scene for scene in all_scenes() if is_held_out(scene) == held_out]
    order = np.random.default_rng(0).permutation(len(scenes))
    return [scenes[i] for i in order]


def training_scenes() -> list[Scene]:
    """The scenes that training may see, shuffled the same way every time."""
    return _shuffled(held_out=False)


def held_out_scenes(count: int | None = None) -> list[Scene]:
    """Held-out scenes, shuffled; with `count`, that many, chosen so that every value is named about equally often."""
    pool = _shuffled(held_out=True)
    if count is None:
        return pool
    chosen: list[Scene] = []
    uses = {name: dict.fromkeys(choices(name), 0) for name in ATTRIBUTES}
    while pool and len(chosen) < count:
        # A value's use counts in proportion to how many values share the attribute: sizes fill up faster than colours.
        scene = min(pool, key=lambda s: sum(uses[n][getattr(s, n)] * len(uses[n]) for n in ATTRIBUTES))
        pool.remove(scene)
        chosen.append(scene)
        for name in ATTRIBUTES:
            uses[name][getattr(scene, name)] += 1
    return chosen


def render(scene: Scene, rng: np.random.Generator, wear: float = 0.0) -> np.ndarray:
    """Paint a scene: (3, 64, 64) float32 in [0, 1], with a little natural jitter of position and radius.

    `wear` in [0, 1] ages the picture as an old print ages: colours drift and fade and edges soften. The truth is
    unworn; the generator and its autoencoder learn from worn prints, which leaves a reward something to restore.
    """
    scene = complete(scene, rng)
    assert scene.size is not None
    assert scene.place is not None
    assert scene.background is not None
    radius = SIZE_RADII[scene.size] + rng.uniform(-0.5, 0.5)
    direction = np.array(PLACES[scene.place])
    centre = RESOLUTION / 2 + OFFSETS[scene.size] * direction + rng.uniform(-1, 1, size=2)
    blur = 1.0 + 1.5 * wear * rng.uniform()
    inside = coverage(scene.shape, radius, (centre[0], centre[1]), blur)
    paint, paper = (
        _worn(np.array(colour), wear, rng) for colour in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    return (inside * paint[:, None, None] + (1 - inside) * paper[:, None, None]).astype(np.float32)


def coverage(shape: str, radius: float, centre: tuple[float, float], blur: float = 1.0) -> np.ndarray:
    """How much of each pixel the shape covers: (64, 64) in [0, 1]. `blur` is the edge's width in pixels."""
    axis = np.arange(RESOLUTION) + 0.5
    x, y = np.meshgrid(axis - centre[0], axis - centre[1])
    return np.clip(0.5 - _signed_distance(shape, x, y, radius) / blur, 0.0, 1.0)


def _worn(colour: np.ndarray, wear: float, rng: np.random.Generator) -> np.ndarray:
    faded = colour + wear * rng.uniform(0, 0.35) * (colour.mean() - colour)
    return np.clip(faded + wear * rng.uniform(-0.12, 0.12, size=3), 0.0, 1.0)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the shape's outline, negative inside. Every shape's box is centred on (0, 0)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.22 * radius
    return _polygon_distance(x, y, radius * _OUTLINES[shape])


def _polygon_distance(x: np.ndarray, y: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        edge_x, edge_y = bx - ax, by - ay
        along = np.clip(((x - ax) * edge_x + (y - ay) * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * edge_x, y - ay - along * edge_y))
        if ay != by:  # a ray to the right crosses this edge: even-odd rule
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * edge_x / edge_y)
    return np.where(inside, -nearest, nearest)


def _spokes(radii: tuple[float, ...], count: int) -> np.ndarray:
    """A polygon of `count` corners whose distances from the centre repeat `radii`, the first pointing up."""
    angles = -np.pi / 2 + 2 * np.pi * np.arange(count) / count
    lengths = np.resize(radii, count)
    points = np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)
    return points - (points.max(axis=0) + points.min(axis=0)) / 2


_ARM = 0.34  # half the width of the cross's arms
_OUTLINES: dict[str, np.ndarray] = {  # at radius 1, x to the right and y down
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float),
    "triangle": _spokes((1.15,), 3),
    "star": _spokes((1.08, 0.48), 10),
    "cross": np.array(
        [
            *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
            *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
        ]
    ),
}

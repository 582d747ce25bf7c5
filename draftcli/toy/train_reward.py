"""Stage 3 of the toy's weights: a tiny CLIP that learns to prefer, as PickScore did from people.

First it learns which caption belongs to which picture, as CLIP had before PickScore. Then it sees pairs of pictures for
one caption, and the oracle, made to err on close pairs as people do, says which is better: it scores
exp(logit_scale) * cos and is trained by cross-entropy over each pair. It can be wrong about what it never sees, so a
generator pushed far enough will fool it: an honest proxy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from draftcli.preferences.fit import preference_loss
from draftcli.toy import oracle
from draftcli.toy.tokenizer import MAX_TOKENS, save_tokenizer
from draftcli.toy.train_sdxl import GUIDANCE, draw_pictures, open_pipeline, text_config
from draftcli.toy.training import device, minimise, paint, to_float
from draftcli.toy.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    Scene,
    caption,
    change,
    held_out_scenes,
    is_held_out,
    training_scenes,
)

PRETRAIN_STEPS = 600
DOUBT = 0.05  # the better of two is preferred by a share of sigmoid(lead / DOUBT), as in Bradley and Terry
TIES = (0.02, 0.05, 0.1)  # agreement is measured on pairs whose oracle scores are further apart than this
FAMILY = 4  # scenes: one, and three that each differ from it in one attribute
SCALES = (2.0, 4.0, 5.0, 7.0)  # guidance of a scene's base samples; a render and a spoilt sample are beside them
COMPARED = 4  # of a scene's six pictures, what a step takes; all captions of a family are asked about all its pictures
RETOUCHED = 4  # copies of every base sample, of which a step compares two with it
OWN, FINE = 2.0, 4.0  # weights of a caption's own pictures among its family's, and of samples beside retouched ones
DESCRIPTION, MATCHING = 2.0, 0.25  # weights of the two losses that keep it seeing while it learns to prefer
PIXEL_NOISE = 0.015
SHIFT = 1  # pixels: pictures are moved about, so that the reward's gradient does not depend on exact positions
PIXEL_MEAN, PIXEL_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
    "do_convert_rgb": True,
}


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


def train_reward(
    model_folder: Path, folder: Path, seed: int, steps: int, families: int = 240, batch: int = 6, check: int = 480
) -> dict[str, Any]:
    """Draw with the base, train the reward on preferences, save it to `folder`; returns the measured figures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipe = open_pipeline(model_folder)
    tokenizer = save_tokenizer(folder)
    clip = new_clip(tokenizer).to(device()).train()
    pretraining = min(PRETRAIN_STEPS, steps)
    match = matching(clip, tokenizer, pretraining, rng)
    pretrained = minimise(clip.parameters(), lambda step: match(16), pretraining, lr=1e-3, name="reward, captions")
    judged = draw_families(pipe, families, seed, rng)
    describe = nn.Linear(clip.config.vision_config.hidden_size, judged.description.shape[-1]).to(device())

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.choice(families, size=batch, replace=False))
        rows = some_of_each(judged.pictures.shape[1], batch, rng)
        pictures, described = judged.pictures[chosen[:, None], rows], judged.description[chosen[:, None], rows]
        truth = judged.truth[chosen].gather(2, rows[:, None].expand(-1, FAMILY, -1)).to(device())
        features, seen = look(clip, augment(to_float(pictures.flatten(0, 1))))
        rows_of_scenes = groups(chosen, FAMILY).flatten()
        texts = embed_captions(clip, tokenizer, [judged.scenes[i] for i in rows_of_scenes])
        cosines = torch.einsum("fce,fpe->fcp", texts.unflatten(0, (batch, -1)), seen.unflatten(0, (batch, -1)))
        logits = scale(clip) * cosines
        preference = loss_over_pairs(logits, truth) + OWN * loss_over_pairs(own(logits), own(truth))
        pictures, truth = some_retouched(judged, rows_of_scenes, rng)
        _, seen = look(clip, augment(to_float(pictures.flatten(0, 1))))
        cosines = torch.einsum("se,spe->sp", texts, seen.unflatten(0, pictures.shape[:2]))
        preference = preference + FINE * loss_over_pairs(scale(clip) * cosines, truth.to(device()))
        description = F.mse_loss(describe(features), described.flatten(0, 1).to(device()))
        return preference + DESCRIPTION * description + MATCHING * match(4)

    seconds = minimise([*clip.parameters(), *describe.parameters()], loss, steps, lr=5e-4, name="reward, preferences")
    clip.eval()
    clip.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    return {
        "pretraining_steps": pretraining,
        "pretraining_seconds": pretrained,
        "steps": steps,
        "seconds": seconds,
        "base_samples": families * FAMILY * len(SCALES),
        "doubt": DOUBT,
        **agreement(clip.float(), tokenizer, pipe, seed, check),
    }


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP in small, 0.9 M parameters, smooth in its pixels (gelu)."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        hidden_act="gelu",
    )
    text = text_config(tokenizer, 96)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))
    with torch.no_grad():
        clip.vision_model.embeddings.position_embedding.weight[1:] += 0.3 * waves(64 // 8, 128)
    return clip


def waves(edge: int, width: int) -> Tensor:
    """Sines and cosines of the positions on an `edge` x `edge` grid: (edge^2, width), as in many vision transformers.

    Added to positions that start random and small, which are lost beside the colours: place is then never learnt.
    """
    frequencies = math.pi / edge * 2 ** torch.linspace(0, math.log2(edge), width // 4)
    angles = (torch.arange(edge) + 0.5)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, edge, -1), along[None].expand(edge, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def look(clip: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, 128) of images (B, 3, 64, 64) in [0, 1], and the unit vectors (B, 64) that they are compared by."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    features = clip.vision_model((images - mean) / std).pooler_output
    return features, F.normalize(clip.visual_projection(features), dim=-1)


def embed_captions(clip: CLIPModel, tokenizer: CLIPTokenizer, scenes: Sequence[Scene]) -> Tensor:
    """Unit vectors (B, 64) of the scenes' captions."""
    texts = [caption(scene) for scene in scenes]
    # Padded to the longest only: attention is causal, so what follows the end changes nothing.
    tokens = tokenizer(texts, padding=True, max_length=MAX_TOKENS, truncation=True, return_tensors="pt").to(device())
    return F.normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=-1)


def scale(clip: CLIPModel) -> Tensor:
    """exp(logit_scale), at most 100 as in CLIP."""
    return clip.logit_scale.exp().clamp(max=100)


def matching(
    clip: CLIPModel, tokenizer: CLIPTokenizer, steps: int, rng: np.random.Generator
) -> Callable[[int], Tensor]:
    """CLIP's own loss as a function of the number of families in the batch: which caption belongs to which render?

    Among unrelated scenes colour and shape would be enough, and place and size would never be learnt.
    """
    scenes = new_families(8 * (steps + 2), rng)  # in the first stage each is seen about twice
    pictures = paint(scenes, rng, wear=1.0)

    def loss(families: int) -> Tensor:
        chosen = rng.choice(len(scenes) // FAMILY, size=families, replace=False)
        rows = groups(torch.from_numpy(chosen), FAMILY).flatten()
        _, seen = look(clip, augment(to_float(pictures[rows])))
        logits = scale(clip) * seen @ embed_captions(clip, tokenizer, [scenes[i] for i in rows]).T
        pairs = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    return loss


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


def loss_over_pairs(logits: Tensor, truth: Tensor) -> Tensor:
    """`preference_loss` over all pairs of a caption's pictures, logits and truth (..., P).

    A label is the share of people who would prefer the first, each erring with `DOUBT`: a single person's choice costs
    steps and teaches the same.
    """
    i, j = torch.triu_indices(logits.shape[-1], logits.shape[-1], offset=1, device=logits.device)
    better = torch.sigmoid((truth[..., i] - truth[..., j]) / DOUBT)
    return preference_loss(logits[..., i] - logits[..., j], better)


def augment(images: Tensor) -> Tensor:
    """Each picture moved by up to a pixel, with a little noise."""
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    size = images.shape[-1]
    moves = torch.randint(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, moves, strict=True)])
    return moved + PIXEL_NOISE * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(moved)


@torch.no_grad()
def agreement(clip: CLIPModel, tokenizer: CLIPTokenizer, pipe: Any, seed: int, count: int) -> dict[str, Any]:
    """How often reward and oracle prefer the same of two base samples, on held-out captions; ties left out.

    A tie is a pair closer than `DOUBT`, on which the labels of training err more than one time in four; the figure is
    given for other bounds as well.
    """
    scenes = (held_out_scenes() * 2)[:count]
    prompts = [caption(scene) for scene in scenes]
    first, second = (draw_pictures(pipe, prompts, seed + offset) for offset in (100_000, 200_000))
    texts = embed_captions(clip, tokenizer, scenes)
    reward = [(look(clip, pictures.to(device()))[1] * texts).sum(-1).cpu() for pictures in (first, second)]
    truth = [oracle.oracle_score(pictures, prompts) for pictures in (first, second)]
    same, apart = (reward[0] > reward[1]) == (truth[0] > truth[1]), (truth[0] - truth[1]).abs()
    figures = {f"beyond_{tie}": _share(same[apart > tie]) for tie in TIES}
    return {"agreement": figures[f"beyond_{DOUBT}"]["share"], "tie": DOUBT, "agreement_by_tie": figures}


def _share(same: Tensor) -> dict[str, float]:
    return {"share": float(same.float().mean()), "pairs": len(same)}

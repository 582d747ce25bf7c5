"""Stage 3 of the toy's weights: a tiny CLIP that learns to prefer, as PickScore did from people.

It sees pairs of pictures for one caption and is told which is better, by the oracle and with some labels flipped. It
scores exp(logit_scale) * cos and is trained by softmax cross-entropy over each pair. What it never sees it can be wrong
about, so a generator pushed far enough will fool it: an honest proxy.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from draftcli.toy import oracle
from draftcli.toy.tokenizer import MAX_TOKENS, save_tokenizer
from draftcli.toy.train_sdxl import draw, open_pipeline, text_config
from draftcli.toy.training import device, fit, paint, to_float
from draftcli.toy.world import ATTRIBUTES, Scene, caption, change, held_out_scenes, is_held_out, training_scenes

PRETRAIN_STEPS = 600
TIE = 0.02  # oracle scores closer than this are a tie
LABEL_NOISE = 0.10  # share of preferences that are flipped
PIXEL_NOISE = 0.03
SHIFT = 1  # pixels: pictures are moved about, so that the reward's gradient does not hang on exact positions
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
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
    "image_mean": MEAN,
    "image_std": STD,
    "do_convert_rgb": True,
}
BASE_SAMPLES = 4
GROUP = 4  # pictures compared for one caption: six pairs


@dataclass
class Gallery:
    """Pictures with the scene each was meant to show; `of_scene[i]` are the rows of scene i's pictures."""

    pictures: torch.Tensor  # (P, 3, 64, 64) uint8
    reading: oracle.Reading
    scenes: list[Scene]
    of_scene: torch.Tensor  # (S, 7): the four base samples first
    neighbours: list[np.ndarray]


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
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def train_reward(
    model_folder: Path, folder: Path, seed: int, steps: int, scenes: int = 640, groups: int = 24, check: int = 480
) -> dict[str, float]:
    """Draw with the base, train the reward on preferences, save it to `folder`; returns the measured figures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipe = open_pipeline(model_folder)
    tokenizer = save_tokenizer(folder)
    clip = new_clip(tokenizer).to(device()).train()
    pretrained = pretrain(clip, tokenizer, rng, 3 if steps < 10 else PRETRAIN_STEPS)
    gallery = make_gallery(pipe, training_scenes()[:scenes], seed, rng)

    def loss(step: int) -> torch.Tensor:
        rows, asked = _ask(gallery, groups, rng)
        seen, read = embed(clip, augment(to_float(gallery.pictures[rows.flatten()])), tokenizer, asked)
        logits = scale(clip) * (seen * read.repeat_interleave(GROUP, dim=0)).sum(-1)
        truth = oracle.weigh(oracle.judge(gallery.reading[rows.flatten()], [s for s in asked for _ in range(GROUP)]))
        return preference_loss(logits.view(-1, GROUP), truth.view(-1, GROUP).to(logits.device))

    seconds = fit(clip.parameters(), loss, steps, lr=5e-4, name="reward")
    clip.eval()
    clip.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    figures = agreement(clip.float(), tokenizer, pipe, seed, check)
    made = {
        "pretraining_steps": PRETRAIN_STEPS,
        "pretraining_seconds": pretrained,
        "steps": steps,
        "seconds": seconds,
    }
    return made | {"pairs_a_step": groups * 6, "label_noise": LABEL_NOISE} | figures


def pretrain(clip: CLIPModel, tokenizer: CLIPTokenizer, rng: np.random.Generator, steps: int) -> float:
    """First learn which caption belongs to which picture, as CLIP did before PickScore; returns the seconds.

    A batch is of families: a scene and three others that each differ from it in one attribute. Among unrelated scenes
    colour and shape would be enough to tell, and place and size would never be learnt.
    """
    families, training = 16, training_scenes()
    scenes = [member for _ in range(families * (steps // 2 + 1)) for member in _family(training, rng)]
    pictures = paint(scenes, rng, wear=1.0)

    def loss(step: int) -> torch.Tensor:
        first = 4 * rng.choice(len(scenes) // 4, size=families, replace=False)
        rows = (first[:, None] + np.arange(4)).flatten()
        images = augment(to_float(pictures[torch.from_numpy(rows)]))
        seen, read = embed(clip, images, tokenizer, [scenes[i] for i in rows])
        logits = scale(clip) * seen @ read.T
        pairs = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    return fit(clip.parameters(), loss, steps, lr=1e-3, name="reward, captions")


def _family(training: list[Scene], rng: np.random.Generator) -> list[Scene]:
    family = [training[rng.integers(len(training))]]
    while len(family) < 4:
        other = change(family[0], str(rng.choice(ATTRIBUTES)), rng)
        if not is_held_out(other) and other not in family:
            family.append(other)
    return family


def make_gallery(pipe: Any, scenes: list[Scene], seed: int, rng: np.random.Generator) -> Gallery:
    """For each scene four base samples, a render, a render with one attribute changed, and a spoilt base sample."""
    prompts = [caption(scene) for scene in scenes]
    base = (draw(pipe, prompts * BASE_SAMPLES, seed + 7777) * 255).round().to(torch.uint8)
    true = paint(scenes, rng, wear=1.0)
    wrong = paint([change(scene, str(rng.choice(ATTRIBUTES)), rng) for scene in scenes], rng, wear=1.0)
    pictures = torch.cat([base, true, wrong, spoil(base[: len(scenes)], rng)])
    with torch.no_grad():
        readings = [oracle.read(part.float() / 255) for part in pictures.split(256)]
    whole = oracle.Reading(*(torch.cat(parts) for parts in zip(*(vars(r).values() for r in readings), strict=True)))
    of_scene = torch.arange(len(pictures)).view(-1, len(scenes)).T
    return Gallery(pictures, whole, scenes, of_scene, _neighbours(scenes))


def _neighbours(scenes: list[Scene]) -> list[np.ndarray]:
    """For each scene the others that differ from it in one attribute (or, where there are none, all)."""
    values = np.array([[getattr(scene, name) for name in ATTRIBUTES] for scene in scenes])
    apart = [(values != row).sum(1) for row in values]
    return [np.flatnonzero(d == 1) if (d == 1).any() else np.arange(len(scenes)) for d in apart]


def spoil(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Copies that are blurred, noisy, faded or of another tint; uint8 in, uint8 out."""
    spoilt = [_spoil(picture, int(rng.integers(4)), rng.uniform(0.3, 1.0), rng) for picture in pictures.float() / 255]
    return (torch.stack(spoilt).clamp(0, 1) * 255).round().to(torch.uint8)


def _spoil(picture: torch.Tensor, kind: int, strength: float, rng: np.random.Generator) -> torch.Tensor:
    if kind == 0:
        small = F.interpolate(picture[None], scale_factor=1 / (1 + 2 * strength), mode="area")
        return F.interpolate(small, picture.shape[-2:], mode="bicubic")[0]
    if kind == 1:
        return picture + 0.15 * strength * torch.from_numpy(rng.standard_normal(picture.shape)).float()
    if kind == 2:
        return picture + 0.7 * strength * (picture.mean(0, keepdim=True) - picture)
    return picture + 0.25 * strength * torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1))).float()


def embed(
    clip: CLIPModel, images: torch.Tensor, tokenizer: CLIPTokenizer, scenes: list[Scene]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images (B, 3, 64, 64) in [0, 1], and of the scenes' captions: (B, 64) and (S, 64)."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    seen = clip.visual_projection(clip.vision_model((images - mean) / std).pooler_output)
    tokens = tokenizer(
        [caption(s) for s in scenes], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).to(images.device)
    read = clip.text_projection(clip.text_model(**tokens).pooler_output)
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def scale(clip: CLIPModel) -> torch.Tensor:
    """exp(logit_scale), at most 100 as in CLIP."""
    return clip.logit_scale.exp().clamp(max=100)


def preference_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all pairs of each group, logits and truth (S, G); ties are left out, some labels flipped."""
    i, j = torch.triu_indices(logits.shape[1], logits.shape[1], offset=1, device=logits.device)
    lead = truth[:, i] - truth[:, j]
    sign = lead.sign() * (lead.abs() > TIE)
    flipped = torch.rand(sign.shape, device=sign.device) < LABEL_NOISE
    sign = torch.where(flipped, -sign, sign)
    losses = -F.logsigmoid(sign * (logits[:, i] - logits[:, j]))  # the softmax cross-entropy of two logits
    return (losses * sign.abs()).sum() / sign.abs().sum().clamp(min=1)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Each picture moved by up to a pixel, with a little noise."""
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    size = images.shape[-1]
    moves = torch.randint(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, moves, strict=True)])
    return moved + PIXEL_NOISE * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(moved)


@torch.no_grad()
def agreement(clip: CLIPModel, tokenizer: CLIPTokenizer, pipe: Any, seed: int, count: int) -> dict[str, float]:
    """How often reward and oracle prefer the same of two base samples, on held-out captions; ties left out."""
    scenes = (held_out_scenes() * 2)[:count]
    prompts = [caption(scene) for scene in scenes]
    first, second = (draw(pipe, prompts, seed + offset) for offset in (100_000, 200_000))
    reward = []
    for pictures in (first, second):
        seen, read = embed(clip, pictures.to(device()), tokenizer, scenes)
        reward.append((seen * read).sum(-1).cpu())
    truth = [oracle.score(x, prompts) for x in (first, second)]
    judged = (truth[0] - truth[1]).abs() > TIE
    same = ((reward[0] > reward[1]) == (truth[0] > truth[1]))[judged]
    return {"agreement": float(same.float().mean()), "judged_pairs": int(judged.sum()), "tie": TIE}


def _ask(gallery: Gallery, groups: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Scene]]:
    """Rows (groups, GROUP) of pictures to compare, and for each group the scene whose caption is asked about.

    Two base samples of the scene, one of a scene that differs in one attribute (or it would learn quality without
    reading the caption), and one other picture of the scene.
    """
    which = rng.integers(len(gallery.scenes), size=groups)
    other = [int(rng.choice(gallery.neighbours[i])) for i in which]
    pick = [[*rng.permutation(BASE_SAMPLES)[:2], BASE_SAMPLES + rng.integers(3)] for _ in which]
    mine = gallery.of_scene[which].gather(1, torch.from_numpy(np.array(pick)))
    rows = torch.cat([mine, gallery.of_scene[other, :1]], dim=1)
    asked = [gallery.scenes[k if rng.uniform() < 0.2 else i] for i, k in zip(which, other, strict=True)]
    return rows, asked

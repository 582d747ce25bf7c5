"""Stage 3 of the toy's weights: a tiny CLIP that learns to prefer, as PickScore did from people.

First it learns which caption belongs to which picture, as CLIP had before PickScore. Then it sees pairs of pictures for
one caption, and the oracle, made to err on close pairs as people do, says which is better: it scores
exp(logit_scale) * cos and is trained by cross-entropy over each pair. It can be wrong about what it never sees, so a
generator pushed far enough will fool it: an honest proxy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from draftcli.preferences.agreement import agrees
from draftcli.preferences.fit import preference_loss
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.pixels import Preprocess
from draftcli.toy import oracle
from draftcli.toy.judged import (
    FAMILY,
    SCALES,
    draw_families,
    groups,
    new_families,
    own,
    some_of_each,
    some_retouched,
)
from draftcli.toy.tokenizer import save_tokenizer
from draftcli.toy.train_sdxl import draw_pictures, open_pipeline, text_config
from draftcli.toy.training import device, minimise, paint, to_float
from draftcli.toy.world import Scene, caption, held_out_scenes

PRETRAIN_STEPS = 600
DOUBT = 0.05  # the better of two is preferred by a share of sigmoid(lead / DOUBT), as in Bradley and Terry
TIES = (0.02, 0.05, 0.1)  # agreement is measured on pairs whose oracle scores are further apart than this
OWN, FINE = 2.0, 4.0  # weights of a caption's own pictures among its family's, and of samples beside retouched ones
DESCRIPTION, MATCHING = 2.0, 0.25  # weights of the two losses that keep it seeing while it learns to prefer
PIXEL_NOISE = 0.015
SHIFT = 1  # pixels: pictures are moved about, so that the reward's gradient does not depend on exact positions


def train_reward(
    model_folder: Path, folder: Path, seed: int, steps: int, families: int = 240, batch: int = 6, check: int = 480
) -> dict[str, Any]:
    """Draw with the base, train the reward on preferences, save it to `folder`; returns the measured figures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipe = open_pipeline(model_folder)
    clip = new_clip(save_tokenizer(folder)).to(device())
    pretraining = min(PRETRAIN_STEPS, steps)
    match = matching(clip, pretraining, rng)
    pretrained = minimise(clip.parameters(), lambda step: match(16), pretraining, lr=1e-3, name="reward, captions")
    judged = draw_families(pipe, families, seed, rng)
    describe = nn.Linear(clip.clip.config.vision_config.hidden_size, judged.description.shape[-1]).to(device())

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.choice(families, size=batch, replace=False))
        rows = some_of_each(judged.pictures.shape[1], batch, rng)
        pictures, described = judged.pictures[chosen[:, None], rows], judged.description[chosen[:, None], rows]
        truth = judged.truth[chosen].gather(2, rows[:, None].expand(-1, FAMILY, -1)).to(device())
        pooled = clip.pool(augmented(clip, pictures.flatten(0, 1)))
        rows_of_scenes = groups(chosen, FAMILY).flatten()
        texts = embed_captions(clip, [judged.scenes[i] for i in rows_of_scenes])
        seen, asked = clip.project(pooled).unflatten(0, (batch, -1)), texts.unflatten(0, (batch, -1))
        logits = clip.scale * torch.einsum("fce,fpe->fcp", asked, seen)
        preference = loss_over_pairs(logits, truth) + OWN * loss_over_pairs(own(logits), own(truth))
        pictures, truth = some_retouched(judged, rows_of_scenes, rng)
        seen = clip.embed_pixels(augmented(clip, pictures.flatten(0, 1))).unflatten(0, pictures.shape[:2])
        logits = clip.scale * torch.einsum("se,spe->sp", texts, seen)
        preference = preference + FINE * loss_over_pairs(logits, truth.to(device()))
        description = F.mse_loss(describe(pooled), described.flatten(0, 1).to(device()))
        return preference + DESCRIPTION * description + MATCHING * match(4)

    seconds = minimise([*clip.parameters(), *describe.parameters()], loss, steps, lr=5e-4, name="reward, preferences")
    clip.half().save(folder)
    return {
        "pretraining_steps": pretraining,
        "pretraining_seconds": pretrained,
        "steps": steps,
        "seconds": seconds,
        "base_samples": families * FAMILY * len(SCALES),
        "doubt": DOUBT,
        **agreement(clip.float(), pipe, seed, check),
    }


def new_clip(tokenizer: CLIPTokenizer) -> CLIPReward:
    """CLIP in small, 0.9 M parameters, smooth in its pixels (gelu); all of it is trained."""
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
    reward = CLIPReward("toy", clip, tokenizer, Preprocess(64, "crop", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    return reward.requires_grad_(True)


def waves(edge: int, width: int) -> Tensor:
    """Sines and cosines of the positions on an `edge` x `edge` grid: (edge^2, width), as in many vision transformers.

    Added to positions that start random and small, which are lost beside the colours: place is then never learnt.
    """
    frequencies = math.pi / edge * 2 ** torch.linspace(0, math.log2(edge), width // 4)
    angles = (torch.arange(edge) + 0.5)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, edge, -1), along[None].expand(edge, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def embed_captions(clip: CLIPReward, scenes: Sequence[Scene]) -> Tensor:
    """Unit vectors (B, 64) of the scenes' captions."""
    return clip.embed_words([caption(scene) for scene in scenes], "longest")


def matching(clip: CLIPReward, steps: int, rng: np.random.Generator) -> Callable[[int], Tensor]:
    """CLIP's own loss as a function of the number of families in the batch: which caption belongs to which render?"""
    scenes = new_families(8 * (steps + 2), rng)  # in the first stage each is seen about twice
    pictures = paint(scenes, rng, wear=1.0)

    def loss(families: int) -> Tensor:
        chosen = rng.choice(len(scenes) // FAMILY, size=families, replace=False)
        rows = groups(torch.from_numpy(chosen), FAMILY).flatten()
        seen = clip.embed_pixels(augmented(clip, pictures[rows]))
        logits = clip.scale * seen @ embed_captions(clip, [scenes[i] for i in rows]).T
        pairs = torch.arange(len(rows), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    return loss


def loss_over_pairs(logits: Tensor, truth: Tensor) -> Tensor:
    """`preference_loss` over all pairs of a caption's pictures, logits and truth (..., P).

    A label is the share of people who would prefer the first, each erring with `DOUBT`: a single person's choice costs
    steps and teaches the same.
    """
    i, j = torch.triu_indices(logits.shape[-1], logits.shape[-1], offset=1, device=logits.device)
    better = torch.sigmoid((truth[..., i] - truth[..., j]) / DOUBT)
    return preference_loss(logits[..., i] - logits[..., j], better)


def augmented(clip: CLIPReward, pictures: Tensor) -> Tensor:
    """What `clip` sees of pictures (B, 3, 64, 64) uint8, each moved by up to a pixel, with a little noise."""
    images = to_float(pictures)
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    size = images.shape[-1]
    moves = torch.randint(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, moves, strict=True)])
    noisy = moved + PIXEL_NOISE * torch.rand(len(images), 1, 1, 1, device=images.device) * torch.randn_like(moved)
    return (noisy - clip.preprocess.mean) / clip.preprocess.std


@torch.no_grad()
def agreement(clip: CLIPReward, pipe: Any, seed: int, count: int) -> dict[str, Any]:
    """How often reward and oracle prefer the same of two base samples, on held-out captions; ties left out.

    A tie is a pair closer than `DOUBT`, on which the labels of training err more than one time in four; the figure is
    given for other bounds as well.
    """
    scenes = (held_out_scenes() * 2)[:count]
    prompts = [caption(scene) for scene in scenes]
    shown = [draw_pictures(pipe, prompts, seed + offset) for offset in (100_000, 200_000)]
    rewards = [clip(pictures.to(device()), prompts).cpu() for pictures in shown]
    truth = [oracle.oracle_score(pictures, prompts) for pictures in shown]
    same = agrees(rewards[0] - rewards[1], (truth[0] > truth[1]).float())
    apart = (truth[0] - truth[1]).abs().numpy()
    found = {tie: same[apart > tie] for tie in TIES}
    figures = {f"beyond_{tie}": {"share": float(rows.mean()), "pairs": len(rows)} for tie, rows in found.items()}
    return {"agreement": figures[f"beyond_{DOUBT}"]["share"], "tie": DOUBT, "agreement_by_tie": figures}

"""The toy's second judge: trained as the learned reward was, from another seed, and then on images of networks that
went too far.

Another seed alone makes no better judge: trained on the same kinds of images, it is fooled by the same things. Held-out
rewards of real models have seen images of many networks (those of HPDv2, Wu et al. 2023, arXiv 2306.09341, come from
nine). So LoRAs are trained on the learned reward without penalty until it is hacked, and the judge is taught what the
oracle prefers among the base's images and theirs, at several strengths.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import draftcli
from draftcli.core.lora.adapters import LORA_FILE
from draftcli.rewards.clip import CLIPReward
from draftcli.toy import oracle
from draftcli.toy.judged import COMPARED, new_families
from draftcli.toy.reward import toy_judge
from draftcli.toy.train_reward import agreement, augmented, embed_captions, loss_over_pairs, train_reward
from draftcli.toy.train_sdxl import draw_pictures, open_pipeline
from draftcli.toy.training import device, minimise, paint, to_float
from draftcli.toy.world import Scene, caption, held_out_scenes

PUSHES = (  # settings that differ from the preset toy; none has a penalty
    [],
    ["draftp.truncation_steps=1", "optim.lr=3e-3"],
    ["draftp.truncation_steps=2", "optim.lr=2e-3"],
)
LORA_SCALES = (0.4, 0.7, 1.0)
STEPS, PUSHED_STEPS = 400, 60  # of the second part, and of each LoRA


def train_judge(
    model_folder: Path, reward_folder: Path, folder: Path, seed: int, steps: int, **first: Any
) -> dict[str, Any]:
    """Train the judge and save it to `folder`, a CLIP as the learned reward is; returns the measured figures.

    Args:
        model_folder: the base.
        reward_folder: the learned reward, which the LoRAs are trained on.
        folder: for the judge.
        seed: of all of it; another than the learned reward's.
        steps: of the first part; see `train_reward`.
        first: what else `train_reward` takes. `families`: four captions each, of the second part as well.
    """
    figures = train_reward(model_folder, folder, seed, steps, **first)
    before = {key: figures[key] for key in ("agreement", "agreement_by_tie")}
    families = first.get("families", 240)
    after = teach_extremes(
        model_folder, reward_folder, folder, seed, min(steps, STEPS), families, min(steps, PUSHED_STEPS)
    )
    return figures | {"before_extremes": before} | after


def teach_extremes(
    model_folder: Path, reward_folder: Path, folder: Path, seed: int, steps: int, families: int, pushed_steps: int
) -> dict[str, Any]:
    """The second part: train the CLIP in `folder` on images of networks that went too far, and save it there."""
    rng = np.random.default_rng([seed, 1])
    pipe = open_pipeline(model_folder)
    scenes = new_families(families, rng)
    prompts = [caption(scene) for scene in scenes]
    kinds = [draw_pictures(pipe, prompts, seed + 500_000), to_float(paint(scenes, rng, wear=1.0)).cpu()]
    check = held_out_scenes()[: 4 * families]
    asked = [caption(scene) for scene in check]
    drawn = [draw_pictures(pipe, asked, seed + 600_000)]
    for number, settings in enumerate(PUSHES):
        with tempfile.TemporaryDirectory() as folder_of_run:
            lora = push(model_folder, reward_folder, Path(folder_of_run) / "run", settings, seed + number, pushed_steps)
            pipe.load_lora_weights(str(lora), weight_name=LORA_FILE, adapter_name="pushed")
        for strength in LORA_SCALES:
            pipe.set_adapters("pushed", strength)
            kinds.append(draw_pictures(pipe, prompts, seed + 10_000 * len(kinds)))
        drawn.append(draw_pictures(pipe, asked, seed + 600_000))
        pipe.unload_lora_weights()
    pictures = torch.stack([(images * 255).round().to(torch.uint8) for images in kinds], dim=1)
    truth = torch.stack([oracle.oracle_score(images, prompts) for images in kinds], dim=1)
    clip = toy_judge(folder).to(device()).requires_grad_(True)

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.choice(len(scenes), size=min(24, len(scenes)), replace=False))
        rows = torch.from_numpy(np.stack([rng.permutation(len(kinds))[:COMPARED] for _ in chosen]))
        seen = clip.embed_pixels(augmented(clip, pictures[chosen[:, None], rows].flatten(0, 1)))
        texts = embed_captions(clip, [scenes[i] for i in chosen])
        logits = clip.scale * torch.einsum("se,spe->sp", texts, seen.unflatten(0, (len(chosen), COMPARED)))
        return loss_over_pairs(logits, truth[chosen].gather(1, rows).to(logits))

    seconds = minimise(clip.parameters(), loss, steps, lr=3e-4, name="judge, networks that went too far")
    clip.half().save(folder)
    clip.float()
    return {
        "extremes": {"networks": len(PUSHES), "images": len(kinds) * len(scenes), "steps": steps, "seconds": seconds,
                     "means": _means(clip, drawn, check)},
        **agreement(clip, pipe, seed, len(check)),
    }  # fmt: skip


def push(model: Path, reward: Path, run: Path, settings: list[str], seed: int, steps: int) -> Path:
    """Train a LoRA on the learned reward without penalty; the folder in which diffusers finds it."""
    given = [
        f"model.pretrained={model}", f"rewards={{toy: {{pretrained: {reward}}}}}", "held_out_rewards=[]",
        "draftp.kl_coeff=0", "trainer.val_check_interval=0", f"trainer.seed={1000 + seed}",
        f"trainer.max_steps={steps}", "optim.sched.warmup_steps=0", "logging.trackers=[]", *settings,
    ]  # fmt: skip
    draftcli.train(draftcli.load_config("toy", given), run)
    return run / "final"


@torch.no_grad()
def _means(clip: CLIPReward, drawn: list[Tensor], scenes: list[Scene]) -> dict[str, list[float]]:
    """Mean scores by the judge and by the oracle of each batch of images, one image for every scene."""
    prompts = [caption(scene) for scene in scenes]
    judged = [float(clip(images.to(device()), prompts).mean()) for images in drawn]
    return {"judge": judged, "oracle": [float(oracle.oracle_score(images, prompts).mean()) for images in drawn]}

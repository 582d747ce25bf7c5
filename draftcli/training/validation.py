"""Validation: base beside tuned on held-out prompts at the same seeds, judged by trained and held-out rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.prompts import Prompt
from draftcli.rewards import Reward
from draftcli.runs import Run, disk_errors
from draftcli.sampling.draw import draw, plan
from draftcli.sampling.sheet import Cell, write_sheet

SHEET_CELLS = 12


class Validation:
    """Draws the base once and the tuned network each time; no random state of the training is touched.

    Args:
        model: tuned and base.
        rewards: by name; the first two are shown under the pictures.
        prompts: held out from training.
    """

    def __init__(self, model: SDXLDRaFTPModel, rewards: dict[str, Reward], prompts: Sequence[Prompt]) -> None:
        cfg = model.cfg
        self.model, self.rewards = model, rewards
        size = (cfg.sampling.height, cfg.sampling.width)
        self.pictures = plan(prompts, cfg.data.validation_images, cfg.trainer.seed, size)
        self._base: tuple[Tensor, dict[str, np.ndarray]] | None = None

    def __call__(self, run: Run, step: int) -> tuple[dict[str, Any], Any]:
        """Validate the network as it is now and write the sheet of `step`.

        Returns:
            {"step", "images", "rewards": {name: {base, tuned, difference, low, high}}}, where low and high bound the
            paired bootstrap 95 % interval of the mean of tuned minus base; and the path of the sheet.
        """
        if self._base is None:
            self._base = self._judge("base")
        base, base_scores = self._base
        tuned, tuned_scores = self._judge("tuned")
        figures = {name: paired(base_scores[name], tuned_scores[name]) for name in self.rewards}
        sheet = run.samples / f"step-{step:06d}-sheet.png"
        # Prompts spread over the whole set rather than its first ones, so that the sheet stands for all of it.
        chosen = np.linspace(0, len(self.pictures) - 1, min(SHEET_CELLS, len(self.pictures))).round().astype(int)
        cells = [
            Cell(
                torch.stack([base[i], tuned[i]]),
                self.pictures[i].prompt.text,
                [self._note("base", base_scores, i), self._note("tuned", tuned_scores, i)],
            )
            for i in chosen
        ]
        with disk_errors(sheet):
            edge = min(512, max(160, *base.shape[-2:]))
            write_sheet(sheet, cells, f"base and tuned after {step} steps, same seeds", edge=edge)
        return {"step": step, "images": len(self.pictures), "rewards": figures}, sheet

    def _judge(self, kind: str) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Pictures (n, 3, H, W) and every reward's scores (n,)."""
        images: list[Tensor] = []
        scores: dict[str, list[np.ndarray]] = {name: [] for name in self.rewards}
        for batch, prompts in draw(self.model, self.pictures, kind, self.model.cfg.trainer.micro_batch_size):
            images.append(batch.cpu())
            with torch.no_grad():
                for name, reward in self.rewards.items():
                    scores[name].append(reward(batch, prompts).cpu().double().numpy())
        return torch.cat(images), {name: np.concatenate(parts) for name, parts in scores.items()}

    def _note(self, who: str, scores: dict[str, np.ndarray], i: int) -> str:
        return "  ".join([who, *(f"{values[i]:.2f}" for values in list(scores.values())[:2])])


def paired(base: Sequence[float] | np.ndarray, tuned: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Means of two paired samples (n,), their difference, and its paired bootstrap 95 % interval (10,000 resamples).

    Pairs with a NaN (a reward that has nothing to say) are left out; with fewer than two pairs the interval is NaN.
    """
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    said = ~np.isnan(base + tuned)
    base, tuned = base[said], tuned[said]
    difference = tuned - base
    low = high = float("nan")
    if len(difference) > 1:
        if np.ptp(difference) == 0:
            low = high = float(difference[0])
        else:
            interval = bootstrap(
                (difference,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0), batch=500
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
    mean = [float(x.mean()) if len(x) else float("nan") for x in (base, tuned, difference)]
    return {"base": mean[0], "tuned": mean[1], "difference": mean[2], "low": low, "high": high, "n": int(said.sum())}

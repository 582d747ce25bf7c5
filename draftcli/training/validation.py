"""Validation: base beside tuned on held-out prompts at the same seeds, judged by trained and held-out rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftcli import __version__
from draftcli.config import Config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.ranks import Ranks
from draftcli.metrics.statistics import paired
from draftcli.metrics.thumbnails import EDGE, pairwise_distance, thumbnail
from draftcli.prompts import Prompt, fingerprint
from draftcli.rewards import Reward
from draftcli.runs import Run, disk_errors, write_aside
from draftcli.sampling.draw import batches, draw, plan
from draftcli.sampling.sheet import Cell, spread, write_sheet

SHEET_CELLS = 12


@dataclass
class Judged:
    """What is kept of n pictures: memory does not grow with their size.

    Attributes:
        scores: (n, R) float64, a column for each reward.
        thumbnails: (n, D).
        shown: those on the sheet, (3, H, W) uint8, by number.
    """

    scores: Tensor
    thumbnails: Tensor
    shown: dict[int, Tensor]


class Validation:
    """Draws the base once and the tuned network each time; no random state of the training is touched.

    The base's part is kept in samples/base.safetensors, so that a resumed run does not draw it again. Several processes
    share the pictures.

    Args:
        model: tuned and base.
        rewards: by name; the first two are shown under the pictures.
        prompts: held out from training.
        ranks: the processes that validate together.
    """

    def __init__(
        self, model: SDXLDRaFTPModel, rewards: dict[str, Reward], prompts: Sequence[Prompt], ranks: Ranks | None = None
    ) -> None:
        cfg = model.cfg
        self.model, self.rewards, self.ranks = model, rewards, ranks or Ranks()
        size = (cfg.sampling.height, cfg.sampling.width)
        self.pictures = plan(prompts, cfg.data.validation_images, cfg.trainer.seed, size)
        count = len(self.pictures)
        self._chosen = spread(count, SHEET_CELLS)
        images = cfg.data.validation_images
        # Pictures of one prompt where there are several of each, else all of them.
        self._groups = [i // images if images > 1 else 0 for i in range(count)]
        self._made_by = _made_by(cfg, prompts, list(rewards))
        self._base: Judged | None = None

    def __call__(
        self, run: Run, step: int, progress: Callable[[str], None] = lambda text: None
    ) -> tuple[dict[str, Any], Path]:
        """Validate the network as it is now and write the sheet of `step`.

        Returns:
            {"step", "images", "rewards": {name: figures}, "diversity": figures}, where figures are those of `paired`,
            and diversity is the mean distance of two pictures of one prompt (of all prompts, where each has one
            picture); and the path of the sheet.
        """
        if self._base is None:
            self._base = self._kept(run.base) or self._judge("base", progress)
            with self.ranks.all_or_none():
                if self.ranks.is_main and not run.base.is_file():
                    self._keep(run.base, self._base)
        # Before the first step the tuned network is the base: there is nothing to draw.
        base, tuned = self._base, self._judge("tuned", progress) if step else self._base
        figures = {
            name: paired(base.scores[:, i].numpy(), tuned.scores[:, i].numpy()) for i, name in enumerate(self.rewards)
        }
        diversity = paired(*(pairwise_distance(judged.thumbnails, self._groups) for judged in (base, tuned)))
        sheet = run.samples / f"step-{step:06d}-sheet.png"
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                self._write_sheet(sheet, step, base, tuned)
        return {"step": step, "images": len(self.pictures), "rewards": figures, "diversity": diversity}, sheet

    def _judge(self, kind: str, progress: Callable[[str], None]) -> Judged:
        count, mine = len(self.pictures), self.ranks.share(len(self.pictures))
        judged = Judged(
            torch.zeros(count, len(self.rewards), dtype=torch.float64), torch.zeros(count, 3 * EDGE * EDGE), {}
        )
        with self.ranks.all_or_none(), torch.no_grad():
            done = mine.start
            pictures = self.pictures[mine.start : mine.stop]
            for images, prompts in draw(self.model, pictures, kind, self.model.cfg.trainer.micro_batch_size):
                rows = range(done, done + len(images))
                judged.thumbnails[rows.start : rows.stop] = thumbnail(images).cpu()
                for column, reward in enumerate(self.rewards.values()):
                    judged.scores[rows.start : rows.stop, column] = reward(images, prompts).cpu().double()
                for i in set(rows) & {*self._chosen}:
                    judged.shown[i] = (images[i - done].clamp(0, 1) * 255).round().byte().cpu().contiguous()
                done = rows.stop
                progress(f"validating: {kind} {done - mine.start}/{len(mine)}")
            if self.ranks.lockstep:
                self._draw_along(kind)
        self.ranks.sum_([judged.scores, judged.thumbnails])
        for i in self._chosen:
            picture = judged.shown.get(i, torch.zeros(3, *self.pictures[i].size, dtype=torch.uint8))
            self.ranks.sum_([picture])
            judged.shown[i] = picture
        return judged

    def _draw_along(self, kind: str) -> None:
        """Where the network is split every process uses it as often as the one with the most batches: draw along."""
        size = self.model.cfg.trainer.micro_batch_size
        shares = [self.ranks.share(len(self.pictures), rank) for rank in range(self.ranks.size)]
        counts = [len(list(batches(self.pictures[share.start : share.stop], size))) for share in shares]
        for _ in range(max(counts) - counts[self.ranks.rank]):
            for _ in draw(self.model, self.pictures[:1], kind, 1):
                pass

    def _keep(self, path: Path, base: Judged) -> None:
        tensors = {"scores": base.scores, "thumbnails": base.thumbnails}
        tensors |= {f"shown.{i}": picture for i, picture in base.shown.items()}
        with disk_errors(path):
            write_aside(path, lambda aside: save_file(tensors, aside, metadata={"made_by": self._made_by}))

    def _kept(self, path: Path) -> Judged | None:
        """The base's part from a former session, if it was made by the very same settings."""
        found = None
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("made_by") == self._made_by:
                        shown = {i: file.get_tensor(f"shown.{i}") for i in self._chosen}
                        found = Judged(file.get_tensor("scores"), file.get_tensor("thumbnails"), shown)
            except (OSError, SafetensorError):
                found = None  # damaged: drawn again
        if self.ranks.any(found is None):
            if self.ranks.is_main:
                path.unlink(missing_ok=True)
            return None
        return found

    def _write_sheet(self, path: Path, step: int, base: Judged, tuned: Judged) -> None:
        cells = [
            Cell(
                torch.stack([base.shown[i], tuned.shown[i]]).float() / 255,
                self.pictures[i].prompt.text,
                [self._note("base", base, i), self._note("tuned", tuned, i)],
            )
            for i in self._chosen
        ]
        edge = min(512, max(160, *(max(cell.images.shape[-2:]) for cell in cells)))
        with disk_errors(path):
            write_sheet(path, cells, f"base and tuned after {step} steps, same seeds", edge=edge)

    def _note(self, who: str, judged: Judged, i: int) -> str:
        return "  ".join([who, *(f"{float(score):.2f}" for score in judged.scores[i, :2])])


def _made_by(cfg: Config, prompts: Sequence[Prompt], rewards: list[str]) -> str:
    """Everything the base's pictures and scores hang on."""
    settings = cfg.model_dump(mode="json", exclude={"model": {"offload_text_encoders"}})
    facts = [settings["model"], settings["sampling"], settings["rewards"], rewards, cfg.data.validation_images]
    facts += [cfg.trainer.seed, fingerprint(prompts), __version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def score(result: dict[str, Any], trained: dict[str, float], held_out: Sequence[str]) -> float:
    """How good a validation is: the first held-out reward, else the weighted sum of the trained ones."""
    rewards = result["rewards"]
    if held_out:
        return rewards[held_out[0]]["tuned"]
    return sum(weight * rewards[name]["tuned"] for name, weight in trained.items())

"""Validation: base beside tuned on held-out prompts at the same seeds, judged by trained and held-out rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draftcli import __version__
from draftcli.core.backward import Work
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks
from draftcli.metrics.signs import SIGNS, near_duplicates
from draftcli.metrics.statistics import paired, ratio
from draftcli.metrics.thumbnails import THUMBNAIL_EDGE, pairwise_distance, thumbnail
from draftcli.prompts import Prompt
from draftcli.rewards import Reward, WeightedSum
from draftcli.rewards.fingerprint import code_and_weights, settings_and_files
from draftcli.runs import Run, ValidationLine, disk_errors, write_aside
from draftcli.sampling.draw import Column, batches, draw, plan
from draftcli.sampling.identity import Provenance
from draftcli.sampling.sheet import Cell, made_by_line, score_line, sheet_edge, spread, to_pil, write_sheet

VALIDATION_CELLS = 12


@dataclass
class Judged:
    """What is kept of n pictures: memory does not grow with their size.

    Attributes:
        scores: (n, R) float64, a column for each reward.
        signs: (n, S) float64, a column for each of `metrics.signs.SIGNS`.
        thumbnails: (n, D).
        shown: those on the sheet, (3, H, W) uint8, by number.
    """

    scores: Tensor
    signs: Tensor
    thumbnails: Tensor
    shown: dict[int, Tensor]


class Validation:
    """Draws the base once and the tuned network each time; no random state of the training is touched.

    The base's part is kept in samples/base.safetensors, so that a resumed run does not draw it again, and where
    data.validation_cache is a folder in there, for other runs. Several processes share the pictures.

    Args:
        model: tuned and base.
        trained: the rewards that are trained on, on the model's device; of them and of those that are held out, the
            first two are shown under the pictures.
        held_out: the others. They are on the model's device while they judge, and no longer.
        prompts: held out from training.
        ranks: the processes that validate together.
    """

    def __init__(
        self,
        model: DRaFTPModel,
        trained: WeightedSum,
        held_out: WeightedSum,
        prompts: Sequence[Prompt],
        ranks: Ranks | None = None,
    ) -> None:
        cfg = model.cfg
        self.model, self.trained, self.held_out, self.ranks = model, trained, held_out, ranks or Ranks()
        self.rewards: Mapping[str, Reward] = {**trained.rewards, **held_out.rewards}
        size = (cfg.sampling.height, cfg.sampling.width)
        self.pictures = plan(prompts, cfg.data.validation_images, cfg.trainer.seed, size)
        count = len(self.pictures)
        self._chosen = spread(count, VALIDATION_CELLS)
        images = cfg.data.validation_images
        self._prompts = [i // images for i in range(count)]
        # Pictures of one prompt where there are several of each, else all of them.
        self._groups = self._prompts if images > 1 else [0] * count
        self._base: Judged | None = None
        # Walked together as training walks them; decoded and judged in the portions of its gradient.
        whole = cfg.trainer.global_batch_size // self.ranks.size
        self._together, self._micro = min(Work.of(cfg).prefix, whole), cfg.trainer.micro_batch_size

    def __call__(
        self,
        run: Run,
        step: int,
        progress: Callable[[str], None] = lambda text: None,
        give_up_if_late: Callable[[], None] = lambda: None,
    ) -> tuple[ValidationLine, Path]:
        """Validate the network as it is now and write the sheet of `step` (collective).

        Args:
            run: gets the sheet, and the base's part in samples/base.safetensors.
            step: the last finished one.
            progress: called with a few words after each batch.
            give_up_if_late: called after each batch; what it raises ends the validation.

        Returns:
            the line of validation.jsonl, with figures as `paired` gives them (diversity is the mean distance in pixels
            of two pictures of one prompt, or of all prompts where each has one picture; `kept`, `kept_low` and
            `kept_high` are its share of the base's); and the path of the sheet.
        """
        base, tuned = self._judge_both(run, step, progress, give_up_if_late)
        figures = {
            name: paired(base.scores[:, i].numpy(), tuned.scores[:, i].numpy(), self._prompts)
            for i, name in enumerate(self.rewards)
        }
        worth = [self._worth(judged, base) for judged in (base, tuned)]
        distances = [pairwise_distance(judged.thumbnails, self._groups) for judged in (base, tuned)]
        diversity, kept = paired(*distances), ratio(*distances)
        diversity |= {"kept": kept.mean, "kept_low": kept.low, "kept_high": kept.high}
        sheet = run.sheet(step)
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                self._write_sheet(sheet, run, step, base, tuned)
        line: ValidationLine = {
            "step": step,
            "images": len(self.pictures),
            "rewards": figures,
            "trained": paired(worth[0].numpy(), worth[1].numpy(), self._prompts),
            "diversity": diversity,
            "signs": self._signs(base, tuned),
        }
        return line, sheet

    def _worth(self, judged: Judged, base: Judged) -> Tensor:
        """(n,) what the images count in the training; see `WeightedSum.of_scores`."""
        scores, before = (
            {name: one.scores[:, i] for i, name in enumerate(self.rewards) if name in self.trained.rewards}
            for one in (judged, base)
        )
        return self.trained.of_scores(scores, before)

    @contextmanager
    def _held_out_on_device(self) -> Iterator[None]:
        self.held_out.to(self.model.runtime.device)
        try:
            yield
        finally:
            if not self.model.cfg.draftp.asks_held_out:  # else each training step asks them too
                self.held_out.to(torch.device("cpu"))

    def _judge_both(
        self, run: Run, step: int, progress: Callable[[str], None], give_up_if_late: Callable[[], None]
    ) -> tuple[Judged, Judged]:
        """Base and tuned network; the base's part is made once."""
        if self._base is None:
            made_by = self._made_by()
            places = [run.base, *self._shared(made_by)]
            found = next(filter(None, (self._kept(path, made_by) for path in places)), None)
            self._base = found or self._judge("base", progress, give_up_if_late)
            with self.ranks.all_or_none():
                for path in places if self.ranks.is_main else ():
                    if not path.is_file():
                        self._keep(path, self._base, made_by)
        # Before the first step the tuned network is the base, unless it goes on from a LoRA: there is nothing to draw.
        base = self._base
        tuned = self._judge("tuned", progress, give_up_if_late) if step or self.model.cfg.peft.init_from else base
        return base, tuned

    def _signs(self, base: Judged, tuned: Judged) -> dict[str, dict[str, float]]:
        """Figures of each sign, paired by picture."""
        both = (base, tuned)
        groups = self._prompts
        found = {
            name: paired(base.signs[:, i].numpy(), tuned.signs[:, i].numpy(), groups) for i, name in enumerate(SIGNS)
        }
        small, prompts = [one.thumbnails.double().numpy() for one in both], np.array(self._prompts)
        return {
            **found,
            "near_duplicates": paired(near_duplicates(small[0], prompts), near_duplicates(small[1], prompts), groups),
        }

    def _judge(self, kind: str, progress: Callable[[str], None], give_up_if_late: Callable[[], None]) -> Judged:
        count, mine = len(self.pictures), self.ranks.share(len(self.pictures))
        scores = torch.zeros(count, len(self.rewards), dtype=torch.float64)
        signs = torch.zeros(count, len(SIGNS), dtype=torch.float64)
        judged = Judged(scores, signs, torch.zeros(count, 3 * THUMBNAIL_EDGE**2), {})
        with self.ranks.all_or_none(), torch.no_grad():
            done = mine.start
            pictures = self.pictures[mine.start : mine.stop]
            for images, prompts in draw(self.model, pictures, kind, self._together):
                rows = range(done, done + len(images))
                judged.thumbnails[rows.start : rows.stop] = thumbnail(images).cpu()
                pixels = images.nan_to_num(0.0).clamp(0, 1).cpu().double().numpy()
                for column, sign in enumerate(SIGNS.values()):
                    signs[rows.start : rows.stop, column] = torch.from_numpy(sign(pixels))
                with self._held_out_on_device():
                    for i in range(0, len(images), self._micro):
                        some, texts = images[i : i + self._micro], prompts[i : i + self._micro]
                        scores[done + i : done + i + len(some)] = self._scores(some, texts)
                for i in set(rows) & {*self._chosen}:
                    judged.shown[i] = (images[i - done].clamp(0, 1) * 255).round().byte().cpu().contiguous()
                done = rows.stop
                progress(f"validating: {kind} {done - mine.start}/{len(mine)}")
                give_up_if_late()
            if self.ranks.lockstep:
                self._draw_along(kind)
        self.ranks.sum_([judged.scores, judged.signs, judged.thumbnails])
        for i in self._chosen:
            picture = judged.shown.get(i, torch.zeros(3, *self.pictures[i].size, dtype=torch.uint8))
            self.ranks.sum_([picture])
            judged.shown[i] = picture
        return judged

    def _scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B, R) float64, a column for each reward."""
        return torch.stack([reward(images, prompts).cpu().double() for reward in self.rewards.values()], dim=1)

    def _draw_along(self, kind: str) -> None:
        """Draw as often as the process with the most batches: using a network that is split is collective."""
        shares = [self.ranks.share(len(self.pictures), rank) for rank in range(self.ranks.size)]
        counts = [len(list(batches(self.pictures[share.start : share.stop], self._together))) for share in shares]
        for _ in range(max(counts) - counts[self.ranks.rank]):
            for _ in draw(self.model, self.pictures[:1], kind, 1):
                pass

    def _made_by(self) -> str:
        """A hash of everything that the base's pictures and their scores depend on (collective)."""
        provenance, base, cfg = Provenance(self.model), Column.of("base").on(self.model), self.model.cfg
        pictures = [provenance.key(picture, base) for picture in self.pictures]
        sources = {name: source for name, source in {**cfg.held_out, **cfg.rewards}.items() if name in self.rewards}
        judges: list[str] = []
        with self.ranks.all_or_none():
            if self.ranks.is_main:  # the other processes have the same ones
                judges = [f"{name} {code_and_weights(reward)}" for name, reward in self.rewards.items()]
                judges += [settings_and_files(sources)]
        facts = [pictures, self.ranks.broadcast(judges), __version__]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _shared(self, made_by: str) -> list[Path]:
        """The file that other runs find the base's part in, where a folder is given for it."""
        folder = self.model.cfg.data.validation_cache
        return [] if folder is None else [Path(folder) / f"{made_by[:32]}.safetensors"]

    def _keep(self, path: Path, base: Judged, made_by: str) -> None:
        tensors = {"scores": base.scores, "signs": base.signs, "thumbnails": base.thumbnails}
        tensors |= {f"shown.{i}": picture for i, picture in base.shown.items()}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, lambda aside: save_file(tensors, aside, metadata={"made_by": made_by}))

    def _kept(self, path: Path, made_by: str) -> Judged | None:
        """The base's part from a former session or another run, if the same settings made it from the same weights."""
        found = None
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("made_by") == made_by:
                        shown = {i: file.get_tensor(f"shown.{i}") for i in self._chosen}
                        scores, signs, small = map(file.get_tensor, ("scores", "signs", "thumbnails"))
                        found = Judged(scores, signs, small, shown)
            except (OSError, SafetensorError):
                found = None  # damaged: drawn again
        if self.ranks.any(found is None):
            if self.ranks.is_main:
                path.unlink(missing_ok=True)
            return None
        return found

    def _write_sheet(self, path: Path, run: Run, step: int, base: Judged, tuned: Judged) -> None:
        cells = []
        for prompt, numbers in groupby(self._chosen, lambda i: self.pictures[i].prompt):
            chosen = list(numbers)
            images = [judged.shown[i].float() / 255 for i in chosen for judged in (base, tuned)]
            notes = [
                note for i in chosen for note in (self._note("base", base, i), self._note("tuned", tuned, i, base))
            ]
            cells.append(Cell(list(map(to_pil, images)), prompt.text, notes, across=2))
        edge = sheet_edge(cells[0].images[0].size, min(512, max(max(i.size) for cell in cells for i in cell.images)))
        title = f"base and tuned after {step} steps, same seeds"
        note = "Brackets give the change from the base; higher is better. " + self._shown_of_all()
        with disk_errors(path):
            footer = made_by_line(run.folder.name, self.model.cfg.sampling.summary)
            write_sheet(path, cells, title, edge=edge, note=note.strip(), footer=footer)

    def _shown_of_all(self) -> str:
        shown, count = len(self._chosen), len(self.pictures)
        return "" if shown == count else f"{shown} of {count} pairs, evenly spread."

    def _note(self, who: str, judged: Judged, i: int, base: Judged | None = None) -> str:
        """A column's name, and the first two rewards' scores with the change against the base."""
        lines = [
            score_line(name, float(judged.scores[i, r]), None if base is None else float(base.scores[i, r]))
            for r, name in enumerate([*self.rewards][:2])
        ]
        return "\n".join([who, *lines])

"""One optimizer step, and everything that a checkpoint holds of it; nothing of files or terminals."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from draftcli.config import check_batch_size
from draftcli.core.batch import Batch, derived_seed
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks
from draftcli.core.engine.sharding import whole
from draftcli.errors import DraftpError
from draftcli.prompts import Batches, Prompt, Shuffled
from draftcli.rewards import WeightedSum
from draftcli.training.ema import Ema
from draftcli.training.optimizer import learning_rates, make_optimizer
from draftcli.training.walks import Walks

SKIPS_ALLOWED = 3  # steps in a row without an update before the run gives up
NEW_STATE = ("penalty", "walks")  # what checkpoints of the first version lack
NOT_FINITE = ("reward", "loss", "gradient")  # what can be wrong with a step, beside rewards that have nothing to say


class Stateful(Protocol):
    """What a checkpoint keeps the state of."""

    def state_dict(self) -> Any:
        """Small, and the same in every process."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Put back what `state_dict` gave."""
        ...


class Trainer:
    """The model, its optimizer, schedule, moving average and prompts.

    Every process of a run has one, with the same weights: each draws its part of the global batch, and the gradients
    are averaged.

    Args:
        model: what is trained.
        rewards: what it is trained for; the same object as `model.reward_model`.
        prompts: to train on.
        ranks: the processes that train together.

    Attributes:
        consistent: False while weights are being changed: what is in memory then is no state to save.
        skipped: steps without an update, over the whole run.
    """

    def __init__(
        self, model: DRaFTPModel, rewards: WeightedSum, prompts: Sequence[Prompt], ranks: Ranks | None = None
    ) -> None:
        cfg = self.cfg = model.cfg
        self.model, self.rewards, self.ranks = model, rewards, ranks or Ranks()
        check_batch_size(cfg, self.ranks.size)
        self.weights = model.trainable_parameters
        self.names = [name for name, p in model.unet.named_parameters() if p.requires_grad]
        self._index = {name: i for i, name in enumerate(self.names)}
        self.optimizer = make_optimizer(self.weights, cfg.optim)
        self.schedule = learning_rates(self.optimizer, cfg.optim.sched, cfg.trainer.max_steps)
        self.ema = None
        if cfg.ema.decay is not None:
            device = torch.device("cpu") if cfg.ema.device == "cpu" else None
            self.ema = Ema(self.weights, cfg.ema.decay, device)
        self.walks = Walks(model, self.ranks)
        self.batches = Batches(prompts, cfg.trainer.global_batch_size // cfg.draftp.reuse, cfg.trainer.seed)
        sizes = [*cfg.sampling.sizes] or [(cfg.sampling.height, cfg.sampling.width)]
        self.sizes = Shuffled(sizes, cfg.trainer.seed)
        self.skipped = self._skipped_in_a_row = self._step = 0
        self.consistent = True

    @property
    def is_skipping(self) -> bool:
        """Whether the last step changed nothing."""
        return self._skipped_in_a_row > 0

    def batch(self, number: int) -> Batch:
        """Pictures that belong together, counted from 1: those of step `number`, or with draftp.reuse one of its groups
        (`Walks`). Prompts and seeds by image number, one size for all.
        """
        prompts = self.batches[number - 1]
        first, seed = (number - 1) * len(prompts), self.cfg.trainer.seed
        seeds = [derived_seed(seed, "image", first + i) if p.seed is None else p.seed for i, p in enumerate(prompts)]
        size = prompts[0].size or self.sizes[number - 1]
        return Batch([p.text for p in prompts], seeds, size, [p.negative for p in prompts])

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step`; returns its line of metrics.jsonl.

        Raises:
            DraftpError: the third step in a row whose reward, loss or gradient is not finite, or on whose prompts no
                reward had anything to say.
        """
        began, self._step = time.perf_counter(), step
        self.ranks.heartbeat(f"step {step}, drawing its images")
        scaler, of_penalty = self.model.grad_scaler, self.model.penalty.figures()
        metrics, scores, weighed = self._gradient(step)
        of_penalty |= self.model.penalty.weights.figures(weighed)
        scaler.unscale_(self.optimizer)
        limit = self.cfg.trainer.gradient_clip_val
        norm = float(whole(nn.utils.clip_grad_norm_(self.weights, limit or math.inf)))
        rate = self.schedule.get_last_lr()[0]
        broken = [n for n, x in (("reward", metrics["reward"]), ("loss", metrics["loss"])) if not math.isfinite(x)]
        broken = broken or _silent(scores)
        searching = not broken and scaler.get_scale() > 1  # fp16 is still looking for a scale that fits
        if not math.isfinite(norm):
            broken.append("gradient")
        self.consistent = False
        if not broken:
            scaler.step(self.optimizer)
            self.schedule.step()
            if self.ema is not None:
                self.ema.update()
            self.rewards.end_step(scores)
            if metrics["kl_penalty"] is not None:
                self.model.penalty.end_step(metrics["kl_penalty"])
            self.model.penalty.weights.end_step(weighed)
        self.walks.end_step(step)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(broken, searching)
        self.consistent = True
        if broken and self.gave_up:
            raise DraftpError(_giving_up(broken[0], step, self._skipped_in_a_row))
        seconds = time.perf_counter() - began
        return {
            "step": step,
            **metrics,
            **of_penalty,
            **({f"reward/{name}": float(s.nanmean()) for name, s in scores.items()} if len(scores) > 1 else {}),
            **_spread(scores, {name: setting.weight for name, setting in self.cfg.rewards.items()}),
            **{f"silent/{name}": int(s.isnan().sum()) for name, s in scores.items() if s.isnan().any()},
            "grad_norm": norm,
            "lr": rate,
            "seconds": seconds,
            "images_per_second": self.cfg.trainer.global_batch_size / seconds,
            "memory_gib": _memory(self.model.runtime.device),
            **({"skipped": broken[0]} if broken else {}),
        }

    def _gradient(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Put the gradient of the whole batch into the weights: this process's part, averaged with the others'.

        Returns:
            the metrics of the whole batch, every reward's raw scores: (B,), with DRaFT-LV of all its samples; and
            likewise the scores by which the penalty weighs images.
        """
        count = self.cfg.trainer.global_batch_size
        mine = self.ranks.share(count)
        try:
            parts = [self.walks.part(step, number, self.batch(number)) for number in self.walks.groups(step)]
            with self.ranks.all_or_none():
                _, metrics = self.model.get_loss_and_metrics(parts)
                self.ranks.heartbeat(f"step {self._step}, waiting for the others' gradients")
        except BaseException:  # the step did not happen
            self.optimizer.zero_grad(set_to_none=True)
            self.rewards.pop_scores()
            self.model.penalty.weights.pop_scores()
            raise
        scores = _in_place(self.rewards.pop_scores(), mine, count)
        weighed = _in_place(self.model.penalty.weights.pop_scores(), mine, count)
        names = [name for name, value in metrics.items() if value is not None]
        values = torch.tensor([metrics[name] for name in names], dtype=torch.float64)
        self.ranks.sum_([*scores.values(), *weighed.values()])
        # FSDP has averaged the gradients of a split network already.
        gradients = [] if self.ranks.lockstep else [w.grad for w in self.weights if w.grad is not None]
        self.ranks.mean_([values, *gradients])
        metrics |= dict(zip(names, values.tolist(), strict=True))
        return metrics, scores, weighed

    def _count(self, broken: Sequence[str], searching: bool) -> None:
        self.skipped += bool(broken)
        if not broken:
            self._skipped_in_a_row = 0
        elif not searching:
            self._skipped_in_a_row += 1

    @property
    def gave_up(self) -> bool:
        """Whether `step` raised because too many steps in a row were not finite, in every process alike."""
        # With draftp.reuse m a bad image is in m steps, and as these change nothing it stays bad.
        return self._skipped_in_a_row >= SKIPS_ALLOWED + self.cfg.draftp.reuse - 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights and `tensors`: small, the same in every process."""
        optimizer = self._optimizer_state()
        states = optimizer["state"].items()
        small = {i: {k: v for k, v in own.items() if not self._is_large(i, k, v)} for i, own in states}
        return {
            "optimizer": {**optimizer, "state": small},
            "ema": None if self.ema is None else self.ema.updates,
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "skipped": [self.skipped, self._skipped_in_a_row],
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds that is as large as the weights, by `WEIGHT/what`: the optimizer's moments and the
        moving average; split over the processes where the weights are.
        """
        large: dict[str, Tensor] = {}
        for i, own in self._optimizer_state()["state"].items():
            large |= {f"{self.names[i]}/{k}": v for k, v in own.items() if self._is_large(i, k, v)}
        if self.ema is not None:
            large |= {f"{name}/average": t for name, t in zip(self.names, self.ema.tensors(), strict=True)}
        return large

    def weight_of(self, name: str) -> Tensor:
        """The weight that a tensor of `tensors` belongs to; it has its shape (but for the scales of 8-bit moments), and
        is split alike.

        Raises:
            KeyError: this model trains no such weight.
        """
        return self.weights[self._index[name.rpartition("/")[0]]]

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put back what `state` and `tensors` gave."""
        optimizer = state["optimizer"]
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            if what != "average":
                optimizer["state"].setdefault(self._index[name], {})[what] = tensor
        self.optimizer.load_state_dict(optimizer)
        if self.ema is not None:
            self.ema.load(state["ema"], [tensors[f"{name}/average"] for name in self.names])
        for name, part in self._stateful().items():
            part.load_state_dict({} if name in NEW_STATE and name not in state else state[name])
        self.skipped, self._skipped_in_a_row = state["skipped"]

    def _stateful(self) -> dict[str, Stateful]:
        """What has a small state of its own, by its name in checkpoints. A part that joins needs only its line here."""
        return {
            "schedule": self.schedule,
            "grad_scaler": self.model.grad_scaler,
            "rewards": self.rewards,
            "penalty": self.model.penalty,
            "walks": self.walks,
        }

    def _optimizer_state(self) -> dict[str, Any]:
        # torch's own, as bitsandbytes' hides its tensors one level down from FSDP1.
        return torch.optim.Optimizer.state_dict(self.optimizer)

    def _is_large(self, index: int, what: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return False
        return value.shape == self.weights[index].shape or what.startswith("absmax")


def _spread(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """The deviation over a step's images of the weighted sum of scores, (B,) by reward; of one image there is none.

    It falls where all images become alike in what is rewarded. What a reward does not say counts 0, as in the sum.
    """
    if not scores or len(next(iter(scores.values()))) < 2:
        return {}
    total = sum((weights.get(name, 1.0) * own.double().nan_to_num() for name, own in scores.items()), torch.zeros(()))
    return {"reward_std": float(total.std())}


def _in_place(own: Mapping[str, Tensor], mine: range, count: int) -> dict[str, Tensor]:
    """Scores of the images `mine`, or as many of each, among those of all `count` images, where others' are 0."""
    scores = {}
    for name, some in own.items():
        each = len(some) // len(mine)
        scores[name] = torch.zeros(count * each, dtype=some.dtype)
        scores[name][mine.start * each : mine.stop * each] = some
    return scores


def _silent(scores: Mapping[str, Tensor]) -> list[str]:
    """Why a step teaches nothing: every score (B,) of every reward is NaN. Empty where one is a number."""
    if not scores or not all(bool(score.isnan().all()) for score in scores.values()):
        return []
    return [f"reward {', '.join(scores)} gave no score"]


def why_skipped(reason: str) -> str:
    """The `skipped` of a line of metrics.jsonl as a sentence."""
    return f"its {reason} was not finite" if reason in NOT_FINITE else reason


def _giving_up(reason: str, step: int, skipped: int) -> str:
    if reason in NOT_FINITE:
        what, advice = f"{reason} was not finite", "a lower optim.lr, a higher draftp.kl_coeff or model.precision fp32"
    else:
        what, advice = reason, "prompts that a reward can score"
    return f"{what} in {skipped} steps in a row, the last is step {step}; try {advice}, in another --output"


def _memory(device: torch.device) -> float:
    """The most memory taken so far, in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

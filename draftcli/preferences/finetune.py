"""Fine-tuning a CLIP on preferences as PickScore was made of one (Kirstain et al. 2023, arXiv 2305.01569).

    loss = sum_i w_i * CE(softmax(logit_first, logit_second), label_i) / sum_i w_i,    w_i = 1 / pairs of prompt i

with logit = exp(logit_scale) * cosine of picture and prompt. All weights are trained, or a LoRA on the attention. After
each epoch the loss on validation prompts decides which weights are kept, and when to stop. The state of a training that
was interrupted waits beside the output, as safetensors and JSON; the same command goes on to the same weights.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftcli.disk import disk_errors, write_aside
from draftcli.errors import InputError, warn
from draftcli.preferences.fit import preference_loss
from draftcli.preferences.looking import as_tensor
from draftcli.preferences.pairs import Answers, Shown
from draftcli.preferences.writing import TrainedReward
from draftcli.progress import Activity
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.folders import ADAPTER_FILE

LEARNING_RATES = {"lora": 1e-4, "whole": 3e-6}  # whole: PickScore's own
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEST, VALIDATION = 0.2, 0.15  # shares of the prompts
WARM_UP = 20  # steps
MICRO = 8  # pairs whose graph is held at a time; changes memory alone


@dataclass(frozen=True)
class FineTuning:
    """How a CLIP is fine-tuned.

    Attributes:
        train: a LoRA, or all weights.
        epochs: at most so many.
        patience: stop after so many epochs without a better validation loss.
        batch_size: pairs a step.
        lr: learning rate; None: by what is trained.
        rank: of the LoRA.
        seed: of the split, the order and the LoRA's start.
    """

    train: Literal["lora", "whole"] = "lora"
    epochs: int = 20
    patience: int = 3
    batch_size: int = 16
    lr: float | None = None
    rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """Rows of the answers; those of one group are in one part."""

    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_groups(groups: np.ndarray, seed: int, where: str) -> Split:
    """Deal the groups (n,) out at random.

    Raises:
        InputError: there are fewer than three.
    """
    names = np.unique(groups)
    if len(names) < 3:
        raise InputError(
            f"{where}: {len(names)} prompts cannot be split into training, validation and test; add pairs of others, "
            "or train a head"
        )
    names = np.random.default_rng([seed, 3]).permutation(names)
    test, validation = (max(1, round(share * len(names))) for share in (TEST, VALIDATION))
    parts = names[test + validation :], names[test : test + validation], names[:test]
    return Split(*(np.flatnonzero(np.isin(groups, part)) for part in parts))


class PairScores:
    """The logits of pairs by the CLIP that is trained.

    Args:
        clip: the network, which is changed in place.
        preferences: the answers.
    """

    def __init__(self, clip: CLIPReward, preferences: Answers) -> None:
        self.clip, self.answers = clip, preferences.answers
        self.device = clip.preprocess.mean.device
        self.labels = torch.tensor([answer.label for answer in self.answers])
        counts = Counter(answer.prompt for answer in self.answers)
        self.shares = torch.tensor([1 / counts[answer.prompt] for answer in self.answers])

    def differences(self, rows: np.ndarray) -> Tensor:
        """(m,) logit of the first minus that of the second picture of each pair, differentiable in the weights."""
        pairs = [self.answers[row] for row in rows]
        pixels = torch.cat([self._pixels(shown) for side in zip(*((p.first, p.second) for p in pairs), strict=True)
                            for shown in side])  # fmt: skip
        texts = self.clip.embed_words([pair.prompt for pair in pairs])
        cosines = (self.clip.embed_pixels(pixels).unflatten(0, (2, -1)) * texts).sum(-1)
        return self.clip.clip.logit_scale.exp() * (cosines[0] - cosines[1])

    def _pixels(self, shown: Shown) -> Tensor:
        return self.clip.preprocess(as_tensor(shown).to(self.device))

    def losses(self, rows: np.ndarray) -> Tensor:
        """(m,) each pair's loss times its share."""
        difference = self.differences(rows)
        losses = preference_loss(difference, self.labels[rows].to(difference), "none")
        return losses * self.shares[rows].to(difference)

    def backward(self, rows: np.ndarray) -> float:
        """Add the gradient of the loss of a batch, a few pairs at a time; returns the loss."""
        total = float(self.shares[rows].sum())
        losses = []
        for part in _parts(rows):
            loss = self.losses(part).sum() / total
            loss.backward()
            losses.append(float(loss.detach()))
        return sum(losses)

    @torch.no_grad()
    def loss(self, rows: np.ndarray) -> float:
        """The loss of many pairs, without gradient."""
        return sum(float(self.losses(part).sum()) for part in _parts(rows)) / float(self.shares[rows].sum())

    @torch.no_grad()
    def odds(self, rows: np.ndarray) -> Tensor:
        """(m,) float64, without gradient."""
        return torch.cat([self.differences(part).double().cpu() for part in _parts(rows)])


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[i : i + MICRO] for i in range(0, len(rows), MICRO))


@dataclass
class TuningState:
    """How far a training is; what state.json holds.

    Attributes:
        asked: what it is a training of: another one does not go on from it.
        epoch: epochs done.
        best_epoch: after which the validation loss was least; 0: before training.
        losses: validation losses, the first before training.
        training_losses: mean loss of each epoch's batches.
    """

    asked: dict[str, Any]
    epoch: int
    best_epoch: int
    losses: list[float]
    training_losses: list[float]


def finetune(
    clip: CLIPReward, preferences: Answers, settings: FineTuning, asked: dict[str, Any], state: Path, activity: Activity
) -> TrainedReward:
    """Train, keep the weights with the least validation loss, and judge the test prompts with them.

    Args:
        clip: is changed in place.
        preferences: pictures of which are opened as they are needed.
        settings: see `FineTuning`.
        asked: what else it is a training of, as JSON.
        state: the folder where it waits while it is not finished.
        activity: shows how far it is.

    Raises:
        InputError: there are too few prompts.
        DraftpError: the state cannot be written.
    """
    split = split_groups(preferences.groups, settings.seed, preferences.where)
    network, trained = _trainable(clip, settings)
    rate = LEARNING_RATES[settings.train] if settings.lr is None else settings.lr
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    scores = PairScores(clip, preferences)
    asked = {**asked, "settings": asdict(settings)}
    found = _resume(state, asked, trained, optimizer)
    if found is None:
        activity.update("validation before training")
        found = (TuningState(asked, 0, 0, [scores.loss(split.validation)], []), _copies(trained))
    progress, best = found
    while progress.epoch < settings.epochs and progress.epoch - progress.best_epoch < settings.patience:
        progress.training_losses.append(_epoch(scores, split.training, optimizer, settings, rate, progress, activity))
        progress.epoch += 1
        progress.losses.append(scores.loss(split.validation))
        if progress.losses[-1] < progress.losses[progress.best_epoch]:
            progress.best_epoch, best = progress.epoch, _copies(trained)
        _save_state(state, progress, trained, best, optimizer)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    odds = scores.odds(split.test)

    def save(folder: Path) -> None:
        _save_network(folder, network, clip, settings)

    states = {
        "epochs": progress.epoch, "best_epoch": progress.best_epoch, "validation_losses": progress.losses,
        "training_losses": progress.training_losses,
        "split": {"training": len(split.training), "validation": len(split.validation), "test": len(split.test)},
    }  # fmt: skip
    return TrainedReward(save, odds, split.test, {len(split.training): odds}, {**asdict(settings), "lr": rate}, states)


def forget_state(state: Path) -> None:
    """Remove what an interrupted training has left, once it is finished."""
    shutil.rmtree(state, ignore_errors=True)


def _epoch(
    scores: PairScores, rows: np.ndarray, optimizer: torch.optim.Optimizer, settings: FineTuning, rate: float,
    progress: TuningState, activity: Activity,
) -> float:  # fmt: skip
    order = np.random.default_rng([settings.seed, 4, progress.epoch]).permutation(rows)
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    losses = []
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (progress.epoch * len(batches) + number + 1) / WARM_UP)
        optimizer.zero_grad(set_to_none=True)
        losses.append(scores.backward(batch))
        optimizer.step()
        activity.update(
            f"epoch {progress.epoch + 1} of at most {settings.epochs}, batch {number + 1} of {len(batches)}, loss "
            f"{losses[-1]:.3f}, best on validation {min(progress.losses):.3f}"
        )
    return float(np.mean(losses))


def _trainable(clip: CLIPReward, settings: FineTuning) -> tuple[Any, dict[str, Tensor]]:
    """The network as it is saved, and the parameters that are trained."""
    if settings.train == "whole":
        clip.clip.requires_grad_(True)
        return clip.clip, dict(clip.clip.named_parameters())
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS)
        network: Any = inject_adapter_in_model(config, clip.clip)
    return network, {name: p for name, p in network.named_parameters() if p.requires_grad}


def _copies(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def _save_state(
    state: Path, progress: TuningState, trained: dict[str, Tensor], best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    tensors = {f"now.{name}": tensor for name, tensor in _copies(trained).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone()

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")

    with disk_errors(state):
        state.parent.mkdir(parents=True, exist_ok=True)
        write_aside(state, write)


def _resume(
    state: Path, asked: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[TuningState, dict[str, Tensor]] | None:
    if not (state / "state.json").is_file():
        return None
    progress = TuningState(**json.loads((state / "state.json").read_text(encoding="utf-8")))
    if progress.asked != json.loads(json.dumps(asked)):
        warn(f"{state}: an unfinished training of other preferences or settings is replaced")
        return None
    tensors = load_file(state / "state.safetensors")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"now.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            # Adam keeps its count of steps on the CPU.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in ((key, tensors[f"optimizer.{key}.{name}"]) for key in keys)
            }
    return progress, {name: tensors[f"best.{name}"] for name in trained}


def _save_network(folder: Path, network: Any, clip: CLIPReward, settings: FineTuning) -> None:
    if settings.train == "lora":
        from peft import get_peft_model_state_dict

        network.peft_config["default"].save_pretrained(folder)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in get_peft_model_state_dict(network).items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        return
    clip.save(folder)

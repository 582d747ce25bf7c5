"""The training loop: validate if due, save if due, stop if last, one step, log. The same command again resumes."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from rich.console import Console
from torch import nn

from draftcli.config import Config
from draftcli.core.draftp import Batch, SDXLDRaFTPModel
from draftcli.core.runtime import derived_seed
from draftcli.errors import DraftpError, InputError
from draftcli.prompts import Prompt, Shuffled, read_prompts
from draftcli.rewards import WeightedSum, get_reward_model, load_reward
from draftcli.runs import Run, disk_errors, write_aside
from draftcli.training.card import model_card
from draftcli.training.checkpoint import load_newest, save_checkpoint, save_weights
from draftcli.training.log import RunLog
from draftcli.training.validation import Validation

SKIPS_ALLOWED = 3  # steps in a row without a finite gradient before the run gives up


@dataclass
class Outcome:
    """How a session of a run ended.

    Attributes:
        step: the last finished step.
        finished: whether that was trainer.max_steps.
        interrupted: whether a signal asked to leave.
        already_done: whether there was nothing to do.
        validation: the last validation, if there was one.
        written: files and folders that people will want to open, by what they are.
    """

    step: int
    finished: bool = False
    interrupted: bool = False
    already_done: bool = False
    validation: dict[str, Any] | None = None
    written: dict[str, Path] = field(default_factory=dict)


def train(cfg: Config, folder: Path, console: Console) -> Outcome:
    """Run, or resume, the training that `cfg` describes in `folder`.

    Raises:
        InputError: settings, prompts, model or folder are wrong.
        DraftpError: the disk refuses, or the loss is not finite three times in a row.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this version trains in one process; start it without torchrun or accelerate launch")
    prompts, held_out_prompts = read_prompts(cfg.data.prompts), []
    if cfg.data.validation_prompts:
        held_out_prompts = read_prompts(cfg.data.validation_prompts, "data.validation_prompts")
    rewards, held_out = _rewards(cfg)
    run = Run(folder)
    run.open(cfg)
    if run.final.is_dir() and run.step_folder(cfg.trainer.max_steps).is_dir():
        return Outcome(cfg.trainer.max_steps, finished=True, already_done=True, written={"weights": run.final})
    model = SDXLDRaFTPModel(cfg)
    console.print(f"running on {model.runtime.reason}", highlight=False)
    model.reward_model = rewards
    validation = None
    if cfg.trainer.val_check_interval and held_out_prompts:
        judges = {**rewards.rewards, **held_out.to(model.runtime.device).rewards}
        validation = Validation(model, judges, held_out_prompts)
    trainer = _Trainer(model, rewards, prompts)
    state, damaged = load_newest(run, model)
    for line in damaged:
        Console(stderr=True).print(f"warning: {line}", highlight=False, soft_wrap=True)
    first = 0
    if state is not None:
        trainer.load_state(state)
        first = state["step"]
        console.print(f"resuming {folder} after step {first}", highlight=False)
    if first > cfg.trainer.max_steps:
        raise InputError(f"trainer.max_steps is {cfg.trainer.max_steps}, and {folder} has taken {first} steps already")
    run.forget_after(first)
    log = RunLog(run, console, first, cfg.trainer.max_steps, cfg.logging.tensorboard)
    with log, stop_on_signal() as asked_to_stop:
        return _loop(run, trainer, validation, log, first, asked_to_stop)


def _rewards(cfg: Config) -> tuple[WeightedSum, WeightedSum]:
    """The trained and the held-out rewards, loaded before the large model so that mistakes show early."""
    rewards = get_reward_model(cfg)
    assert isinstance(rewards, WeightedSum)
    return rewards, WeightedSum({name: load_reward(name) for name in cfg.held_out_rewards})


def _loop(
    run: Run, trainer: _Trainer, validation: Validation | None, log: RunLog, first: int, asked_to_stop: list[int]
) -> Outcome:
    cfg, outcome = trainer.cfg.trainer, Outcome(first, validation=run.last_validation())
    last, pictures = cfg.max_steps, None
    # One round more than there are steps, so that the end validates and saves by the same lines as the middle.
    for step in range(first, last + 1):
        outcome.step = step
        due = cfg.val_check_interval and (step % cfg.val_check_interval == 0 or step == last)
        if validation is not None and due and (step > first or step == 0) and (step == last or not asked_to_stop):
            outcome.validation, pictures = validation(run, step)
            log.validation(outcome.validation)
            log.say(_in_words(outcome.validation))
        if step > first and (step % cfg.save_interval == 0 or step == last or asked_to_stop):
            save_checkpoint(run, step, trainer.model, trainer.state(), cfg.keep_checkpoints)
        if step == last or asked_to_stop:
            break
        log.step(trainer.step(step + 1))
    outcome.finished = outcome.step == last
    outcome.interrupted = not outcome.finished
    if outcome.finished:
        _write_final(run, trainer.model, outcome)
        outcome.written["weights"] = run.final
    outcome.written["metrics"] = run.metrics
    if pictures is not None:
        outcome.written["pictures"] = pictures
    return outcome


class _Trainer:
    """What one optimizer step needs, and nothing of files or terminals."""

    def __init__(self, model: SDXLDRaFTPModel, rewards: WeightedSum, prompts: list[Prompt]) -> None:
        cfg = self.cfg = model.cfg
        self.model, self.rewards = model, rewards
        self.optimizer = torch.optim.AdamW(
            model.trainable_parameters, lr=cfg.optim.lr, betas=cfg.optim.betas, weight_decay=cfg.optim.weight_decay
        )
        self.schedule = get_scheduler(
            cfg.optim.sched.name,
            self.optimizer,
            num_warmup_steps=cfg.optim.sched.warmup_steps,
            num_training_steps=cfg.trainer.max_steps,
        )
        self.prompts = Shuffled(prompts, cfg.trainer.seed)
        sizes = [*cfg.sampling.sizes] or [(cfg.sampling.height, cfg.sampling.width)]
        self.sizes = Shuffled(sizes, cfg.trainer.seed)
        self.skipped = 0

    def batch(self, step: int) -> Batch:
        """The pictures of `step`, counted from 1: prompts and seeds by image number, one size for all."""
        cfg, count = self.cfg, self.cfg.trainer.global_batch_size
        numbers = range((step - 1) * count, step * count)
        prompts = [self.prompts[n] for n in numbers]
        seeds = [derived_seed(cfg.trainer.seed, "image", n) for n in numbers]
        return Batch([p.text for p in prompts], seeds, self.sizes[step - 1], [p.negative for p in prompts])

    def step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step`; returns its line of metrics.jsonl."""
        began = time.perf_counter()
        batch, scaler = self.batch(step), self.model.grad_scaler
        _, metrics = self.model.get_loss_and_metrics(batch)
        scaler.unscale_(self.optimizer)
        limit = self.cfg.trainer.gradient_clip_val
        norm = float(nn.utils.clip_grad_norm_(self.model.trainable_parameters, limit or math.inf))
        rate = self.schedule.get_last_lr()[0]
        finite = math.isfinite(metrics["loss"])
        if finite and math.isfinite(norm):
            scaler.step(self.optimizer)
            self.schedule.step()
            self.skipped = 0
        elif not finite or scaler.get_scale() <= 1:  # above 1, fp16 is still looking for a scale that fits
            self.skipped += 1
            if self.skipped == SKIPS_ALLOWED:
                raise DraftpError(
                    f"loss or gradient was not finite in {SKIPS_ALLOWED} steps in a row, the last is step {step}; try "
                    "a lower optim.lr, a higher draftp.kl_coeff or model.precision fp32. The last checkpoint is good"
                )
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        scores = self.rewards.pop_scores()
        return {
            "step": step,
            **metrics,
            **({f"reward/{name}": float(s.mean()) for name, s in scores.items()} if len(scores) > 1 else {}),
            "grad_norm": norm,
            "lr": rate,
            "seconds": seconds,
            "images_per_second": len(batch) / seconds,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "grad_scaler": self.model.grad_scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.model.grad_scaler.load_state_dict(state["grad_scaler"])


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask to stop after the step at hand; a second one stops at once.

    Yields:
        a list that is empty until a signal has come.
    """
    received: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_final(run: Run, model: SDXLDRaFTPModel, outcome: Outcome) -> None:
    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_weights(model, folder)
        (folder / "README.md").write_text(model_card(model.cfg, outcome.validation), encoding="utf-8")

    with disk_errors(run.final):
        write_aside(run.final, write)


def _in_words(result: dict[str, Any]) -> str:
    parts = [
        f"{name} {figures['base']:.3f} -> {figures['tuned']:.3f} "
        f"({figures['difference']:+.3f}, 95 % {figures['low']:+.3f} to {figures['high']:+.3f})"
        for name, figures in result["rewards"].items()
    ]
    return f"validation after step {result['step']}, {result['images']} pictures, base -> tuned: " + "; ".join(parts)

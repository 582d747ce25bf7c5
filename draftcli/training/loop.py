"""The training loop: validate if due, save if due, stop if last, one step, log. The same command again resumes."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from draftcli.config import Config, check_batch_size
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine import sharding
from draftcli.core.engine.eight_bit import check_installed
from draftcli.core.engine.ranks import Ranks, open_ranks
from draftcli.core.gradient.mode import make_mode
from draftcli.errors import InputError
from draftcli.metrics.hacking import training_warning
from draftcli.prompts import Prompt, fingerprint, past_the_limit, read_prompts
from draftcli.rewards import WeightedSum, check_names, get_reward_model, load_held_out
from draftcli.runs import FINAL_STEP, Run, disk_errors, write_aside
from draftcli.training.card import model_card
from draftcli.training.checkpoint import load_newest, save_checkpoint, save_weights
from draftcli.training.live import LiveView
from draftcli.training.log import RunLog
from draftcli.training.nodes import check_alike, check_shared
from draftcli.training.optimizer import SMALLEST
from draftcli.training.step import Trainer
from draftcli.training.stop import DeadlinePassed, Stop, stop_on_signal
from draftcli.training.validation import Validation, score


@dataclass
class Outcome:
    """How a session of a run ended.

    Attributes:
        step: the last finished step.
        finished: whether that was trainer.max_steps.
        interrupted: whether a signal asked to leave.
        already_done: whether there was nothing to do.
        validation: the last validation, if there was one.
        skipped: steps of the run that changed nothing, as something in them was not finite.
        seconds: how long the session took.
        written: files and folders that people will want to open, by what they are.
    """

    step: int
    finished: bool = False
    interrupted: bool = False
    already_done: bool = False
    validation: dict[str, Any] | None = None
    skipped: int = 0
    seconds: float = 0.0
    written: dict[str, list[Path]] = field(default_factory=dict)


def train(cfg: Config, folder: Path, console: Console) -> Outcome:
    """Run, or resume, the training that `cfg` describes in `folder`.

    Raises:
        InputError: settings, prompts, model or folder are wrong, or another process is writing there.
        DraftpError: the disk refuses, or something was not finite three times in a row.
    """
    began = time.monotonic()
    timeout = timedelta(minutes=cfg.sharding.timeout_minutes)
    with open_ranks(timeout) as ranks, ExitStack() as held:
        if not ranks.is_main:
            console = Console(quiet=True)
        ranks.heartbeat("reading settings and prompts")
        with ranks.all_or_none():
            make_mode(cfg)
            check_installed(cfg)
            check_batch_size(cfg.trainer.micro_batch_size, cfg.trainer.global_batch_size, ranks.size)
            prompts, held_out_prompts = _prompts(cfg)
            check_names([*cfg.rewards, *cfg.held_out_rewards])
        run = Run(folder)
        check_alike(cfg, [prompts, held_out_prompts], ranks)
        with ranks.all_or_none():
            if ranks.is_main:
                held.enter_context(run.locked())
                for change in run.open(cfg):
                    console.print(f"since the last session {change}", highlight=False, markup=False, soft_wrap=True)
        check_shared(run, ranks)
        if ranks.broadcast(run.finished(cfg.trainer.max_steps)):
            return Outcome(cfg.trainer.max_steps, finished=True, already_done=True, written=_written(run))
        ranks.heartbeat("loading the networks")
        with ranks.all_or_none():
            session = _Session(cfg, run, prompts, held_out_prompts, ranks, console)
        with ranks.all_or_none():
            session.start()
        with session, stop_on_signal(ranks) as asked_to_stop:
            outcome = session.go(asked_to_stop)
        outcome.seconds = time.monotonic() - began
        return outcome


def _prompts(cfg: Config) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    held_out: Sequence[Prompt] = []
    if cfg.data.validation_prompts:
        held_out = read_prompts(cfg.data.validation_prompts, "data.validation_prompts")
    return read_prompts(cfg.data.prompts), held_out


class _Session:
    """One process's life in a run: everything loaded, and the loop over it."""

    def __init__(
        self,
        cfg: Config,
        run: Run,
        prompts: Sequence[Prompt],
        held_out_prompts: Sequence[Prompt],
        ranks: Ranks,
        console: Console,
    ) -> None:
        self.cfg, self.run, self.ranks, self.console = cfg, run, ranks, console
        rewards = get_reward_model(cfg)
        assert isinstance(rewards, WeightedSum)
        # Rewards before the large model, so that mistakes show early.
        held_out = load_held_out(cfg)
        self.model = model = SDXLDRaFTPModel(cfg)
        processes = f", {ranks.size} processes" if ranks.size > 1 else ""
        split = ", weights split over them" if sharding.splits_weights(cfg.sharding) else ""
        console.print(f"running on {model.runtime.reason}{processes}{split}", highlight=False)
        if cfg.sharding.offload and model.runtime.device.type == "cpu":
            self._warn("sharding.offload saves nothing on a CPU: the same memory holds the weights twice")
        model.reward_model = self.rewards = rewards
        self.prompts = prompts
        self.validation = None
        if cfg.trainer.val_check_interval and held_out_prompts:
            judges = {**rewards.rewards, **held_out.to(model.runtime.device).rewards}
            self.validation = Validation(model, judges, held_out_prompts, ranks)
        self._data = {"sha256": fingerprint(prompts), "count": len(prompts)}
        self._data["validation"] = fingerprint(held_out_prompts)
        self._report_long(prompts)

    def start(self) -> None:
        """Split the network, where it is to be, and resume. From here on the processes work together."""
        if self.ranks.size == 1 and self.cfg.sharding.strategy == "fsdp":
            self._warn("sharding.strategy fsdp has no effect with one process")
        if sharding.splits_weights(self.cfg.sharding):
            self.ranks.lockstep = True
            self.ranks.heartbeat("splitting the weights")
            self.model.configure_sharded_model()
        self.trainer = Trainer(self.model, self.rewards, self.prompts, self.ranks)
        if self.cfg.optim.name == "adamw8bit" and all(w.numel() < SMALLEST for w in self.trainer.weights):
            self._warn(
                f"optim.name adamw8bit has no effect: no trained tensor has {SMALLEST:,} elements or more, and moments "
                "of smaller ones stay in float32"
            )
        self.first = self._resume()
        self._saved = self.first
        self.log = RunLog(self.run, self.cfg.logging, self.first)
        past = [line["reward"] for line in self.run.steps() if isinstance(line.get("reward"), float)]
        self.live = LiveView(self.console, self.run.folder.name, self.first, self.cfg.trainer.max_steps, past)

    def __enter__(self) -> _Session:
        with ExitStack() as stack, self.ranks.all_or_none():
            if self.ranks.is_main:
                stack.enter_context(self.log)
                stack.enter_context(self.live)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def go(self, asked_to_stop: Stop) -> Outcome:
        """The loop: one round more than there are steps, so that the end is handled by the lines of the middle."""
        cfg, outcome = self.cfg.trainer, Outcome(self.first, validation=next(reversed(self.run.validations()), None))
        last = cfg.max_steps
        self._stop_late_work(asked_to_stop)
        validated = {line["step"] for line in self.run.validations()} if self.ranks.is_main else set()
        for step in range(self.first, last + 1):
            outcome.step = step
            stopping = self.ranks.any(bool(asked_to_stop))
            due = cfg.val_check_interval and (step % cfg.val_check_interval == 0 or step == last)
            is_best = False
            if (
                self.validation is not None
                and due
                and self.ranks.any(self.ranks.is_main and step not in validated)
                and (step == last or not stopping)
            ):
                try:
                    outcome.validation, is_best = self._validate(step)
                except DeadlinePassed:
                    break
            if step > self.first and (step % cfg.save_interval == 0 or step == last or stopping or is_best):
                self._save(step)
            if step == last or stopping:
                outcome.finished = step == last
                break
            try:
                self._step(step + 1)
            except DeadlinePassed:
                break
        outcome.interrupted = not outcome.finished
        outcome.skipped = self.trainer.skipped
        self.ranks.heartbeat("writing final/")
        with self.ranks.all_or_none():
            if outcome.finished and (self.ranks.is_main or self.ranks.lockstep):
                self._write_final(outcome)
        outcome.written = _written(self.run)
        return outcome

    def _stop_late_work(self, asked_to_stop: Stop) -> None:
        """Whoever sends SIGTERM kills soon: what takes longer than SAVE_DEADLINE from then on is given up between two
        of its phases, and the step before it saved. Several processes finish the step: they must stop at the same
        place.
        """
        if self.ranks.size > 1:
            return
        note = self.live.note

        def check() -> None:
            if asked_to_stop.is_late():
                raise DeadlinePassed

        def phase(name: str) -> AbstractContextManager[Any]:
            check()
            return torch.profiler.record_function(name)

        def noted(text: str) -> None:
            if text.startswith("validating"):
                check()
            note(text)

        self.live.note = noted
        self._stack.enter_context(self.model.watched(phase))

    @contextmanager
    def _keeping(self, step: int) -> Iterator[None]:
        """Whatever goes wrong inside, the weights after `step` are good: nothing of them is lost."""
        try:
            yield
        except Exception:
            # Unless they lie on processes of which one is going.
            can_save = self.trainer.gave_up if self.ranks.lockstep else self.ranks.is_main
            if self.trainer.consistent and step > self._saved and can_save:
                self._write_checkpoint(step)
                self.live.say(f"saved after step {step}")
            raise

    def _step(self, step: int) -> None:
        with self._keeping(step - 1):
            line = self.trainer.step(step)
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                self.log.step(line)
                self.live.step(line, self.trainer.skipped)
        if "skipped" in line:
            self._warn(f"step {step} was skipped: its {line['skipped']} was not finite")

    def _validate(self, step: int) -> tuple[dict[str, Any], bool]:
        assert self.validation is not None
        ema = self.trainer.ema
        self.ranks.heartbeat(f"validation after step {step}")
        averaged = ema is not None and self.cfg.ema.in_validation
        with self._keeping(step), ema.in_place() if ema is not None and averaged else nullcontext():
            result, sheet = self.validation(self.run, step, self.live.note)
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                weights = {name: reward.weight for name, reward in self.cfg.rewards.items()}
                result["score"] = score(result, weights, list(self.cfg.held_out_rewards))
                result["training_reward"] = self._recent_reward(step)
                self.log.validation(result, sheet)
                self.live.say(_in_words(result))
                if (warning := training_warning(self.run.validations(), list(weights))) is not None:
                    self._warn(warning)
        return result, self.ranks.any(self.ranks.is_main and self.run.best() == step)

    def _recent_reward(self, step: int) -> float | None:
        """The mean reward in training since the validation before."""
        since = max((line["step"] for line in self.run.validations()), default=0)
        recent = [line.get("reward") for line in self.run.steps() if since < line["step"] <= step]
        recent = [reward for reward in recent if isinstance(reward, float)]
        return sum(recent) / len(recent) if recent else None

    def _save(self, step: int) -> None:
        self.live.note(f"saving step {step}")
        self.ranks.heartbeat(f"saving step {step}")
        with self.ranks.all_or_none():
            if self.ranks.is_main or self.ranks.lockstep:
                self._write_checkpoint(step)
        self._saved = step
        self.live.note("")

    def _write_checkpoint(self, step: int) -> None:
        facts = {"prompts": self._data}
        # While steps are skipped nobody knows whether the weights are good: those from before stay.
        keep = sys.maxsize if self.trainer.is_skipping else self.cfg.trainer.keep_checkpoints
        save_checkpoint(self.run, step, self.trainer, facts, keep, self.run.best())
        self.live.saved(step)

    def _resume(self) -> int:
        """Put back the newest whole checkpoint; the step it is of, 0 where there is none."""
        self.ranks.heartbeat("resuming")
        state, damaged = load_newest(self.run, self.trainer)
        for line in damaged:
            self._warn(line)
        first = 0
        if state is not None:
            first = state["step"]
            self.console.print(f"resuming {self.run.folder} after step {first}", highlight=False)
            if state["prompts"]["sha256"] != self._data["sha256"]:
                self._warn(
                    f"data.prompts {self.cfg.data.prompts} is not what this run was started with: it had "
                    f"{state['prompts']['count']} prompts, now {self._data['count']}; goes on with those of now"
                )
            if state["prompts"].get("validation", self._data["validation"]) != self._data["validation"]:
                self._warn(
                    "data.validation_prompts are not what this run was started with: scores from before are of other "
                    "pictures, also where the best step is looked for"
                )
        last = self.cfg.trainer.max_steps
        if first > last:
            raise InputError(f"trainer.max_steps is {last}, and {self.run.folder} has taken {first} steps already")
        if self.ranks.is_main:
            self.run.forget_after(first)
        return first

    def _report_long(self, prompts: Sequence[Prompt]) -> None:
        tokenizer = self.model.parts.tokenizers[0]
        count, example = past_the_limit(prompts, tokenizer) if self.ranks.is_main else (0, None)
        if example is not None:
            self._warn(
                f"{count} of {len(prompts)} prompts have more than {tokenizer.model_max_length} tokens, and what is "
                f"beyond is not read; the first: {example.text[:60]}..."
            )

    def _warn(self, text: str) -> None:
        if self.ranks.is_main:
            Console(stderr=True).print(f"warning: {text}", highlight=False, soft_wrap=True, markup=False)

    def _write_final(self, outcome: Outcome) -> None:
        ema = self.trainer.ema
        averaged = ema is not None and self.cfg.ema.in_final

        def write(folder: Path) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            gather(folder)
            card = model_card(self.cfg, outcome.validation, self._data)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / FINAL_STEP).write_text(f"{outcome.step}\n", encoding="utf-8")

        def gather(folder: Path) -> None:
            with ema.in_place() if ema is not None and averaged else nullcontext():
                save_weights(self.model, folder, write=self.ranks.is_main)

        with disk_errors(self.run.final):
            if self.ranks.is_main:
                write_aside(self.run.final, write)
            else:
                gather(self.run.final)


def _written(run: Run) -> dict[str, list[Path]]:
    """What a run has left, by what it is."""
    sheets = sorted(run.samples.glob("step-*-sheet.png"))
    found: dict[str, list[Path]] = {
        "weights": [p for p in (run.final / "pytorch_lora_weights.safetensors", run.final / "unet") if p.exists()],
        "card": [run.final / "README.md"],
        "pictures": sheets[-1:],
        "figures": [run.metrics, run.validation],
        "tensorboard": [run.folder / "tensorboard"],
        "checkpoints": run.checkpoints()[::-1],
        "settings": [run.config],
    }
    there = {what: [path for path in paths if path.exists()] for what, paths in found.items()}
    return {what: paths for what, paths in there.items() if paths}


def _in_words(result: dict[str, Any]) -> str:
    parts = [_change(name, f) for name, f in {**result["rewards"], "diversity": result["diversity"]}.items()]
    return f"validation after step {result['step']}, {result['images']} pictures, base -> tuned: " + "; ".join(parts)


def _change(name: str, figures: dict[str, float]) -> str:
    interval = f", 95 % {figures['low']:+.3f} to {figures['high']:+.3f}"
    known = "" if math.isnan(figures["low"]) else interval  # one group of pictures has no interval
    return f"{name} {figures['base']:.3f} -> {figures['tuned']:.3f} ({figures['difference']:+.3f}{known})"

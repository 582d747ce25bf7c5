"""Everything that one process of a run has loaded, and what the loop does with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from draftcli.config import Config, check_batch_size
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine import sharding
from draftcli.core.engine.eight_bit import check_installed
from draftcli.core.engine.ranks import Ranks
from draftcli.core.engine.runtime import choose_runtime
from draftcli.core.gradient.mode import make_mode
from draftcli.core.image_weights import HeldOutGate
from draftcli.core.models.places import unread_prompts
from draftcli.core.penalty import make_penalty
from draftcli.core.phase import Phase
from draftcli.errors import InputError, warn
from draftcli.export.kohya import ignored_by_kohya
from draftcli.prompts import past_the_limit
from draftcli.rewards import WeightedSum, check_names, get_reward_model, load_held_out
from draftcli.rewards.first_call import ask_once
from draftcli.runs import Opening, Run, StopRecord, ValidationLine
from draftcli.training.checkpoint import load_newest, load_step, save_checkpoint
from draftcli.training.final import write_final
from draftcli.training.live import LiveView
from draftcli.training.log import RunLog, complete_validation
from draftcli.training.monitor import Monitor, alarm_in_words, check_not_ended
from draftcli.training.nodes import check_alike, check_shared
from draftcli.training.optimizer import SMALLEST
from draftcli.training.prompt_sets import PromptSets, read_prompt_sets
from draftcli.training.result import TrainingResult, diversity_warning, side_by_side, validation_in_words
from draftcli.training.step import Trainer, why_skipped
from draftcli.training.stop import DeadlinePassed, Stop, stop_on_signal
from draftcli.training.trackers import Trackers, check_trackers
from draftcli.training.validation import Validation


@dataclass
class Session:
    """One process's part of a session of a run. `open_session` makes and closes it.

    Attributes:
        cfg: the run's settings.
        run: its folder; the main process writes there, and all of them where the network is split.
        ranks: the processes that train together.
        prompts: to train on and to validate with.
        trainer: the model, its optimizer and its rewards.
        validation: None where there is none.
        log, live: what is written down and shown; for the main process alone.
        stop: whether somebody has asked to stop.
        monitor: judges the validations.
        first: the step that it starts from: that of the newest checkpoint, or 0.
        on_step: called after each step with its line of the log; in the main process alone.
    """

    cfg: Config
    run: Run
    ranks: Ranks
    prompts: PromptSets
    trainer: Trainer
    validation: Validation | None
    log: RunLog
    live: LiveView
    stop: Stop
    first: int
    on_step: Callable[[dict[str, Any]], None]
    monitor: Monitor
    _saved: int = field(init=False)
    _validated: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._saved = self.first
        self._validated = {line["step"] for line in self.run.validations()} if self.ranks.is_main else set()

    def should_validate(self, step: int) -> bool:
        """Whether a validation is due after `step` and has not been made by an earlier session (collective)."""
        interval = self.cfg.trainer.val_check_interval
        due = interval and (step % interval == 0 or step == self.cfg.trainer.max_steps)
        if self.validation is None or not due:
            return False
        return self.ranks.any(self.ranks.is_main and step not in self._validated)

    def step(self, step: int) -> None:
        """Take optimizer step `step` and log it.

        Raises:
            DeadlinePassed: it took too long for whoever will kill this process; the step before it is saved.
            DraftpError: too many steps in a row were not finite.
        """
        with self._saving_on_error(step - 1), self.trainer.model.watched(self._watched_phase):
            line = self.trainer.step(step)
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                self.log.step(line)
                self.live.step(line, self.trainer.skipped)
                self.on_step(line)
        if "skipped" in line:
            self._warn(f"step {step} was skipped: {why_skipped(line['skipped'])}")

    def validate(self, step: int) -> tuple[ValidationLine, bool]:
        """Validate the network after `step`, or its moving average; returns the figures and whether it is the best yet.

        Raises:
            DeadlinePassed: as for `step`; `step` is saved.
        """
        assert self.validation is not None
        ema = self.trainer.ema if self.cfg.ema.in_validation else None
        self.ranks.heartbeat(f"validation after step {step}")
        watched, began = self.trainer.model.watched(self._watched_phase), time.monotonic()
        with self._saving_on_error(step), watched, nullcontext() if ema is None else ema.in_place():
            result, sheet = self.validation(self.run, step, self.live.note, self.give_up_if_late)
        with self.ranks.all_or_none():
            if self.ranks.is_main:
                complete_validation(result, self.run, self.monitor)
                self.log.validation(result, sheet)
                self.live.print(validation_in_words(result, self.cfg.held_out))
                self.live.validated(time.monotonic() - began, side_by_side(result, self.cfg), result.get("alarm"))
                for warning in (alarm_in_words(result), diversity_warning(result)):
                    if warning is not None:
                        self._warn(warning)
        return result, self.ranks.any(self.ranks.is_main and step in self._kept_steps())

    def _kept_steps(self) -> set[int]:
        """The steps whose checkpoints stay: the best, and those that final/ may be written from."""
        best = self.run.best()
        return self.monitor.may_need(self.run.validations()) | ({best} if best else set())

    def stopped_at(self, step: int) -> StopRecord | None:
        """Why the monitor ended the run after `step`; None: it did not (collective)."""
        last = next(reversed(self.run.validations()), None) if self.ranks.is_main else None
        ends = last is not None and last["step"] == step and self.monitor.can_stop
        return self.ranks.broadcast(last.get("stopped") if ends and last is not None else None)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` (collective)."""
        self.live.note(f"saving step {step}")
        self.ranks.heartbeat(f"saving step {step}")
        with self.ranks.all_or_none():
            if self.ranks.is_main or self.ranks.lockstep:
                self._write_checkpoint(step)
        self._saved = step
        self.live.note("")

    def save_final(self, result: TrainingResult) -> None:
        """Write final/ with the weights of the last step, or of the one that the monitor chose (collective)."""
        self.ranks.heartbeat("writing final/")
        step, validation = result.step, result.validation
        if result.stop is not None:
            with self.ranks.all_or_none():
                if self.ranks.is_main:
                    self.log.stopped(result.stop["why"], step)
            if (step := result.stop["final"]) != result.step:
                load_step(self.run, step, self.trainer)
                validation = next((line for line in self.run.validations() if line["step"] == step), None)
        with self.ranks.all_or_none():
            if self.ranks.is_main or self.ranks.lockstep:
                write_final(self.run, step, self.trainer, self.prompts, validation, result.ended_early)

    def give_up_if_late(self) -> None:
        """Raise DeadlinePassed where somebody who sent SIGTERM will kill this process soon.

        Several processes finish what they do: they must stop at the same place.
        """
        if self.ranks.size == 1 and self.stop.is_late():
            raise DeadlinePassed

    def _watched_phase(self, phase: Phase) -> AbstractContextManager[Any]:
        self.give_up_if_late()
        return torch.profiler.record_function(phase)

    @contextmanager
    def _saving_on_error(self, step: int) -> Iterator[None]:
        """Whatever goes wrong inside, the weights after `step` are good: save them."""
        try:
            yield
        except Exception:
            # Unless they are split over processes, one of which may be gone.
            can_save = self.trainer.gave_up if self.ranks.lockstep else self.ranks.is_main
            if self.trainer.consistent and step > self._saved and can_save:
                self._write_checkpoint(step)
                self.live.print(f"saved after step {step}")
            raise

    def _write_checkpoint(self, step: int) -> None:
        facts = {"prompts": self.prompts.facts}
        kept = self._kept_steps()
        # While steps are skipped nobody knows whether the weights are good: those from before stay.
        keep = sys.maxsize if self.trainer.is_skipping else self.cfg.trainer.keep_checkpoints
        save_checkpoint(self.run, step, self.trainer, facts, keep, kept)
        self.live.saved(step)

    def _warn(self, text: str) -> None:
        if self.ranks.is_main:
            warn(text)


@dataclass(frozen=True)
class Prepared:
    """A run whose settings, prompts and folder are in order, before anything is loaded.

    Attributes:
        run: its folder.
        prompts: to train on and to validate with.
        opening: what the folder is to be opened with; for the main process alone.
    """

    run: Run
    prompts: PromptSets
    opening: Opening | None


@contextmanager
def open_run(cfg: Config, folder: Path, ranks: Ranks) -> Iterator[Prepared]:
    """Check what can be checked before anything large is loaded, and lock the run's folder (collective).

    Nothing is written to it yet: where loading fails, nothing is left behind.

    Raises:
        InputError: settings, prompts or folder are wrong, or another process is writing there.
        DraftpError: the folder cannot be written.
    """
    ranks.heartbeat("reading settings and prompts")
    with ExitStack() as stack:
        with ranks.all_or_none():
            make_mode(cfg)
            make_penalty(cfg.draftp)
            check_installed(cfg)
            check_batch_size(cfg, ranks.size)
            prompts = read_prompt_sets(cfg)
            check_names([*cfg.rewards, *cfg.held_out_rewards])
            if ranks.is_main:
                check_trackers(cfg.logging)
                for text in prompts.notes_for(cfg.sampling):
                    warn(text)
                _warn_of_unread_prompts(cfg, prompts)
        run, opening = Run(folder), None
        check_alike(cfg, prompts, ranks)
        with ranks.all_or_none():
            if ranks.is_main:
                stack.enter_context(run.locked())
                opening = run.check(cfg)
                check_not_ended(Monitor.of(cfg), run)
        check_shared(run, ranks)
        yield Prepared(run, prompts, opening)


@contextmanager
def open_session(
    cfg: Config, prepared: Prepared, ranks: Ranks, console: Console, on_step: Callable[[dict[str, Any]], None]
) -> Iterator[Session]:
    """Load everything, resume from the newest checkpoint, make the run's files, and open the log, the view and the
    signals (collective).

    Raises:
        InputError: the model or a reward cannot be loaded, or the run is past trainer.max_steps.
        DraftpError: all checkpoints are damaged, or the disk refuses.
    """
    run, prompts = prepared.run, prepared.prompts
    ranks.heartbeat("loading the networks")
    with ranks.all_or_none():
        rewards = get_reward_model(cfg)  # before the large model, so that mistakes show early
        assert isinstance(rewards, WeightedSum)
        held_out = load_held_out(cfg)
        _ask_once(cfg, rewards, held_out, prompts)
        model = _load_model(cfg, ranks, console)
        model.reward_model = rewards
        if isinstance(model.penalty.weights, HeldOutGate):
            model.penalty.weights.held_out = held_out.to(model.runtime.device).rewards
        validation = None
        if cfg.trainer.val_check_interval and prompts.validation:
            validation = Validation(model, rewards, held_out, prompts.validation, ranks)
        if ranks.is_main:
            _warn_of_long_prompts(prompts, model)
    with ranks.all_or_none():
        if sharding.splits_weights(cfg.sharding):
            ranks.lockstep = True
            ranks.heartbeat("sharding the weights")
            model.configure_sharded_model()
        trainer = Trainer(model, rewards, prompts.training, ranks)
        if ranks.is_main:
            _warn_of_idle_settings(cfg, trainer)
        first = resume(cfg, run, prompts, trainer, console)
        for change in run.begin(prepared.opening) if prepared.opening else ():
            console.print(f"changed since the last session: {change}")
        if validation is not None:
            console.print(Monitor.of(cfg).announcement, soft_wrap=True)
            console.print(f"progress page {run.page.resolve().as_uri()} (written at each validation)", soft_wrap=True)
        trackers = Trackers(run, cfg.logging, first)
        past = [line["reward"] for line in run.steps() if isinstance(line.get("reward"), float)]
        every = cfg.trainer.val_check_interval if validation else 0
        live = LiveView(console, run.folder.name, first, cfg.trainer.max_steps, past, every, cfg.draftp.kl_coeff)
    with ExitStack() as stack:
        with ranks.all_or_none():
            if ranks.is_main:
                stack.enter_context(trackers)
                stack.enter_context(live)
        stop = stack.enter_context(stop_on_signal(ranks))
        log = RunLog(run, trackers)
        yield Session(cfg, run, ranks, prompts, trainer, validation, log, live, stop, first, on_step, Monitor.of(cfg))


def _ask_once(cfg: Config, rewards: WeightedSum, held_out: WeightedSum, prompts: PromptSets) -> None:
    """See that every reward gives scores, and those that are trained on a gradient."""
    runtime = choose_runtime(cfg.model.device, cfg.model.precision)
    asked = [prompt.text for prompt in prompts.training[:2]]
    size = cfg.sampling.height, cfg.sampling.width
    for judges, training in ((rewards, True), (held_out, False)):
        ask_once(judges.to(runtime.device).rewards, asked, size, runtime.device, runtime.latent_dtype, training)
    held_out.to(torch.device("cpu"))  # until a validation needs them


def _load_model(cfg: Config, ranks: Ranks, console: Console) -> DRaFTPModel:
    model = DRaFTPModel(cfg)
    processes = f", {ranks.size} processes" if ranks.size > 1 else ""
    split = ", weights sharded over them" if sharding.splits_weights(cfg.sharding) else ""
    console.print(f"running on {model.runtime.reason}{processes}{split}")
    return model


def resume(cfg: Config, run: Run, prompts: PromptSets, trainer: Trainer, console: Console) -> int:
    """Put the newest whole checkpoint into `trainer`, and drop log lines of later steps (collective).

    Returns:
        the step it is of; 0 where there is none.

    Raises:
        InputError: the run is past trainer.max_steps.
        DraftpError: no checkpoint is whole, or the newest whole one is of something else.
    """
    ranks = trainer.ranks
    ranks.heartbeat("resuming")
    state, warnings = load_newest(run, trainer)
    first = 0
    if state is not None:
        first = state["step"]
        console.print(f"resuming {run.folder} after step {first}")
        warnings += prompts.changes_since(state["prompts"])
        if state["prompts"]["sha256"] != prompts.facts["sha256"]:
            trainer.walks.load_state_dict({})  # they are of other prompts
    for text in warnings if ranks.is_main else ():
        warn(text)
    if first > cfg.trainer.max_steps:
        raise InputError(
            f"trainer.max_steps is {cfg.trainer.max_steps}, and {run.folder} has taken {first} steps already"
        )
    if ranks.is_main:
        run.forget_after(first)
    return first


def _warn_of_idle_settings(cfg: Config, trainer: Trainer) -> None:
    """Settings that have no effect here or elsewhere; those that never have are said by `config.without_effect`."""
    trained = [name.partition(".lora_")[0] for name in trainer.names if ".lora_" in name]
    if (text := ignored_by_kohya({"unet": dict.fromkeys(trained)})) is not None:
        warn(f"peft.target_modules has {text}")
    if cfg.sharding.offload and trainer.model.runtime.device.type == "cpu":
        warn("sharding.offload saves nothing on a CPU: the same memory holds the weights twice")
    if trainer.ranks.size == 1 and cfg.sharding.strategy == "fsdp":
        warn("sharding.strategy fsdp has no effect with one process")
    if cfg.optim.name == "adamw8bit" and all(w.numel() < SMALLEST for w in trainer.weights):
        warn(
            f"optim.name adamw8bit has no effect: no trained tensor has {SMALLEST:,} elements or more, and moments of "
            "smaller ones stay in float32"
        )


def _warn_of_unread_prompts(cfg: Config, prompts: PromptSets) -> None:
    for setting, some in (("data.prompts", prompts.training), ("data.validation_prompts", prompts.validation)):
        if (text := unread_prompts(cfg.model.pretrained, (prompt.text for prompt in some))) is not None:
            warn(f"{setting}: {text}")


def _warn_of_long_prompts(prompts: PromptSets, model: DRaFTPModel) -> None:
    tokenizer = model.parts.tokenizers[0]
    count, example = past_the_limit(prompts.training, tokenizer)
    if example is not None:
        warn(
            f"{count} of {len(prompts.training)} prompts have more than {tokenizer.model_max_length} tokens, and what "
            f"is beyond is not read; the first: {example.text[:60]}..."
        )

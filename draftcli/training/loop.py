"""The training loop: validate if due, save if due, stop if last, one step, log. The same command again resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from draftcli.config import Config
from draftcli.core.engine.ranks import open_ranks
from draftcli.training.result import Ending, TrainingResult, written_files
from draftcli.training.session import Session, open_run, open_session
from draftcli.training.stop import DeadlinePassed


def train(
    cfg: Config, folder: Path, console: Console, on_step: Callable[[dict[str, Any]], None] = lambda line: None
) -> TrainingResult:
    """Run, or resume, the training that `cfg` describes in `folder`.

    Args:
        cfg: the settings.
        folder: of the run; need not exist yet.
        console: where people look; processes other than the main one print nothing.
        on_step: called in the main process after each step, with its line of metrics.jsonl.

    Raises:
        InputError: settings, prompts, model or folder are wrong, or another process is writing there.
        DraftpError: the disk refuses, or something was not finite three times in a row.
    """
    began = time.monotonic()
    with open_ranks(timedelta(minutes=cfg.sharding.timeout_minutes)) as ranks:
        console.quiet = console.quiet or not ranks.is_main
        with open_run(cfg, folder, ranks) as prepared:
            run = prepared.run
            if ranks.broadcast(run.finished(cfg.trainer.max_steps)):
                return TrainingResult(cfg.trainer.max_steps, Ending.ALREADY_DONE, written=written_files(run))
            with open_session(cfg, prepared, ranks, console, on_step) as session:
                result = run_steps(session)
                if result.finished or result.stop is not None:
                    session.save_final(result)
            result.written = written_files(run)
            result.seconds = time.monotonic() - began
            return result


def run_steps(session: Session) -> TrainingResult:
    """One round more than there are steps, so that the end is handled by the lines of the middle."""
    first, trainer = session.first, session.cfg.trainer
    result = TrainingResult(first, validation=next(reversed(session.run.validations()), None))
    try:
        for step in range(first, trainer.max_steps + 1):
            result.step = step
            ending = find_ending(session, step)
            is_best = False
            if session.should_validate(step) and ending is not Ending.INTERRUPTED:
                result.validation, is_best = session.validate(step)
            if ending is not Ending.INTERRUPTED and (stop := session.stopped_at(step)) is not None:
                ending, result.stop = Ending.STOPPED, stop
            if step > first and (step % trainer.save_interval == 0 or is_best or ending is not None):
                session.save(step)
            if ending is not None:
                result.ending = ending
                break
            session.step(step + 1)
    except DeadlinePassed:  # what was done until then is saved
        result.ending = Ending.INTERRUPTED
    result.skipped = session.trainer.skipped
    return result


def find_ending(session: Session, step: int) -> Ending | None:
    """Why `step` is the last one of this session, or None where another follows (collective)."""
    asked_to_stop = session.ranks.any(bool(session.stop))
    if step == session.cfg.trainer.max_steps:
        return Ending.FINISHED
    return Ending.INTERRUPTED if asked_to_stop else None

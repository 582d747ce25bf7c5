"""Kill a training run again and again, resume it, and look whether anything was lost: `python -m tests.faults.kill`.

Each kill is a SIGKILL of a process that was forked from this one, where everything is imported and the model is loaded,
so that one costs a second. Its moment comes from the seed:

    anywhere    at a share of the processor time that an undisturbed run takes: in the middle of computing or of a write
    in saving   at the n-th call or return that Python makes while files of the run are written, renamed or removed

After every kill each checkpoint that can be seen must be whole and equal, bit for bit, to that of the same step in the
undisturbed run. When a run comes to its end, its final weights must be the undisturbed run's, and no step may be
missing or counted twice. Then the next one begins.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

import draftcli
from draftcli.cli.console import open_console
from draftcli.core.lora import merging as loading_module
from draftcli.core.models.loading import load_parts
from draftcli.runs import Run
from draftcli.training import checkpoint, session
from tests.command import WITH_VALIDATION, draftp, recipe

SAVING = [(session, "save_checkpoint"), (session, "write_final"), (Run, "forget_after"), (Run, "open")]
TIMES = ("seconds", "images_per_second", "memory_gib")


@dataclass
class Report:
    """What a campaign did.

    Attributes:
        anywhere: processes killed by the clock.
        in_saving: processes killed while files were written.
        runs: runs that came to their end.
        seconds: all of it.
    """

    anywhere: int = 0
    in_saving: int = 0
    runs: int = 0
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """Of both kinds."""
        return self.anywhere + self.in_saving


def campaign(model: Path, kills: int, seed: int, progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Kill until there were `kills` kills; the working directory gets the runs.

    Args:
        model: the diffusers folder of tests/tiny.py.
        kills: half of each kind, up to chance.
        seed: of the moments.
        progress: told after each try.

    Raises:
        AssertionError: something was lost.
    """
    began, report, moments = time.monotonic(), Report(), random.Random(seed)
    preset = recipe(
        model,
        sampling={"steps": 2},
        draftp={"truncation_steps": 1},
        trainer={"max_steps": 6, "save_interval": 1, "val_check_interval": 3, "keep_checkpoints": 2},
        data=WITH_VALIDATION,
        ema={"decay": 0.8},
    )
    parts = load_parts(draftcli.load_config(preset).model)
    with mock.patch.object(loading_module, "load_parts", return_value=parts):
        took = _finish(_fork(lambda: train(preset, "whole", "--set", "trainer.keep_checkpoints=99")))
        counted = Path("events")
        _finish(_fork(lambda: counted.write_text(str(_events_in_saving(lambda: train(preset, "counted"))))))
        whole, events = Run(Path("whole")), int(counted.read_text())
        while report.kills < kills:
            run = Run(Path("run"))
            if moments.random() < 0.5:
                child = _fork(lambda: train(preset, "run"))
                _kill_after(child, moments.uniform(0, took))
                report.anywhere += _was_killed(child)
            else:
                limit = moments.randrange(1, events)
                child = _fork(lambda limit=limit: _events_in_saving(lambda: train(preset, "run"), limit))
                report.in_saving += _was_killed(child)
            check_checkpoints(run, whole)
            progress(report)
            if run.final.is_dir():
                _finish(_fork(lambda: train(preset, "run")))
                check_finished(run, whole)
                report.runs += 1
                shutil.rmtree(run.folder)
        _finish(_fork(lambda: train(preset, "run")))
        check_finished(Run(Path("run")), whole)
    report.runs += 1
    report.seconds = time.monotonic() - began
    return report


def train(preset: Path, output: str, *options: str) -> None:
    """`draftp train`, which must succeed."""
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    assert "damaged" not in result.err, result.err


def check_checkpoints(run: Run, whole: Run) -> None:
    """Every checkpoint that can be seen is whole, and is what it is in the undisturbed run."""
    for folder in run.checkpoints():
        assert checkpoint._problem(folder) is None, f"{folder}: {checkpoint._problem(folder)}"
        assert same_files(folder, whole.folder / folder.name), folder


def check_finished(run: Run, whole: Run) -> None:
    """Same final weights, same log: every step once."""
    check_checkpoints(run, whole)
    assert same_files(run.final, whole.final)
    assert _log(run.metrics) == _log(whole.metrics)
    assert _log(run.validation) == _log(whole.validation)
    assert not [path.name for path in run.folder.glob(".*") if path.name != ".lock"], "leftovers"


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, and the same state of the optimizer and all else."""
    ones, others = _files(a), _files(b)
    if ones.keys() != others.keys():
        return False
    for name, one in ones.items():
        if one.suffix == ".safetensors" and not _equal(load_file(one), load_file(others[name])):
            return False
        if one.suffix == ".pt" and not _equal(*(torch.load(f, weights_only=True) for f in (one, others[name]))):
            return False
    return True


def _files(folder: Path) -> dict[str, Path]:
    """What a folder of a run holds, by names in which the run's own name does not matter."""
    paths = folder.rglob("*")
    return {str(path.relative_to(folder)).replace(f"{folder.parent.name}-kohya", "RUN-kohya"): path for path in paths}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _log(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _events_in_saving(work: Callable[[], object], limit: float = float("inf")) -> int:
    """How many calls and returns Python makes in `work` while files are written; a SIGKILL at number `limit`."""
    count = 0

    def on_event(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += 1
        if count >= limit:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def counting() -> Any:
        sys.setprofile(on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    for holder, name in SAVING:
        plain = getattr(holder, name)

        def counted(*arguments: Any, plain: Any = plain, **options: Any) -> Any:
            with counting():
                return plain(*arguments, **options)

        setattr(holder, name, counted)
    work()
    return count


def _fork(work: Callable[[], object]) -> int:
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process that has threads
        child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        sys.__stderr__.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def _kill_after(child: int, seconds: float) -> None:
    """SIGKILL when the child has had so much processor time, unless it ends before: other work cannot move it."""
    clock = (~child << 3) | 2  # Linux's clock of that process
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.001)


def _was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "a resumed run failed, see above"
    return os.WIFSIGNALED(status)


def _finish(child: int) -> float:
    """The processor time that it took."""
    _, status, usage = os.wait4(child, 0)
    assert status == 0, "a run that nobody killed failed, see above"
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.tiny import make_sdxl

    open_console(quiet=True, debug=False)
    torch.set_num_threads(1)

    def progress(report: Report) -> None:
        print(f"\r{report.kills} of {options.kills} kills", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        report = campaign(make_sdxl(Path("sdxl").resolve()), options.kills, options.seed, progress)
        os.chdir("/")
    print(
        f"\n{report.kills} kills ({report.anywhere} anywhere, {report.in_saving} in saving) of {report.runs} runs in "
        f"{report.seconds:.0f} s, {report.seconds / report.kills:.1f} s a kill: nothing was lost\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, seed {options.seed}"
    )


if __name__ == "__main__":
    main()

"""Run the real command line in this process, which spares each test the seconds that importing torch takes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from draftcli.cli import main


@dataclass
class Result:
    code: int
    out: str
    err: str


def draftp(*arguments: object) -> Result:
    """`draftp ARGUMENTS`: its exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["draftp", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def in_child(work: Callable[[], object]) -> int:
    """`work` in a forked process, which costs no import; how the process ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process that has threads
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def recipe(model: Path, path: Path = Path("tiny.yaml"), /, **sections: dict[str, Any]) -> Path:
    """A recipe for a few quick steps of the tiny model; `sections` are laid over it."""
    data: dict[str, Any] = {
        "model": {"pretrained": str(model), "device": "cpu"},
        "sampling": {"height": 64, "width": 64, "steps": 3, "scale": 3.0},
        "draftp": {"truncation_steps": 2, "kl_coeff": 0.1},
        "peft": {"rank": 2},
        "rewards": {"tests.example_rewards:red": 1.0},
        "data": {"prompts": ["a red cat", "a blue dog", "a green bird"]},
        "optim": {"lr": 1e-2},
        "trainer": {"max_steps": 4, "micro_batch_size": 2, "global_batch_size": 2, "save_interval": 2},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


WITH_VALIDATION = {"validation_prompts": ["a red dog", "a blue bird"], "validation_images": 2}

DRAWN = ["a red dog", "a blue bird", "a green cat asleep on a windowsill"]


def trained_run(folder: Path, model: Path, **sections: Any) -> Path:
    """A run in `folder` of two steps that leave the base well behind, with the validation prompts DRAWN."""
    sections = {"optim": {"lr": 0.1}, "trainer": {"max_steps": 2, "val_check_interval": 0}, **sections}
    preset = recipe(model, folder / "tiny.yaml", data={"validation_prompts": DRAWN}, **sections)
    result = draftp("train", "--preset", preset, "--output", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"

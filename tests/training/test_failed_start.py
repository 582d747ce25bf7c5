"""A start that fails leaves nothing behind: no folder, no newest run, no session."""

import os
import time
from pathlib import Path

import pytest

from draftcli.disk import lock_file
from draftcli.errors import InputError
from draftcli.runs import LOCK, Run
from tests.cli.test_bad_input import expect
from tests.command import draftp, recipe, trained_run

FAILED = [
    (("--set", "trainer.max_stps=3"), "trainer.max_stps"),
    (("--set", "model.device=cuda:7"), "cuda"),
    (("--set", "model.pretrained=nowhere/at-all"), "nowhere/at-all"),
    (("--set", "model.pretrained=nofile.safetensors"), "there is no such file"),
    (("--set", "model.vae=nofile.safetensors"), "there is no such file"),
    (("--prompts", "nofile.txt"), "nofile.txt"),
    (("--set", "data.validation_prompts=nofile.jsonl"), "nofile.jsonl"),
    (("--reward", "pickscroe"), "did you mean pickscore?"),
    (("--reward", "tests.nowhere:x"), "cannot import"),
    (("--reward", "tests.example_rewards:nothing"), "has no 'nothing'"),
    (("--set", "peft.target_modules=[nowhere]"), "nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), FAILED, ids=[" ".join(a) for a, _ in FAILED])
def test_nothing_is_left(tiny_sdxl, arguments, words):
    preset = recipe(tiny_sdxl)
    before = sorted(Path().iterdir())
    expect(draftp("train", "--preset", preset, *arguments), 2, words)
    assert sorted(Path().iterdir()) == before
    Path("empty").mkdir()
    expect(draftp("train", "--preset", preset, *arguments, "--output", "empty"), 2, words)
    assert not list(Path("empty").iterdir()), "the folder was there before, and is as it was"


def test_what_fails_after_a_failed_start_is_the_commands_own(tiny_sdxl):
    """The older run is still the newest one, and nobody speaks of a last session."""
    Path("runs").mkdir()
    old = trained_run(Path("runs"), tiny_sdxl)
    preset = recipe(tiny_sdxl, Path("new.yaml"))
    expect(draftp("train", "--preset", preset, "--set", "model.pretrained=nowhere/at-all"), 2, "nowhere")
    for command in (("sample",), ("anneal", "--weight", "linear")):
        result = draftp(*command)
        assert (result.code, str(old) in result.out) == (0, True), result.err
    result = draftp("train", "--preset", preset, "--set", "trainer.max_steps=1")
    assert (result.code, "last session" in result.out) == (0, False), result.err


def test_a_run_without_weights_is_not_the_newest(tiny_sdxl):
    """As a session that was killed before its first checkpoint leaves it."""
    Path("runs").mkdir()
    old = trained_run(Path("runs"), tiny_sdxl)
    Path("runs/killed").mkdir()
    later = Path("runs/killed/config.yaml")
    later.write_bytes((old / "config.yaml").read_bytes())
    os.utime(later, (time.time() + 60,) * 2)
    assert str(old) in draftp("sample").out
    expect(draftp("sample", "killed"), 2, "no weights yet")
    result = draftp("train", "--preset", later, "--set", "trainer.max_steps=4", "--output", "runs/killed")
    assert (result.code, "last session" in result.out) == (0, False), result.err


def test_a_lock_that_a_failed_start_has_removed_is_no_lock(monkeypatch):
    """Whoever opened it before it was gone must not hold the folder beside somebody who makes a new one."""
    run = Run(Path("run"))

    def too_late(handle):
        (run.folder / LOCK).unlink()
        return lock_file(handle)

    monkeypatch.setattr("draftcli.runs.lock_file", too_late)
    with pytest.raises(InputError, match="being written by another process"), run.locked():
        pass

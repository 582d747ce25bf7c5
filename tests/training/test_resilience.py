"""Nothing is lost: killed while saving, crashed, not finite, started twice. More of it is in tests/faults."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftcli.runs import Run
from draftcli.training import checkpoint
from tests.command import draftp, in_child, recipe
from tests.example_rewards import Red

LORA = "pytorch_lora_weights.safetensors"


def same(a: Path, b: Path) -> bool:
    one, two = load_file(a / LORA), load_file(b / LORA)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def train(preset: Path, output: str, *options: str):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("where", ["save_weights", "_checksum", "json.dumps", "shutil.rmtree"])
def test_killed_inside_saving_equals_undisturbed(tiny_sdxl, where):
    """At the second checkpoint: before it is whole, or while an older one is removed."""
    preset = recipe(tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 1})
    train(preset, "whole")

    def dying():
        calls = []
        holder, _, name = where.rpartition(".")
        target = getattr(checkpoint, holder) if holder else checkpoint
        plain = getattr(target, name)

        def die_at_the_second(*arguments, **options):
            calls.append(name)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        setattr(target, name, die_at_the_second)
        draftp("train", "--preset", preset, "--output", "run")

    assert os.WTERMSIG(in_child(dying)) == signal.SIGKILL
    train(preset, "run")
    assert same(Path("whole/final"), Path("run/final"))


def at_call(monkeypatch, wanted: Callable[[int], bool], spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the reward `red` return `spoil(score)` at the calls that are `wanted`, from 1; 0 is about grey pictures."""
    calls, plain = [], Red.__call__

    def call(self, images, prompts):
        score = plain(self, images, prompts)
        calls.append(1)
        return spoil(score) if wanted(len(calls) - 1) else score

    monkeypatch.setattr(Red, "__call__", call)


SILENT = "reward tests.example_rewards:red gave no score"
# How a score is spoilt, the line's `skipped`, and the warning.
SPOILT = {
    "nan": (lambda score: score * torch.nan, SILENT, SILENT),
    "infinite": (lambda score: score + torch.inf, "reward", "its reward was not finite"),
    "gradient": (lambda score: score + (score - score.detach()).sqrt(), "gradient", "its gradient was not finite"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_sdxl, monkeypatch, kind):
    spoil, what, warning = SPOILT[kind]
    at_call(monkeypatch, lambda n: n == 2, spoil)
    result = train(recipe(tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 9}), "run")
    assert f"warning: step 2 was skipped: {warning}\n" in result.err
    assert "finished 4 steps, 1 skipped" in result.out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, what, None, None]
    assert same(Path("run/step-000001"), Path("run/step-000002"))
    assert not same(Path("run/step-000002"), Path("run/step-000003"))
    assert all(t.isfinite().all() for t in load_file(Path("run/final") / LORA).values())


def test_three_in_a_row_stop_the_run_and_the_last_good_weights_stay(tiny_sdxl, monkeypatch):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 100, "max_steps": 9})
    train(preset, "two", "--set", "trainer.max_steps=2")
    at_call(monkeypatch, lambda n: n > 2, SPOILT["infinite"][0])
    result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 1
    assert "reward was not finite in 3 steps in a row, the last is step 5" in result.err
    assert "saved after step 4" in result.out
    assert same(Path("two/final"), Path("run/step-000004"))


def test_a_crash_loses_no_finished_step(tiny_sdxl, monkeypatch):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 100})
    train(preset, "whole")

    def crash(score):
        raise RuntimeError("the reward's server is gone")

    with monkeypatch.context() as patch:
        at_call(patch, lambda n: n == 3, crash)
        with pytest.raises(RuntimeError, match="server is gone"):
            draftp("train", "--preset", preset, "--output", "run")
    assert [p.name for p in Path("run").glob("step-*")] == ["step-000002"]
    assert "resuming run after step 2" in train(preset, "run").out
    assert same(Path("whole/final"), Path("run/final"))


def test_a_run_has_one_writer(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    with Run(Path("run")).locked():
        result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 2
    assert f"run is being written by another process (process {os.getpid()} on" in result.err
    train(preset, "run")


def test_prompts_that_changed_are_reported_on_resume(tiny_sdxl):
    Path("p.txt").write_text("a fox\nan owl\n")
    preset = recipe(tiny_sdxl, data={"prompts": "p.txt"})
    train(preset, "run", "--set", "trainer.max_steps=2")
    assert "has changed since this run" not in train(preset, "run", "--set", "trainer.max_steps=3").err
    Path("p.txt").write_text("a fox\nan owl\na cat\n")
    result = train(preset, "run")
    assert "data.prompts p.txt has changed since this run started: it had 2 prompts and now has 3" in result.err


def test_validation_prompts_that_changed_are_reported_on_resume(tiny_sdxl):
    Path("v.txt").write_text("a fox\nan owl\n")
    preset = recipe(tiny_sdxl, data={"validation_prompts": "v.txt"}, trainer={"val_check_interval": 2})
    train(preset, "run", "--set", "trainer.max_steps=2")
    assert "have changed since this run" not in train(preset, "run", "--set", "trainer.max_steps=3").err
    Path("v.txt").write_text("a fox\na cat\n")
    result = train(preset, "run")
    assert result.err.count("data.validation_prompts have changed since this run started") == 1


def test_prompts_past_the_tokenizers_length_are_said_once(tiny_sdxl):
    preset = recipe(tiny_sdxl, data={"prompts": ["short", "x" * 200, "y" * 300]})
    result = train(preset, "run")
    assert result.err.count("2 of 3 prompts have more than 77 tokens") == 1

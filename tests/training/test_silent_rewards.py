"""A reward that has nothing to say about a prompt (its score is NaN) takes nothing from a run but its own part."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftcli.config import MonitorConfig
from draftcli.training.monitor import Monitor, validation_score
from tests.command import draftp, recipe
from tests.ranks import train_in_ranks

RED, CHOOSY = "tests.example_rewards:red", "tests.example_rewards:choosy"
PROMPTS = ["a red cat", "a blue dog", "a green bird", "a blue cat"]
BATCH = {"max_steps": 3, "micro_batch_size": 1, "global_batch_size": 4, "save_interval": 1}


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def train(preset: Path, output: str) -> str:
    result = draftp("train", "--preset", preset, "--output", output)
    assert result.code == 0, result.err
    return result.err


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "final" / "pytorch_lora_weights.safetensors")


def test_a_run_goes_on_where_a_reward_says_nothing_and_two_processes_equal_one(tiny_sdxl):
    sections = {
        "model": {"precision": "fp64"},
        "rewards": {RED: 1.0, CHOOSY: {"weight": 0.5, "normalise": "std"}},
        "data": {"prompts": PROMPTS, "validation_prompts": PROMPTS},
        "trainer": {**BATCH, "val_check_interval": 3},
    }
    preset = recipe(tiny_sdxl, **sections)
    assert "skipped" not in train(preset, "one")
    steps = lines("one/metrics.jsonl")
    assert all(math.isfinite(line[f"reward/{name}"]) for line in steps for name in (RED, CHOOSY))
    assert steps[0]["reward"] == pytest.approx(steps[0][f"reward/{RED}"]), "the first step only measures choosy"
    ranks = train_in_ranks(2, preset, "two")
    assert [code for code, _ in ranks] == [0, 0], ranks
    for a, b in zip(steps, lines("two/metrics.jsonl"), strict=True):
        for name in ("loss", "reward", "grad_norm", f"reward/{RED}", f"reward/{CHOOSY}"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), name
    ours, theirs = weights("one"), weights("two")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    for line in lines("one/validation.jsonl"):
        assert line["rewards"][RED]["n"] == 4
        assert line["rewards"][CHOOSY]["n"] == 2
        assert math.isfinite(line["score"])


def test_the_metrics_of_a_step_count_0_and_leave_out_of_the_mean(tiny_sdxl):
    """Each of the four prompts once, two of them blue."""
    train(recipe(tiny_sdxl, rewards={CHOOSY: 1.0}, data={"prompts": PROMPTS}, trainer={**BATCH, "max_steps": 1}), "run")
    (line,) = lines("run/metrics.jsonl")
    assert line["reward"] == pytest.approx(line[f"reward/{RED}"] + line[f"reward/{CHOOSY}"] / 2, abs=1e-6)


def test_a_batch_that_no_reward_can_score_is_skipped_with_the_reason(tiny_sdxl):
    preset = recipe(
        tiny_sdxl, rewards={CHOOSY: 1.0}, data={"prompts": ["a blue dog"]}, trainer={**BATCH, "max_steps": 2}
    )
    preset.write_text(preset.read_text().replace(f"  {RED}: 1.0\n", ""))
    why = f"reward {CHOOSY} gave no score"
    skipped = [f"warning: step {n} was skipped: {why}" for n in (1, 2)]
    assert [line for line in train(preset, "run").splitlines() if "final/" not in line] == skipped
    assert [line["skipped"] for line in lines("run/metrics.jsonl")] == [why, why]
    assert all(not t.any() for name, t in weights("run").items() if "lora_B" in name)


def test_one_silent_reward_beside_another_skips_nothing(tiny_sdxl):
    preset = recipe(tiny_sdxl, rewards={RED: 1.0, CHOOSY: 1.0}, data={"prompts": ["a blue dog"]}, trainer=BATCH)
    assert train(preset, "run") == ""
    for line in lines("run/metrics.jsonl"):
        assert line[f"reward/{CHOOSY}"] is None
        assert line["reward"] == pytest.approx(line[f"reward/{RED}"], abs=1e-6)


def figures(tuned: float | None) -> dict[str, float | None]:
    half = None if tuned is None else 0.05
    return {"tuned": tuned, "low": None if half is None else -half, "high": half}


def test_a_validation_is_scored_by_those_that_said_something():
    rewards = {"a": {"tuned": 2.0}, "b": {"tuned": math.nan}}
    assert validation_score({"rewards": rewards}, {"a": 0.5, "b": 1.0}, []) == 1.0
    assert math.isnan(validation_score({"rewards": rewards}, {"b": 1.0}, []))


def test_hacking_is_not_read_from_a_reward_that_said_nothing():
    history = [
        {"step": 0, "rewards": {"held_out": figures(1.0), "trained": figures(None)}},
        {"step": 5, "rewards": {"held_out": figures(0.5), "trained": figures(None)}},
    ]
    assert Monitor(MonitorConfig(), {"trained": 1.0}, ["held_out"]).alarms(history) == [None, None]

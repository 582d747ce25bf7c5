"""What `make demo` promises, by the same command line."""

import json
from pathlib import Path

import pytest

from tests.command import draftp


@pytest.mark.slow  # minutes: the whole training of the toy preset
def test_the_toy_preset_raises_the_learned_reward_and_the_truth_with_it():
    result = draftp("train", "--preset", "toy")
    assert result.code == 0, result.err
    last = json.loads(Path("runs/toy/validation.jsonl").read_text().splitlines()[-1])
    assert last["images"] >= 64 * 2
    learned, oracle = last["rewards"]["toy"], last["rewards"]["toy_oracle"]
    assert learned["n"] == oracle["n"] == last["images"]
    assert learned["low"] > 0, "the interval of tuned minus base excludes 0"
    assert oracle["low"] > 0, "and for the oracle too"
    assert oracle["difference"] >= 0.05, "which it never saw"

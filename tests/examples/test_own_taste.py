"""The whole circle: a person rates on the page, a reward learns the taste, the toy is tuned to it and pleases."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import own_taste


@pytest.mark.slow  # 300 pairs, and half of the toy's training
def test_the_oracles_taste_is_learned_and_tuned_to():
    figures = own_taste.circle(Path("out"), "oracle", pairs=300, steps=30, held_out=120)
    lines = Path("out/oracle/preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(not json.loads(line)["repeats"] for line in lines) == 300
    assert figures["unseen"]["pairs"] >= 30
    assert figures["unseen"]["agreement"] >= 0.75, "on captions that it has not seen, where the pictures differ"
    assert figures["report"]["agreement"]["low"] > 0.5
    assert figures["tuned"]["low"] > 0, "the paired interval of what the person thinks lies above 0"

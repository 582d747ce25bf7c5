"""What people are shown of a validation."""

import math

import pytest

from draftcli.config import load_config
from draftcli.training.result import diversity_warning, side_by_side, validation_in_words


def validation(step, base, tuned, low, high):
    diversity = {"base": base, "tuned": tuned, "kept": tuned / base, "kept_low": low, "kept_high": high, "n": 8}
    return {"step": step, "images": 16, "rewards": {}, "diversity": diversity}


NAN = math.nan
CASES = [  # base, tuned and the interval of their ratio; what is said; whether it is warned about
    ((0.06, 0.03, 0.417, 0.583), "0.060  0.030  50.0 % (95 % interval 41.7 to 58.3) of the base's", True),
    ((0.06, 0.05, 0.667, 1.17), "83.3 % (95 % interval 66.7 to 117, not distinguishable from the base)", False),
    ((0.06, 0.03, 0.2, 1.1), "not distinguishable from the base", False),
    ((0.06, 0.054, 0.867, 0.933), "90.0 % (95 % interval 86.7 to 93.3)", False),
    ((0.06, 0.03, NAN, NAN), "50.0 % (no interval)", False),
    ((NAN, NAN, NAN, NAN), "diversity in pixels   nan    nan", False),
]


@pytest.mark.parametrize(("figures", "words", "warned"), CASES)
def test_diversity_is_a_share_of_the_bases_and_a_certain_loss_is_warned_about(figures, words, warned):
    line = validation(40, *figures)
    assert words in validation_in_words(line)
    assert (diversity_warning(line) is not None) is warned


def test_a_validation_names_the_signs_that_are_far_and_stands_in_one_row():
    line = validation(40, 0.06, 0.05, 0.7, 0.9)
    figures = {"base": 0.4, "tuned": 0.8, "difference": 0.4, "low": 0.3, "high": 0.5, "n": 8}
    line["signs"] = {"saturation": figures, "contrast": {**figures, "tuned": 0.41}}
    assert validation_in_words(line).endswith("far from the base: saturation is 2 times the base's")
    line["rewards"] = {"toy": figures, "toy_oracle": {**figures, "difference": -0.1}}
    row = side_by_side(line, load_config("toy"))
    assert row == "at 40: held out toy_oracle 0.800 (-0.100)  trained toy 0.800 (+0.400)"


def test_a_line_of_the_file_has_null_where_nothing_is_known():
    line = validation(40, 0.06, 0.03, 0.4, 0.6)
    assert diversity_warning(line) is not None
    for unknown in ({"kept_low": None, "kept_high": None}, {"kept": None}):
        line["diversity"] |= unknown
        assert diversity_warning(line) is None


HELD_OUT = [  # the change of a held-out reward and its interval; what its row ends with
    ((0.06, 0.04, 0.08), "+0.060 (+0.040 to +0.080)  held out"),
    ((-0.06, -0.08, -0.04), "-0.060 (-0.080 to -0.040)  held out, falls"),
    ((-0.06, -0.18, 0.04), "-0.060 (-0.180 to +0.040)  held out, falls (not certain)"),
    ((-0.06, NAN, NAN), "-0.060  held out, falls (not certain)"),
]


@pytest.mark.parametrize(("change", "words"), HELD_OUT)
def test_each_reward_has_a_row_and_a_held_out_one_that_falls_is_marked(change, words):
    line = validation(40, 0.06, 0.05, 0.7, 0.9)
    difference, low, high = change
    figures = {"base": 0.7, "tuned": 0.7 + difference, "difference": difference, "low": low, "high": high, "n": 8}
    line["rewards"] = {"toy": {**figures, "difference": -1.0}, "toy_oracle": figures}
    headline, names, trained, held_out, diversity = validation_in_words(line, ["toy_oracle"]).splitlines()
    assert headline == "validation after step 40, 16 images"
    assert names.split() == ["reward", "base", "tuned", "change", "(95", "%", "interval)"]
    assert held_out.endswith(words)
    assert "falls" not in trained
    assert held_out.index("0.700") == trained.index("0.700") == diversity.index("0.060")

"""What is said about a comparison whose answer is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from draftcli.evaluation.compare import compare, pareto_front, recommend, warnings
from draftcli.evaluation.figures import COSINE, PIXELS, VENDI, Figure, Figures
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.report import cell
from tests.evaluation.example import EACH, PROMPTS, example_comparison, make_example


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def result(example):
    return example_comparison(*example)


def test_pareto_front_by_hand():
    x, y = [1, 2, 3, 2, 1, np.nan], [3, 2, 1, 1, 3, 9]
    assert pareto_front(x, y).tolist() == [True, True, True, False, True, False], "equals don't beat each other"


def test_figures_are_paired_with_the_base(result):
    figure = result.figures["tuned"].reward("toy")
    assert figure.difference == pytest.approx(1, abs=0.02)
    assert figure.difference_low < figure.difference < figure.difference_high
    assert figure.difference_high - figure.difference_low < 0.05, "pairing takes out how hard prompts are"
    assert figure.high - figure.low > 2 * (figure.difference_high - figure.difference_low)
    assert (figure.win_rate, figure.n) == (1, len(PROMPTS) * EACH)
    assert result.figures["base"].reward("toy").difference is None


def test_front_recommendation_and_warnings(result):
    assert result.fronts["toy_oracle"] == ["base", "linear", "power_2"]
    assert "tuned" in result.fronts["toy"]
    assert result.recommendation.column in ("linear", "power_2")
    said = " ".join(result.warnings)
    assert "tuned: toy_oracle on these prompts fell by 0.09" in said
    assert "against base while toy, which was trained on, rose: this looks like reward hacking." in said
    assert said.count("reward hacking") == 1, "the other columns gain both or lose nothing surely"
    kept = result.figures["tuned"].diversity.diversity_kept
    assert kept.share < 0.2
    assert f"tuned: diversity fell to {kept.words} of the base's in features and" in said
    assert "power_2: of the base's diversity" not in said
    assert result.recommendation.why.endswith(" of its diversity")


KEPT = [  # features and pixels, each (share, low, high), and what is said
    (
        (0.57, 0.5, 0.64),
        (0.75, 0.7, 0.8),
        "fell to 57.0 % (95 % interval 50.0 to 64.0) of the base's in features and 75.0 % (95",
    ),
    ((0.79, 0.7, 0.9), (0.95, 0.9, 1.1), "fell to 79.0 % (95 % interval 70.0 to 90.0) of the base's in features"),
    ((0.75, 0.4, 1.1), (0.9, 0.7, 1.1), None),  # a loss that is not certain
    ((0.85, 0.8, 0.9), (0.85, 0.8, 0.9), None),  # certain, not large
    ((1.08, 0.9, 1.3), (0.75, 0.7, 0.8), "disagree about diversity: 108 % (95 % interval 90.0 to 130, not disting"),
    (
        (0.9, 0.85, 0.95),
        (1.05, 1.02, 1.08),
        "disagree about diversity: 90.0 % (95 % interval 85.0 to 95.0) of the base's",
    ),
    ((1.02, 0.9, 1.1), (0.98, 0.9, 1.1), None),  # neither is certain
    ((0.5, np.nan, np.nan), (0.5, np.nan, np.nan), None),  # one prompt
]


@pytest.mark.parametrize(("features", "pixels", "words"), KEPT)
def test_lost_diversity_is_said_where_it_is_certain(result, features, pixels, words):
    shares = {COSINE.key: features, PIXELS.key: pixels}
    changed = {
        key: Figure(share, kept=share, kept_low=low, kept_high=high) for key, (share, low, high) in shares.items()
    }
    column = Figures({**result.figures["base"].by_key, **changed})
    said = warnings({"base": result.figures["base"], "tuned": column}, "base", [], {}, 50)
    assert (words is None and not said) or words in " ".join(said)


def test_diversity_kept_is_the_share_of_the_bases(result):
    figure, base = result.figures["tuned"].diversity, result.figures["base"].diversity
    assert figure.kept == pytest.approx(figure.value / base.value)
    assert 0 < figure.kept_low < figure.kept < figure.kept_high < 1
    assert base.diversity_kept is None
    assert result.figures["tuned"].reward("toy").kept is None


def test_all_that_drifts_in_a_column_is_one_line(result):
    changed = dict(result.figures["tuned"].by_key)
    for sign, factor in (("saturation", 2), ("contrast", 0.5)):
        value = result.figures["base"].by_key[sign].value
        change = (factor - 1) * value
        changed[sign] = Figure(
            factor * value, difference=change, difference_low=change - 0.01, difference_high=change + 0.01
        )
    figures = {**result.figures, "tuned": Figures(changed)}
    said = [line for line in warnings(figures, "base", ["toy"], {"toy": 1}, 50) if "times the base's" in line]
    assert len(said) == 1
    assert "tuned: saturation is 2 times the base's, contrast is 0.5 times the base's" in said[0]


def test_the_preference_moves_the_recommendation(example):
    galleries, items, measured = example
    chosen = [compare(galleries, items, measured, {"toy": 1}, "toy", prefer).recommendation.column for prefer in (0, 1)]
    assert chosen == ["power_2", "tuned"]


@pytest.mark.parametrize("prefer", [0.5, 1])
@pytest.mark.parametrize("judge", ["toy", "toy_oracle"])
def test_where_lower_scores_are_wanted_the_conclusions_are_those_of_the_negative(example, judge, prefer):
    galleries, items, measured = example
    negative = {n: replace(m, scores={**m.scores, "toy": -m.scores["toy"]}) for n, m in measured.items()}
    expected = compare(galleries, items, measured, {"toy": 1}, judge, prefer)
    got = compare(galleries, items, negative, {"toy": -1}, judge, prefer)
    assert (got.fronts, got.recommendation.column) == (expected.fronts, expected.recommendation.column)
    assert got.warnings == [line.replace("while toy,", "while -toy,") for line in expected.warnings]
    assert got.figures["tuned"].reward("toy").difference == -expected.figures["tuned"].reward("toy").difference
    assert [(m.label, m.better) for m in got.metrics[:2]] == [("toy", -1), ("toy_oracle", 1)]
    assert got.to_json()["trained"] == ["toy"]


def test_where_nothing_gains_the_base_is_recommended():
    figures = {
        name: Figures({"reward/r": Figure(r, difference=r - 1), COSINE.key: Figure(d)})
        for name, r, d in (("base", 1, 1), ("less", 0.9, 2))
    }
    got = recommend(figures, "base", "r", ["base", "less"], 0.5)
    assert got.column is None
    assert got.why.startswith("keep base: no column raises r")
    assert recommend(figures, "base", "r", ["base", "less"], 0.5, better=-1).column == "less"
    assert recommend(figures, "less", "r", ["base", "less"], 0.5, better=-1).why.startswith(
        "keep less: no column lowers r"
    )


def test_too_few_pictures_are_said_instead_of_a_number(example):
    galleries, items, measured = example
    few = {name: _first(m, 2 * EACH) for name, m in measured.items()}
    short = [replace(g, files=g.files[: 2 * EACH]) for g in galleries]
    got = compare(short, items[: 2 * EACH], few, {"toy": 1}, "toy")
    tuned = got.figures["tuned"].by_key
    assert tuned["recall"] == Figure(why="needs 50 images for k = 5, has 10")
    assert tuned["kid"].value is None
    assert tuned["fid"].value is not None, "10 images have a covariance of 8 features"
    assert got.warnings[0].startswith("Only 2 prompts")
    one_each = {name: _every(m, EACH) for name, m in measured.items()}
    alone = [replace(g, files=g.files[::EACH]) for g in galleries]
    got = compare(alone, items[::EACH], one_each, {"toy": 1}, "toy")
    assert got.figures["tuned"][VENDI] == Figure(why="needs 2 images a prompt, has 1")
    assert "diversity was not measured" in got.recommendation.why


def test_a_reward_that_says_nothing_is_said(example):
    galleries, items, measured = example
    silent = {n: replace(m, scores={**m.scores, "mute": np.full(len(items), np.nan)}) for n, m in measured.items()}
    got = compare(galleries, items, silent, {"toy": 1}, "toy")
    assert got.figures["tuned"].reward("mute").why == "not applicable to these prompts"
    assert got.fronts["mute"] == []


@pytest.mark.parametrize("prompts", [1, 2, len(PROMPTS)])
def test_a_copy_of_the_base_is_said_to_be_one_and_nothing_differs(example, prompts):
    galleries, items, measured = example
    base = galleries[0]
    seen = _first(measured[base.name], prompts * EACH)
    columns = [replace(g, files=base.files[: prompts * EACH]) for g in galleries[:2]]
    got = compare(columns, items[: prompts * EACH], {g.name: seen for g in columns}, {"toy": 1}, "toy_oracle")
    assert got.warnings[0] == "tuned: identical images, those of base: there is no difference."
    assert all("tuned" not in warning for warning in got.warnings[1:])
    assert not any(figure.direction for figure in got.figures["tuned"].by_key.values())
    assert not any("*" in cell(got.figures["tuned"][metric]) for metric in got.metrics)
    assert got.recommendation.column is None
    assert "nan" not in " ".join([*got.warnings, got.recommendation.why])


@pytest.mark.parametrize("shift", [1.0, -1.0, 1e-9])
@pytest.mark.parametrize("prompts", [1, 3])
def test_differences_that_are_all_equal_or_of_one_prompt_are_not_certain(example, shift, prompts):
    galleries, items, measured = example
    count = prompts * EACH
    base = _first(measured["base"], count)
    moved = replace(base, scores={name: scores + shift for name, scores in base.scores.items()})
    columns = [replace(g, files=g.files[:count]) for g in galleries[:2]]
    got = compare(columns, items[:count], {"base": base, "tuned": moved}, {"toy": 1}, "toy")
    assert got.figures["tuned"].reward("toy").difference == pytest.approx(shift)
    assert not any("*" in cell(got.figures["tuned"][metric]) for metric in got.metrics)
    assert not any("hacking" in warning for warning in got.warnings)
    assert "nan" not in got.recommendation.why
    if got.recommendation.column is not None:
        assert "(no interval)" in got.recommendation.why
        assert "not certain" in got.recommendation.why


def test_distances_see_what_was_lost(result):
    base, tuned, linear = (result.figures[name].by_key for name in ("base", "tuned", "linear"))
    assert tuned["recall"].value < linear["recall"].value <= 1
    for metric in ("spectral", "log_spectral", "fid"):
        assert tuned[metric].value > linear[metric].value, metric
    assert base["recall"].value is None


def _first(m: Measured, count: int) -> Measured:
    return _cut(m, slice(0, count))


def _every(m: Measured, step: int) -> Measured:
    return _cut(m, slice(None, None, step))


def _cut(m: Measured, part: slice) -> Measured:
    scores, signs = ({k: v[part] for k, v in values.items()} for values in (m.scores, m.signs))
    return Measured(scores, signs, m.features[part], m.thumbnails[part])


def test_pictures_exist(example):
    assert all(Path(file).is_file() for gallery in example[0] for file in gallery.files)

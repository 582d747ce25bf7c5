"""The fit of a head, against computations by hand and against a truth that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from draftcli.preferences.agreement import advice, agrees, assess
from draftcli.preferences.fit import STRENGTHS, fit_head, fit_weights, folds_of, held_out, preference_loss
from draftcli.toy.train_reward import DOUBT, loss_over_pairs


def of_pickscore(logit_0: float, logit_1: float, label: float) -> float:
    """Kirstain et al. 2023: cross-entropy of the labels and the softmax of both logits; a tie's least value is 0."""
    total = math.exp(logit_0) + math.exp(logit_1)
    loss = -label * math.log(math.exp(logit_0) / total) - (1 - label) * math.log(math.exp(logit_1) / total)
    return loss + (math.log(0.5) if label == 0.5 else 0)


@pytest.mark.parametrize(("logits", "label"), [((21.3, 20.1), 1.0), ((21.3, 20.1), 0.0), ((2.0, 2.7), 0.5)])
def test_the_loss_is_pickscores_up_to_its_constant(logits, label) -> None:
    ours = preference_loss(torch.tensor(logits[0] - logits[1]).double(), torch.tensor(label).double())
    assert float(ours) + (math.log(0.5) if label == 0.5 else 0) == pytest.approx(of_pickscore(*logits, label), abs=1e-6)


def test_the_toys_reward_is_trained_by_the_same_loss_bit_for_bit() -> None:
    """What it was before this command had it: the shipped weights could be made again."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator, requires_grad=True)
    truth = torch.rand(3, 4, 6, generator=generator)
    i, j = torch.triu_indices(6, 6, offset=1)
    better = torch.sigmoid((truth[..., i] - truth[..., j]) / DOUBT)
    before = F.binary_cross_entropy_with_logits(logits[..., i] - logits[..., j], better)
    now = loss_over_pairs(logits, truth)
    assert torch.equal(before, now)
    assert torch.equal(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (before, now)))


def choices(count: int = 400, width: int = 6, seed: int = 0, doubt: float = 1.0):
    """Features of both pictures, labels and the weights of a person who has some doubt."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    truth = torch.linspace(-2, 2, width, dtype=torch.float64)
    odds = (first - second) @ truth / doubt
    label = (torch.rand(count, generator=generator, dtype=torch.float64) < odds.sigmoid()).double()
    return first, second, label, truth


def test_the_fit_is_where_its_gradient_is_zero() -> None:
    first, second, label, _ = choices(60)
    x = first - second
    weights = fit_weights(x, label, 6.0)
    by_hand = (x.T @ ((x @ weights).sigmoid() - label) + 6 * weights) / 60
    assert by_hand.abs().max() < 1e-5


def test_a_tie_pulls_both_ways_and_which_side_a_picture_was_on_does_not_matter() -> None:
    first, second, label, _ = choices(60)
    x = first - second
    weights = fit_weights(x, label, 6.0)
    assert torch.allclose(fit_weights(-x, 1 - label, 6.0), weights, atol=1e-6)
    ties = fit_weights(x, torch.full_like(label, 0.5), 6.0)
    assert ties.abs().max() < 1e-8


def test_the_fit_finds_a_persons_weights() -> None:
    first, second, label, truth = choices(4000)
    found = fit_head(first, second, label, np.arange(4000), seed=0)
    assert torch.nn.functional.cosine_similarity(found.weights, truth, dim=0) > 0.99
    assert float(found.weights.norm() / truth.norm()) == pytest.approx(1, abs=0.1)
    scores = torch.cat([first, second]) @ found.weights + found.offset
    assert float(scores.mean()) == pytest.approx(0, abs=1e-9)


def test_no_answer_is_judged_by_weights_that_have_seen_its_prompt() -> None:
    """Every prompt has a feature of its own, by which its answers could be known by heart."""
    groups = np.repeat(np.arange(20), 3)
    x = F.one_hot(torch.from_numpy(groups), 20).double()
    label = torch.from_numpy(groups % 2).double()
    for strength in (None, STRENGTHS[0]):
        assert held_out(x, label, groups, strength, seed=0).abs().max() < 1e-9
    assert set(agrees(x @ fit_weights(x, label, STRENGTHS[0]), label)) == {1.0}


@pytest.mark.parametrize(("groups", "folds"), [(12, 5), (3, 3), (2, 2)])
def test_folds_have_whole_groups_and_are_about_equal(groups, folds) -> None:
    names = np.random.default_rng(0).integers(0, groups, 100)
    found = folds_of(names, 5, seed=1)
    assert len(np.unique(found)) == folds
    assert all(len(np.unique(found[names == name])) == 1 for name in range(groups))
    each = [len(np.unique(names[found == fold])) for fold in range(folds)]
    assert max(each) - min(each) <= 1
    assert not np.array_equal(found, folds_of(names, 5, seed=2)) or groups < 4


@pytest.mark.parametrize(
    ("difference", "label", "share"),
    [(2.0, 1.0, 1), (-2.0, 1.0, 0), (-2.0, 0.0, 1), (0.0, 1.0, 0.5), (3.0, 0.5, 0.5), (math.nan, 1.0, math.nan)],
)
def test_agreement_of_one_answer(difference, label, share) -> None:
    found = agrees(torch.tensor([difference]), torch.tensor([label]))
    np.testing.assert_equal(found, [share])


def judged(odds, label, judges=None, repeats=(), curve=None):
    count = len(label)
    return assess(odds, label, np.arange(count), judges or {}, list(repeats), curve or {count: odds})


def test_what_is_said_of_a_reward_that_agrees() -> None:
    label = torch.ones(200).double()
    odds = torch.tensor([2.0] * 180 + [-2.0] * 20).double()
    other = torch.tensor([1.0] * 100 + [-1.0] * 100).double()
    found = judged(odds, label, {"other": other}, [1.0] * 18 + [0.0] * 2, {50: other, 100: odds - 2.1, 200: odds})
    assert found.agreement.mean == pytest.approx(0.9)
    assert found.beats_chance
    assert found.judges["other"].agreement.mean == pytest.approx(0.5)
    assert found.judges["other"].lead == pytest.approx(0.4)
    assert found.judges["other"].low > 0.3
    assert found.steadiness is not None
    assert found.steadiness.mean == pytest.approx(0.9)
    (one,) = found.calibration
    assert (one.sure, one.right, one.n) == (pytest.approx(1 / (1 + math.exp(-2))), pytest.approx(0.9), 200)
    assert found.calibration_error == pytest.approx(abs(0.9 - one.sure))
    assert found.log_loss == pytest.approx(0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2)))
    (rising,) = advice(found, 250)
    assert rising.startswith("trained on 100 pairs it agrees in 0.00, on 200 in 0.90: more pairs would still help")
    assert "250 more" in rising
    flat = judged(odds, label, curve={100: odds, 200: odds})
    assert "more pairs of this kind would help little" in advice(flat, 200)[0]


@pytest.mark.parametrize(
    ("right", "words"),
    [(54, "about 630 pairs in all would tell 0.54 from it"), (45, "more pairs may show one")],
)
def test_what_cannot_be_told_from_chance_is_said_plainly(right, words) -> None:
    label = torch.ones(100).double()
    odds = torch.tensor([1.0] * right + [-1.0] * (100 - right)).double()
    found = judged(odds, label)
    assert not found.beats_chance
    (text,) = advice(found, 100)
    assert "cannot be told from chance, 0.5: do not train on this reward" in text
    assert text.endswith(words), text


def test_ties_bound_what_can_be_reached() -> None:
    label = torch.tensor([1.0, 0.5, 0.0, 0.5]).double()
    found = judged(torch.tensor([1.0, 1.0, -1.0, -1.0]).double(), label)
    assert (found.agreement.mean, found.best) == (0.75, 0.75)

"""The lab of gradient modes measures what it says: the exact mode is exact, budgets are equal, a rate can be chosen."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import estimators
from estimators import ARMS, EXACT, RATES, STAGES, Job, jobs_of

import draftcli

pytestmark = pytest.mark.slow


def test_every_job_has_a_file_of_its_own():
    names = [job.name for stage in STAGES for job in jobs_of(stage, [*ARMS])]
    assert len(set(names)) == len(names)


def test_cost_of_an_image():
    """N 10, guided, K 4, with a base: 6 x 2 forward, 4 x 2 forward and backward (3 each), 4 x 2 of the base."""
    assert estimators.image_cost(draftcli.load_config("toy", [])) == 12 + 3 * 8 + 8
    assert estimators.budget_of_the_recipe() == 44 * 8 * 60


def test_fidelity(tmp_path, monkeypatch):
    """K = N is the exact gradient; K = 1 is another, with a smaller norm, and has no randomness; refl's has."""
    monkeypatch.setattr(estimators, "PAIRS", 2)
    exact = tmp_path / "exact.pt"
    found = {arm: estimators.fidelity(Job("fidelity", arm), exact) for arm in (EXACT, "last_k_1", "refl")}
    assert np.allclose(found[EXACT]["cosine"], 1)
    assert np.allclose(found[EXACT]["ratio"], 1)
    assert max(found["last_k_1"]["cosine"]) < 0.999
    assert found["last_k_1"]["own_variance"] is None
    assert max(found["refl"]["own_variance"]) > 0
    # The sum's cosine can be had from the products that are kept.
    gram, own = (np.array(found["refl"][key]) for key in ("gram", "gram_mode"))
    true = np.array(found[EXACT]["gram_exact"])
    assert -1 <= gram.sum() / np.sqrt(own.sum() * true.sum()) <= 1


def test_training_spends_its_budget(tmp_path):
    """And the base's scores are kept for the runs that follow."""
    base = tmp_path / "base.json"
    result = estimators.train(Job("final", "refl", rate=RATES[0]), 23 * 8 * 4, 2, base)
    assert json.loads(base.read_text(encoding="utf-8"))["toy"] == result["curve"][0]["toy"]
    assert [point["steps"] for point in result["curve"]] == [0, 2, 4]
    assert result["curve"][-1]["evaluations"] == 23 * 8 * 4
    assert len(result["curve"][-1]["toy"]) == 128
    assert len(result["curve"][-1]["diversity"]) == 64

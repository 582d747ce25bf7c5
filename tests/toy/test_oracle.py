"""The oracle: right about the truth, about each kind of error, and calm about rubbish."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from draftcli.toy import oracle, world

SCENES = world.all_scenes()[::10]
PROMPTS = [world.caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([world.render(scene, rng) for scene in SCENES]))


def column(table: torch.Tensor, name: str) -> torch.Tensor:
    return table[:, oracle.CRITERIA.index(name)]


def test_truth_scores_one_and_is_correct(truth: torch.Tensor) -> None:
    assert oracle.oracle_score(truth, PROMPTS).mean() >= 0.97
    assert oracle.attributes(truth, PROMPTS).mean(0).min() >= 0.97
    assert oracle.correct(truth, PROMPTS).all()


@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_one_wrong_attribute_is_seen_and_only_that(truth: torch.Tensor, name: str) -> None:
    rng = np.random.default_rng(1)
    prompts = [world.caption(world.change(scene, name, rng)) for scene in SCENES]
    table = oracle.attributes(truth, prompts)
    assert column(table, name).max() < 0.5
    assert not oracle.correct(truth, prompts).any()
    for other in set(world.ATTRIBUTES) - {name}:
        assert column(table, other).min() >= 0.5, other


def test_worn_and_blurred_pictures_lose_only_by_degree(truth: torch.Tensor) -> None:
    faded = 0.6 * truth + 0.4 * truth.mean(1, keepdim=True)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(truth, (1,) * 4, mode="replicate"), 3, 1)
    assert column(oracle.attributes(faded, PROMPTS), "colour_purity").mean() < 0.7
    assert column(oracle.attributes(blurred, PROMPTS), "crispness").mean() < 0.2
    assert oracle.correct(blurred, PROMPTS).float().mean() > 0.9


@pytest.mark.parametrize(
    "picture",
    [
        torch.full((3, 64, 64), 0.5),
        torch.zeros(3, 64, 64),
        torch.ones(3, 64, 64),
        torch.full((3, 64, 64), torch.nan),
        torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)),
        100 * torch.randn(3, 96, 80, generator=torch.Generator().manual_seed(2)),
    ],
    ids=["grey", "black", "white", "nan", "noise", "tiny", "huge"],
)
def test_rubbish_scores_low_and_stays_in_range(picture: torch.Tensor) -> None:
    images = picture.expand(len(PROMPTS), *picture.shape)
    table = oracle.attributes(images, PROMPTS)
    assert table.min() >= 0
    assert table.max() <= 1
    assert oracle.oracle_score(images, PROMPTS).mean() < 0.2
    assert not oracle.correct(images, PROMPTS).any()


def test_outside_the_grammar_is_null(truth: torch.Tensor) -> None:
    prompts = ["a photo of a dog", PROMPTS[1], "a " + PROMPTS[2].split(" ", 2)[2]]
    assert oracle.oracle_score(truth[:3], prompts).isnan().tolist() == [True, False, False]
    assert oracle.correct(truth[:3], prompts).tolist() == [False, True, True]
    nothing, everything, no_size = oracle.explain_scores(truth[:3], prompts)
    assert nothing is None
    assert everything is not None
    assert tuple(everything) == oracle.CRITERIA
    assert no_size is not None
    assert set(oracle.CRITERIA) - set(no_size) == {"size"}


def test_larger_pictures_are_judged_alike(truth: torch.Tensor) -> None:
    larger = torch.nn.functional.interpolate(truth[:16], scale_factor=2.0, mode="nearest")
    assert (oracle.oracle_score(larger, PROMPTS[:16]) - oracle.oracle_score(truth[:16], PROMPTS[:16])).abs().max() < 0.1


def test_pictures_and_prompts_must_be_as_many(truth: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        oracle.oracle_score(truth[:2], PROMPTS[:1])

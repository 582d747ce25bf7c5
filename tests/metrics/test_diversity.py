"""Every metric against numbers worked out by hand, and against its formula written out another way."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from draftcli.metrics.diversity import (
    cosine_diversity,
    frechet_distance,
    kernel_distance,
    log_spectral_distance,
    neighbourhoods,
    spectral_distance,
    squared_diversity,
    vendi_score,
)


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(40, 4)), random.normal(0.5, 1.3, size=(30, 4))


def test_pairwise_by_hand():
    """Cosines of (1,0), (0,1), (1,1): 0, 1/sqrt 2, 1/sqrt 2; squared distances 2, 1, 1."""
    three = np.array([[1.0, 0], [0, 1], [1, 1]])
    assert cosine_diversity(three) == pytest.approx(1 - np.sqrt(2) / 3)
    assert squared_diversity(three) == pytest.approx(4 / 3)
    assert cosine_diversity(np.array([[1.0, 0], [-3, 0]])) == pytest.approx(2)


def test_one_picture_has_no_diversity_to_speak_of():
    assert np.isnan(cosine_diversity(np.ones((1, 3))))
    assert np.isnan(squared_diversity(np.ones((1, 3))))


def test_vendi_by_hand():
    assert vendi_score(np.eye(5)) == pytest.approx(5), "all different"
    assert vendi_score(np.tile([3.0, 4], (7, 1))) == pytest.approx(1), "all the same"
    assert vendi_score(np.array([[1.0, 0], [2, 0], [0, 1], [0, 5]])) == pytest.approx(2), "two pairs"
    # eigenvalues of [[1, 1/2], [1/2, 1]] / 2 are 3/4 and 1/4
    pair = np.array([[1, 0], [0.5, np.sqrt(0.75)]])
    assert vendi_score(pair) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_vendi_by_the_definition(clouds):
    """More pictures than features takes the smaller matrix, with the same answer."""
    unit = clouds[0] / np.linalg.norm(clouds[0], axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(clouds[0]) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def test_neighbourhoods_by_hand():
    """On a line, k = 1: reference 0, 1, 10 (radii 1, 1, 9), samples 0.5, 3, 30 (radii 2.5, 2.5, 27)."""
    got = neighbourhoods(np.array([[0.0], [1], [10]]), np.array([[0.5], [3], [30]]), k=1)
    assert got.precision.tolist() == [1, 1, 0]  # 0.5 is in the balls of 0 and 1; 3 in that of 10; 30 in none
    assert got.density.tolist() == [2, 1, 0]
    assert got.recall.tolist() == [1, 1, 1]  # 10 is in the ball of 30
    assert got.coverage.tolist() == [1, 1, 1]


def test_neighbourhoods_by_the_definition(clouds):
    reference, samples = clouds
    k = 5

    def radius(of, among):
        return sorted(np.linalg.norm(of - other) for other in among)[k]  # the first is itself

    balls = [radius(r, reference) for r in reference]
    sample_balls = [radius(s, samples) for s in samples]
    got = neighbourhoods(reference, samples, k)
    for j, s in enumerate(samples):
        holding = sum(np.linalg.norm(r - s) < ball for r, ball in zip(reference, balls, strict=True))
        assert (got.precision[j], got.density[j]) == (holding > 0, holding / k)
    for i, r in enumerate(reference):
        distances = [np.linalg.norm(r - s) for s in samples]
        assert got.recall[i] == any(d < ball for d, ball in zip(distances, sample_balls, strict=True))
        assert got.coverage[i] == (min(distances) < balls[i])


def test_a_set_covers_itself_and_a_far_one_nothing(clouds):
    same, far = neighbourhoods(clouds[0], clouds[0]), neighbourhoods(clouds[0], clouds[1] + 100)
    assert same.recall.mean() == same.precision.mean() == same.coverage.mean() == 1
    assert far.recall.mean() == far.precision.mean() == far.coverage.mean() == far.density.mean() == 0


def test_neighbourhoods_need_more_pictures_than_neighbours():
    with pytest.raises(ValueError, match="at least 6"):
        neighbourhoods(np.zeros((5, 2)), np.zeros((9, 2)))


def test_spectral_distance_by_hand():
    """Variances 2 and 8 against 8 and 18 on two axes; which axis is which does not matter."""
    reference = np.array([[1.0, 2], [-1, -2], [1, -2], [-1, 2]]) * np.sqrt(1.5)
    samples = np.array([[3.0, 2], [-3, -2], [3, -2], [-3, 2]]) * np.sqrt(1.5)
    assert spectral_distance(reference, samples) == pytest.approx(np.hypot(8 - 2, 18 - 8))
    assert spectral_distance(reference, reference[:, ::-1]) == pytest.approx(0)
    assert log_spectral_distance(reference, samples) == pytest.approx(np.hypot(np.log10(4), np.log10(18 / 8)))


def test_frechet_distance_by_hand():
    """One dimension: (mu_1 - mu_2)^2 + (sigma_1 - sigma_2)^2."""
    assert frechet_distance(np.array([[-1.0], [0], [1]]), np.array([[2.0], [5], [8]])) == pytest.approx(25 + 4)


def test_frechet_distance_by_the_formula(clouds):
    a, b = clouds
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_by_the_formula(clouds):
    a, b = clouds

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    within = [np.mean([kernel(x, y) for i, x in enumerate(c) for j, y in enumerate(c) if i != j]) for c in clouds]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across)
    assert kernel_distance(np.array([[1.0], [1]]), np.array([[0.0], [0]])) == pytest.approx(8 + 1 - 2)

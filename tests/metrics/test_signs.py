"""Signs of drift on pictures whose numbers are known."""

import colorsys

import numpy as np
import pytest

from draftcli.metrics import signs


def plain(*colour: float, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.broadcast_to(np.array(colour, float)[None, :, None, None], (1, 3, *size)).copy()


def test_saturation_is_that_of_hsv():
    for colour in [(1, 0, 0), (0.5, 0.5, 0.5), (0.2, 0.6, 0.4), (0, 0, 0)]:
        assert signs.hsv_saturation(plain(*colour)) == pytest.approx(colorsys.rgb_to_hsv(*colour)[1])


def test_contrast_of_half_black_half_white_is_a_half():
    picture = plain(0, 0, 0)
    picture[..., :24] = 1
    assert signs.contrast(picture) == pytest.approx(0.5)
    assert signs.contrast(plain(0.3, 0.6, 0.9)) == pytest.approx(0)


def test_edges_of_a_ramp_and_of_a_step():
    """A slope of 0.16 a pixel is edge, half of it, which its border pixels have, is not; one step has two columns."""
    ramp = np.tile(np.arange(4) * 0.16, (1, 3, 8, 1))
    assert signs.edge_density(ramp) == pytest.approx(0.5)
    step = plain(0, 0, 0, size=(10, 10))
    step[..., 5:] = 1
    assert signs.edge_density(step) == pytest.approx(0.2)
    assert signs.edge_density(plain(0.2, 0.2, 0.2)) == 0


def test_colour_entropy_counts_colours():
    assert signs.colour_entropy(plain(0.1, 0.5, 1)) == 0
    four = plain(0, 0, 0)
    four[:, 0, :, 24:], four[:, 1, 16:] = 1, 1
    assert signs.colour_entropy(four) == pytest.approx(2)


def test_high_frequencies_of_a_checkerboard_and_of_a_wave():
    y, x = np.mgrid[:32, :32]
    board, wave = (x + y) % 2, 0.5 + 0.5 * np.cos(2 * np.pi * x / 16)
    for picture, share in ((board, 1), (wave, 0), (np.full_like(wave, 0.4), 0)):
        assert signs.high_frequency_energy(np.tile(picture, (1, 3, 1, 1)) * 1.0) == pytest.approx(share, abs=1e-9)


def test_clipped_counts_values_at_either_end_of_their_range():
    picture = np.full((1, 3, 10, 10), 0.5)
    picture[:, 0, :2] = 1.0
    picture[:, 1, :1] = 0.001
    picture[:, 2, :1] = 1 / 255  # the lowest but one that a file of 8 bits holds
    assert signs.clipped(picture) == pytest.approx(30 / 300)


def test_near_duplicates_count_across_prompts_only():
    small = np.array([[0.0, 0], [0.01, 0], [0.5, 0.5], [0.02, 0.02]])
    assert signs.near_duplicates(small, np.array([0, 0, 1, 2])).tolist() == [1, 1, 0, 1]
    assert signs.near_duplicates(small[:3], np.array([0, 0, 1])).tolist() == [0, 0, 0]


def test_a_picture_is_judged_by_itself_whatever_is_beside_it():
    pictures = np.random.default_rng(0).random((3, 3, 24, 40))
    for name, sign in signs.SIGNS.items():
        assert sign(pictures).tolist() == pytest.approx([sign(p[None])[0] for p in pictures]), name

"""Classifier-free guidance and the weightings of AIG."""

import pytest
import torch

from draftcli.core.denoise import Level
from draftcli.core.guidance import annealed, guided, weighing
from draftcli.errors import InputError


def weights(kind, total=5):
    weigh = weighing(kind)
    return [weigh(14.6, 1.0, i, total) for i in range(total)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("base", [0, 0, 0, 0, 0]),
        ("draft", [1, 1, 1, 1, 1]),
        ("tuned", [1, 1, 1, 1, 1]),
        ("linear", [0, 0.2, 0.4, 0.6, 0.8]),
        ("power_2", [0, 0.04, 0.16, 0.36, 0.64]),
        ("power_0.5", [0, 0.2**0.5, 0.4**0.5, 0.6**0.5, 0.8**0.5]),
        ("power_1", [0, 0.2, 0.4, 0.6, 0.8]),
        ("step_0", [1, 1, 1, 1, 1]),
        ("step_0.6", [0, 0, 0, 1, 1]),
        ("step_0.5", [0, 0, 0, 1, 1]),
        ("step_1", [0, 0, 0, 0, 0]),
    ],
)
def test_weights_by_kind(kind, expected):
    assert weights(kind) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "kind", ["", "cubic", "LINEAR", "linear_2", "base_1", "power", "power_", "power_x", "step_a_b"]
)
def test_an_unknown_kind_names_the_known_ones(kind):
    with pytest.raises(InputError) as error:
        weighing(kind)
    message = str(error.value)
    assert repr(kind) in message
    assert "\n" not in message
    for known in ("base", "draft", "linear", "power_P", "step_F"):
        assert known in message


@pytest.mark.parametrize(
    "kind", ["power_0", "power_-1", "power_inf", "power_nan", "step_-0.1", "step_1.01", "step_nan", "step_inf"]
)
def test_a_number_out_of_range_is_refused_with_the_range(kind):
    with pytest.raises(InputError, match=r"P > 0.*F in \[0, 1\]"):
        weighing(kind)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weighting_of_ones_own_must_stay_between_0_and_1(weight):
    predict = annealed(lambda x, level: x, lambda x, level: -x, lambda *_: weight)
    with pytest.raises(InputError, match="step 2 of 4"):
        predict(torch.ones(1), Level(2, 4, 1.0, 0.5, 1.0, 400))


def test_mixing_weighs_the_tuned_model():
    asked = []

    def weigh(*arguments):
        asked.append(arguments)
        return 0.25

    predict = annealed(lambda x, level: 10 * x, lambda x, level: 2 * x, weigh)
    assert predict(torch.ones(1), Level(2, 4, 1.5, 0.5, 1.5, 400)).item() == 4.0
    assert asked == [(1.5, 0.5, 2, 4)]


def test_guidance_moves_from_unconditional_to_conditional():
    output = torch.tensor([[1.0], [2.0], [11.0], [32.0]])  # unconditional first
    assert guided(output, 0).flatten().tolist() == [1, 2]
    assert guided(output, 1).flatten().tolist() == [11, 32]
    assert guided(output, 3).flatten().tolist() == [31, 92]

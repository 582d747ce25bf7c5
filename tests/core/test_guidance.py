"""Classifier-free guidance and the weightings of AIG."""

import math

import pytest
import torch

from draftcli.core.annealing import mixed, step_weights
from draftcli.core.guidance import guided
from draftcli.core.schedule import Level, make_schedule
from draftcli.core.weighings import named_weighing, weighing
from draftcli.errors import InputError

NOT_A_FUNCTION = 3


def three_quarters(sigma, sigma_next, i, total):
    return 0.75


def fails(sigma, sigma_next, i, total):
    return 1 / 0


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
        ("power_2.0", [0, 0.04, 0.16, 0.36, 0.64]),
        ("constant_0.3", [0.3] * 5),
        ("cosine", [(1 - math.cos(math.pi * i / 5)) / 2 for i in range(5)]),
        ("interval_0.2_0.6", [0, 1, 1, 0, 0]),
        ("interval_0_1", [1, 1, 1, 1, 1]),
        ("interval_0.4_0.4", [0, 0, 0, 0, 0]),
        ("reverse_linear", [1, 0.8, 0.6, 0.4, 0.2]),
        ("reverse_power_2", [1, 0.96, 0.84, 0.64, 0.36]),
        ("reverse_step_0.6", [1, 1, 1, 0, 0]),
        ("reverse_interval_0.2_0.6", [1, 0, 0, 1, 1]),
        ("reverse_base", [1, 1, 1, 1, 1]),
        ("reverse_constant_0.25", [0.75] * 5),
        ("tests.core.test_guidance:three_quarters", [0.75] * 5),
    ],
)
def test_weights_by_kind(kind, expected):
    assert weights(kind) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "kind",
    [
        *(
            "",
            "cubic",
            "LINEAR",
            "linear_2",
            "base_1",
            "power",
            "power_",
            "power_x",
            "step_a_b",
            "constant",
            "cosine_1",
        ),
        *(
            "interval_0.5",
            "interval_0_0.5_1",
            "reverse",
            "reverse_",
            "reverse_reverse_linear",
            "reverse_cubic",
            "linear ",
        ),
    ],
)
def test_an_unknown_kind_names_the_known_ones(kind):
    with pytest.raises(InputError) as error:
        weighing(kind)
    message = str(error.value)
    assert repr(kind) in message
    assert "\n" not in message
    for known in (
        "base",
        "draft",
        "linear",
        "power_P",
        "step_F",
        "constant_W",
        "cosine",
        "interval_A_B",
        "reverse_KIND",
    ):
        assert known in message


@pytest.mark.parametrize(
    "kind",
    [
        *("power_0", "power_-1", "power_inf", "power_nan", "step_-0.1", "step_1.01", "step_nan", "step_inf"),
        *("constant_-0.1", "constant_1.1", "interval_0.6_0.4", "interval_-1_1", "interval_0_2", "interval_nan_1"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(kind):
    with pytest.raises(InputError, match=r"P > 0.*F in \[0, 1\].*W in \[0, 1\].*0 <= A <= B <= 1"):
        weighing(kind)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weighting_of_ones_own_must_stay_between_0_and_1(weight):
    with pytest.raises(InputError, match="step 2 of 4"):
        step_weights(lambda sigma, sigma_next, i, total: weight if i == 2 else 0.5, make_schedule(4))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nowhere.at_all:weigh", "cannot import 'nowhere.at_all'"),
        ("tests.core.test_guidance:nothing", "has no function 'nothing'"),
        ("tests.core.test_guidance:NOT_A_FUNCTION", "has no function"),
        (":weigh", "cannot import ''"),
        ("tests.core.test_guidance:", "has no function ''"),
        ("tests.core.test_guidance:fails", "failed at step 0 of 3 (ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_had_is_said_so(kind, words):
    with pytest.raises(InputError) as error:
        step_weights(weighing(kind), make_schedule(3))
    assert words in str(error.value)
    assert kind in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("draft", "tuned"),
        ("power_2.0", "power_2"),
        ("interval_0.20_0.6", "interval_0.2_0.6"),
        ("reverse_draft", "reverse_tuned"),
        ("step_.5", "step_0.5"),
        ("tests.core.test_guidance:three_quarters", "tests.core.test_guidance.three_quarters"),
    ],
)
def test_a_kind_has_one_name(kind, name):
    assert named_weighing(kind)[0] == name


def test_a_weighting_is_asked_once_a_step_with_its_levels():
    asked, schedule = [], make_schedule(3)
    step_weights(lambda *arguments: asked.append(arguments) or 0.25, schedule)
    sigmas = schedule.sigmas.tolist()
    assert asked == [(sigmas[i], sigmas[i + 1], i, 3) for i in range(3)]


def test_mixing_weighs_the_tuned_model():
    predict = mixed(lambda x, level: 10 * x, lambda x, level: 2 * x, [0, 0, 0.25, 1])
    assert predict(torch.ones(1), Level(2, 4, 1.5, 0.5, 1.5, 400)).item() == 4.0


def test_guidance_moves_from_unconditional_to_conditional():
    output = torch.tensor([[1.0], [2.0], [11.0], [32.0]])  # unconditional first
    assert guided(output, 0).flatten().tolist() == [1, 2]
    assert guided(output, 1).flatten().tolist() == [11, 32]
    assert guided(output, 3).flatten().tolist() == [31, 92]

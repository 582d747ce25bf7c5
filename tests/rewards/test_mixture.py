"""Several rewards as one: running statistics, targets, held-out rewards, micro-batches, relative rewards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import draftcli
from draftcli.config import Config, check_config
from draftcli.errors import InputError
from draftcli.rewards import WeightedSum, get_reward_model, load_held_out, load_reward
from draftcli.rewards.mixture import COMBINATIONS
from draftcli.rewards.wrappers import InMicroBatches, PromptRelative
from draftcli.spread import MEMORY
from draftcli.toy.reward import toy_reward

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a blue square", "a green star", "a large red square"]


class Scaled:
    """Brightness times a factor."""

    def __init__(self, factor: float) -> None:
        self.name, self.factor = "scaled", factor

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.factor * images.mean((1, 2, 3))


def mixture(kind: str = "std", **setting: object) -> WeightedSum:
    cfg = check_config({"rewards": {"a": {"normalise": kind, **setting}, "b": 0.0}})
    return WeightedSum({"a": Scaled(100.0), "b": Scaled(1.0)}, cfg.rewards)


def gradient(total: WeightedSum, images: Tensor, prompts: list[str]) -> Tensor:
    images = images.clone().requires_grad_()
    total(images, prompts).sum().backward()
    assert images.grad is not None
    return images.grad


def test_the_first_step_only_measures_and_then_the_scale_is_that_of_the_steps_before() -> None:
    total = mixture()
    assert gradient(total, IMAGES, PROMPTS).abs().max() == 0
    first = total.pop_scores()
    total.end_step(first)
    images = IMAGES.clone().requires_grad_()
    score = total(images, PROMPTS)
    deviation = float(first["a"].double().std(correction=0))
    torch.testing.assert_close(score, 100 * IMAGES.mean((1, 2, 3)) / deviation)
    second = {"a": torch.tensor([1.0, 5.0, 3.0, 7.0])}
    total.end_step(second)
    numbers = torch.cat([first["a"], second["a"]]).double()
    weights = torch.tensor([MEMORY] * 4 + [1.0] * 4, dtype=torch.float64)
    mean = (weights * numbers).sum() / weights.sum()
    variance = (weights * (numbers - mean).square()).sum() / weights.sum()
    assert total._spread["a"].scale("std") == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_range_is_of_everything_seen() -> None:
    total = mixture("range")
    for scores in ([2.0, 3.0], [2.5, math.nan], [1.0, 2.0]):
        total.end_step({"a": torch.tensor(scores)})
    assert total._spread["a"].scale("range") == 2.0


def test_scale_of_the_reward_does_not_matter_once_normalised() -> None:
    cfg = check_config({"rewards": {"a": {"normalise": "std"}}})
    results = []
    for factor in (1.0, 1024.0):
        total = WeightedSum({"a": Scaled(factor)}, cfg.rewards)
        gradient(total, IMAGES, PROMPTS)
        total.end_step(total.pop_scores())
        results.append(gradient(total, IMAGES, PROMPTS))
    torch.testing.assert_close(results[0], results[1])


def test_micro_batches_and_ranks_leave_the_same_statistics_bit_for_bit() -> None:
    scores = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 3 + 20
    whole, shuffled = mixture(), mixture()
    for step in range(3):
        whole.end_step({"a": scores + step})
        shuffled.end_step({"a": (scores + step)[torch.randperm(16, generator=torch.Generator().manual_seed(step))]})
    assert torch.equal(whole.state_dict()["a"], shuffled.state_dict()["a"])
    parts = mixture()
    for first in (0, 2):
        gradient(parts, IMAGES[first : first + 2], PROMPTS[first : first + 2])
    together = mixture()
    gradient(together, IMAGES, PROMPTS)
    torch.testing.assert_close(parts.pop_scores()["a"], together.pop_scores()["a"], rtol=1e-6, atol=0)


def test_resumed_statistics_are_bit_exact() -> None:
    whole, parts = mixture(), mixture()
    for step in range(6):
        scores = {"a": torch.randn(5, generator=torch.Generator().manual_seed(step))}
        whole.end_step(scores)
        if step == 3:
            state = parts.state_dict()
            parts = mixture()
            parts.load_state_dict(state)
        parts.end_step(scores)
    assert torch.equal(whole.state_dict()["a"], parts.state_dict()["a"])
    assert set(whole.state_dict()) == {"a"}, "what is not normalised has no state"
    with pytest.raises(KeyError, match="normalised rewards"):
        whole.load_state_dict({"c": torch.zeros(5)})


def test_validation_disturbs_nothing() -> None:
    total = mixture()
    with torch.no_grad():
        total(IMAGES, PROMPTS)
    assert total.pop_scores() == {}
    assert total.state_dict()["a"][0] == 0


def test_scores_that_are_all_alike_do_not_blow_up() -> None:
    total = mixture()
    total.end_step({"a": torch.full((7,), 0.1)})
    assert gradient(total, IMAGES, PROMPTS).abs().max() == 0


def test_a_target_stops_pushing_above_it() -> None:
    total = WeightedSum({"a": Scaled(1.0)}, check_config({"rewards": {"a": {"target": 0.5}}}).rewards)
    dark, light = IMAGES * 0.5, 0.5 + IMAGES * 0.5
    moved = gradient(total, torch.cat([dark, light]), PROMPTS * 2)
    assert (moved[:4] > 0).all()
    assert (moved[4:] == 0).all()


def test_where_lower_scores_are_wanted_a_target_stops_pushing_below_it() -> None:
    settings = {"rewards": {"a": {"target": 0.5, "weight": -1}}}
    total = WeightedSum({"a": Scaled(1.0)}, check_config(settings).rewards)
    dark, light = IMAGES * 0.5, 0.5 + IMAGES * 0.5
    moved = gradient(total, torch.cat([dark, light]), PROMPTS * 2)
    assert (moved[:4] == 0).all()
    assert (moved[4:] < 0).all()


def test_a_score_without_gradient_is_refused_with_the_reason() -> None:
    class Detached(Scaled):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return super().__call__(images, prompts).detach()

    total = WeightedSum({"a": Detached(1.0)})
    with pytest.raises(InputError, match="no gradient in the image"):
        total(IMAGES.clone().requires_grad_(), PROMPTS)
    with torch.no_grad():
        assert total(IMAGES, PROMPTS).shape == (4,)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_micro_batches_change_neither_score_nor_gradient(size: int) -> None:
    """Within rounding: a matrix product of three rows may be summed in another order than one of four."""
    whole = toy_reward()
    parts = InMicroBatches(toy_reward(), size)
    a, b = (IMAGES.clone().requires_grad_() for _ in range(2))
    one, two = whole(a, PROMPTS), parts(b, PROMPTS)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    one.sum().backward()
    two.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_micro_batches_hold_less_memory() -> None:
    def held(reward: torch.nn.Module) -> int:
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            kept = reward(IMAGES.clone().requires_grad_(), PROMPTS)
        del kept
        return sum(sizes.values())

    assert held(InMicroBatches(toy_reward(), 1)) < held(toy_reward()) / 4


def test_a_relative_reward_is_the_difference_of_two_wordings() -> None:
    reward = toy_reward()
    relative = PromptRelative(reward, "in the centre", "at the left", strength=0.5)
    wanted = reward(IMAGES, [f"in the centre. {p}" for p in PROMPTS])
    unwanted = reward(IMAGES, [f"at the left. {p}" for p in PROMPTS])
    torch.testing.assert_close(relative(IMAGES, PROMPTS), 1.5 * wanted - unwanted, rtol=1e-4, atol=1e-4)
    images = IMAGES.clone().requires_grad_()
    relative(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not any(p.requires_grad for p in relative.parameters())
    with pytest.raises(InputError, match="cannot be relative"):
        PromptRelative(load_reward("brightness"), "a", "b")


def config(**settings: object) -> Config:
    return check_config({"rewards": {"toy": 1.0}, **settings})


def test_settings_reach_the_rewards() -> None:
    relative = {"positive": "bright", "negative": "dark"}
    cfg = config(rewards={"toy": {"relative": relative, "micro_batch_size": 2}, "brightness": {"micro_batch_size": 1}})
    model = get_reward_model(cfg)
    assert isinstance(model, WeightedSum)
    assert isinstance(model.rewards["toy"], InMicroBatches)
    assert isinstance(model.rewards["toy"].reward, PromptRelative)
    expected = PromptRelative(toy_reward(), "bright", "dark")(IMAGES, PROMPTS) + IMAGES.mul(
        torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    ).sum(1).mean((1, 2))
    torch.testing.assert_close(model(IMAGES, PROMPTS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        ["toy", "brightness"],
        [{"name": "toy", "micro_batch_size": None}, "brightness"],
        {"toy": {}, "brightness": None},
    ],
)
def test_held_out_rewards_as_list_or_mapping(given: object) -> None:
    cfg = config(rewards={"saturation": 1.0}, held_out_rewards=given)
    assert list(cfg.held_out_rewards) == ["toy", "brightness"]
    assert list(load_held_out(cfg).rewards) == ["toy", "brightness"]
    again = draftcli.config.dump_config(cfg)
    assert "held_out_rewards:" in again


def test_a_reward_that_is_trained_on_is_not_held_out() -> None:
    cfg = config(held_out_rewards=["toy", "brightness"])
    assert list(cfg.held_out) == list(load_held_out(cfg).rewards) == ["brightness"]


def test_held_out_rewards_take_weights_of_their_own(tmp_path) -> None:
    judge = {"name": "toy", "pretrained": str(tmp_path / "nowhere")}
    cfg = config(rewards={"saturation": 1.0}, held_out_rewards=[judge])
    with pytest.raises(InputError, match="nowhere cannot be loaded"):
        load_held_out(cfg)
    with pytest.raises(InputError, match="expected a name"):
        config(held_out_rewards=[{"pretrained": "x"}])
    with pytest.raises(InputError, match="did you mean pretrained"):
        config(held_out_rewards={"toy": {"pretraind": "x"}})
    cfg = draftcli.config.load_config("toy", ["held_out_rewards.toy_oracle.pretrained=x", "rewards.toy.normalise=std"])
    assert cfg.held_out_rewards["toy_oracle"].pretrained == "x"
    assert cfg.rewards["toy"].normalise == "std"


class Choosy(Scaled):
    """Has nothing to say about squares; NaN comes in on the way, so that its plain gradient is NaN as well."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        said = torch.tensor([torch.nan if "square" in prompt else 1.0 for prompt in prompts], dtype=images.dtype)
        return self.factor * (images * said.view(-1, 1, 1, 1)).mean((1, 2, 3))


def test_a_reward_that_has_nothing_to_say_counts_0_in_value_and_gradient() -> None:
    rewards = check_config({"rewards": {"a": {"weight": 2.0, "target": 50.0}, "b": 0.5}}).rewards
    total = WeightedSum({"a": Choosy(3.0), "b": Scaled(1.0)}, rewards)
    images = IMAGES.double()
    coefficients = torch.tensor([2 * 3 + 0.5, 0.5, 2 * 3 + 0.5, 0.5], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(total(images, PROMPTS), coefficients * images.mean((1, 2, 3)), rtol=1e-12, atol=0)
    found = gradient(total, images, PROMPTS)
    expected = (coefficients / images[0].numel()).view(4, 1, 1, 1).expand_as(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert total.pop_scores()["a"].isnan().tolist() == [False, True, False, True], "the log tells 0 from nothing to say"


def test_nothing_to_say_is_0_also_below_a_negative_target() -> None:
    total = WeightedSum({"a": Choosy(3.0)}, check_config({"rewards": {"a": {"target": -1.0}}}).rewards)
    assert total(IMAGES, PROMPTS).tolist() == [-1, 0, -1, 0]


def test_nothing_to_say_is_left_out_of_the_statistics() -> None:
    rewards = check_config({"rewards": {"a": {"normalise": "std"}}}).rewards
    choosy, plain = WeightedSum({"a": Choosy(3.0)}, rewards), WeightedSum({"a": Scaled(3.0)}, rewards)
    gradient(choosy, IMAGES, PROMPTS)
    gradient(plain, IMAGES[::2], PROMPTS[::2])
    for total in (choosy, plain):
        total.end_step(total.pop_scores())
    torch.testing.assert_close(choosy.state_dict(), plain.state_dict())


def test_a_picture_that_is_not_finite_is_not_nothing_to_say() -> None:
    """A training that diverges must be seen."""
    images = IMAGES.clone()
    images[1] = torch.nan
    assert WeightedSum({"a": Scaled(1.0)})(images, PROMPTS).isnan().tolist() == [False, True, False, False]


def test_rewards_that_say_nothing_at_all_need_no_graph() -> None:
    class Silent(Scaled):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.full((len(prompts),), torch.nan)

    total = WeightedSum({"a": Silent(1.0)})
    assert gradient(total, IMAGES, PROMPTS).abs().max() == 0
    assert total.pop_scores()["a"].isnan().all()


# ------------------------------------------------------------------------------------------ the one that gains least


class Channel:
    """The mean of one colour channel, times a factor and plus an offset that mean nothing."""

    def __init__(self, channel: int, factor: float, offset: float) -> None:
        self.name, self.channel, self.factor, self.offset = f"channel {channel}", channel, factor, offset

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.factor * images[:, self.channel].mean((1, 2)) + self.offset


def least_gain(factor: float = 1.0, offset: float = 0.0, **second: object) -> WeightedSum:
    """Of red and blue, blue in other units; they have seen IMAGES."""
    second = {"normalise": "std", **second}
    cfg = check_config({"draftp": {"combine": "min"}, "rewards": {"red": {"normalise": "std"}, "blue": second}})
    total = COMBINATIONS[cfg.draftp.combine]({"red": Channel(0, 1, 0), "blue": Channel(2, factor, offset)}, cfg.rewards)
    gradient(total, IMAGES, PROMPTS)
    total.end_step(total.pop_scores())
    return total


def gains() -> tuple[Tensor, Tensor]:
    """Of red and blue in IMAGES: deviations above the mean, by hand."""
    red, blue = IMAGES[:, 0].mean((1, 2)), IMAGES[:, 2].mean((1, 2))
    return tuple((score - score.mean()) / score.std(correction=0) for score in (red, blue))


def test_each_picture_counts_what_has_gained_least_in_it() -> None:
    red, blue = gains()
    torch.testing.assert_close(least_gain()(IMAGES, PROMPTS), torch.minimum(red, blue), rtol=1e-3, atol=1e-3)
    slope = gradient(least_gain(), IMAGES, PROMPTS)
    worse = (red < blue).tolist()
    assert set(worse) == {True, False}, "some images of each"
    for i, is_red in enumerate(worse):
        assert (slope[i, 0].abs().max() > 0, slope[i, 2].abs().max() > 0) == (is_red, not is_red)
    assert slope[:, 1].abs().max() == 0


def test_units_do_not_decide_what_has_gained_least() -> None:
    other = least_gain(factor=512.0, offset=-300.0)(IMAGES, PROMPTS)
    torch.testing.assert_close(other, least_gain()(IMAGES, PROMPTS), rtol=1e-2, atol=1e-2)


def test_a_gain_is_measured_from_the_first_step() -> None:
    """And not from what a reward has come to: one that rises on all pictures is no longer the least."""
    total = least_gain()
    for _ in range(5):
        total.end_step({"red": IMAGES[:, 0].mean((1, 2)) + 9, "blue": IMAGES[:, 2].mean((1, 2))})
    images = IMAGES + torch.tensor([9.0, 0.0, 0.0]).view(1, 3, 1, 1)
    slope = gradient(total, images, PROMPTS)
    assert slope[:, 0].abs().max() == 0
    assert slope[:, 2].abs().amin(0).min() > 0


def test_what_has_reached_its_target_counts_but_is_not_pushed() -> None:
    """The least of the clamped gains, and the gradient of the least that is below its target; none: no gradient."""
    red, blue = (score.double() for score in gains())
    reds, blues = IMAGES[:, 0].mean((1, 2)), IMAGES[:, 2].mean((1, 2))
    first, second = float(reds.sort().values[1:3].mean()), float(blues.sort().values[1:3].mean())
    total = least_gain(target=second)
    total.settings["red"] = total.settings["red"].model_copy(update={"target": first})
    bounds = [(t - score.mean()) / score.std(correction=0) for t, score in ((first, reds), (second, blues))]
    expected = torch.minimum(red.clamp(max=bounds[0]), blue.clamp(max=bounds[1])).float()
    torch.testing.assert_close(total(IMAGES, PROMPTS), expected, rtol=1e-3, atol=1e-3)
    slope = gradient(total, IMAGES, PROMPTS)
    for i in range(len(IMAGES)):
        open_ones = {
            c: g for c, g, is_open in ((0, red[i], reds[i] < first), (2, blue[i], blues[i] < second)) if is_open
        }
        pushed = min(open_ones, key=open_ones.__getitem__, default=None)
        assert {c for c in (0, 1, 2) if slope[i, c].abs().max() > 0} == (set() if pushed is None else {pushed})


def test_lower_scores_of_one_can_be_wanted() -> None:
    red, blue = gains()
    found = least_gain(weight=-1)(IMAGES, PROMPTS)
    torch.testing.assert_close(found, torch.minimum(red, -blue), rtol=1e-3, atol=1e-3)


def test_weight_0_leaves_a_reward_out() -> None:
    torch.testing.assert_close(least_gain(weight=0)(IMAGES, PROMPTS), gains()[0], rtol=1e-3, atol=1e-3)


def test_a_reward_with_nothing_to_say_is_not_the_least() -> None:
    """It speaks of one prompt alone; before the first step is over none counts."""
    cfg = check_config({"draftp": {"combine": "min"}, "rewards": {n: {"normalise": "std"} for n in ("a", "b")}})
    total = COMBINATIONS["min"]({"a": Choosy(3.0), "b": Channel(0, 1, 0)}, cfg.rewards)
    assert total(IMAGES, PROMPTS).tolist() == [0, 0, 0, 0]
    assert gradient(total, IMAGES, PROMPTS).abs().max() == 0
    total.end_step(total.pop_scores())
    assert total(IMAGES, PROMPTS).isfinite().all()
    assert gradient(total, IMAGES, PROMPTS).isfinite().all()


def test_statistics_of_a_version_without_the_first_step_are_read() -> None:
    total = mixture()
    total.load_state_dict({"a": torch.tensor([4.0, 2.0, 8.0, 0.0, 5.0], dtype=torch.float64)})
    assert total.state_dict()["a"].tolist() == [4, 2, 8, 0, 5, 2]


BASE = {"a": torch.tensor([10.0, 14.0, 12.0, 12.0]), "b": torch.tensor([0.1, 0.3, 0.2, 0.2])}
TUNED = {"a": torch.tensor([12.0, 18.0, math.nan, math.nan]), "b": torch.tensor([0.3, 0.1, 0.4, math.nan])}


def of_scores(combine: str, **settings: object) -> list[float]:
    """Of TUNED, by the rewards a and b with these settings."""
    cfg = check_config({"draftp": {"combine": combine}, "rewards": settings})
    return COMBINATIONS[combine]({"a": Scaled(1), "b": Scaled(1)}, cfg.rewards).of_scores(TUNED, BASE).tolist()


def test_what_known_scores_count_as_they_are() -> None:
    """A weighted sum; what says nothing counts 0; nan where none says anything."""
    found = of_scores("sum", a=1.0, b=2.0)
    assert found == pytest.approx([12.6, 18.2, 0.8, math.nan], nan_ok=True)


def test_what_known_scores_count_normalised_and_with_a_target() -> None:
    """In deviations of the base's scores, a's sqrt(2) and b's sqrt(0.005); min(score, 16) of a."""
    found = of_scores("sum", a={"normalise": "std", "target": 16}, b={"normalise": "std", "weight": -1})
    a, b = math.sqrt(2), math.sqrt(0.005)
    assert found == pytest.approx([12 / a - 0.3 / b, 16 / a - 0.1 / b, -0.4 / b, math.nan], nan_ok=True)


def test_what_known_scores_count_by_the_least_gain() -> None:
    """From the base's means, 12 and 0.2."""
    found = of_scores("min", a={"normalise": "std"}, b={"normalise": "std"})
    a, b = math.sqrt(2), math.sqrt(0.005)
    assert found == pytest.approx([min(0 / a, 0.1 / b), min(6 / a, -0.1 / b), 0.2 / b, math.nan], nan_ok=True)
    # An image that has reached both targets counts no less than one that has not.
    found = of_scores("min", a={"normalise": "std", "target": 12}, b={"normalise": "std", "target": 0.25})
    assert found == pytest.approx([0, min(0 / a, -0.1 / b), 0.05 / b, math.nan], nan_ok=True)

"""One rule for reward hacking, in a training and in an evaluation."""

import math

import pytest

from draftcli.metrics.hacking import (
    Fall,
    Hacking,
    RewardMean,
    SignChange,
    Standing,
    find_hacking,
)


def at(step: int, held_out: float, trained: float, width: float = 0.1) -> Standing:
    def mean(value: float) -> RewardMean:
        return RewardMean(value, value - width / 2, value + width / 2)

    return Standing(f"step {step}", {"trained": mean(trained), "held_out": mean(held_out)})


HISTORY = [at(0, 0.5, 1.0), at(1, 1.0, 1.2), at(2, 0.99, 1.3)]


@pytest.mark.parametrize(
    ("now", "is_hacking"),
    [
        (at(3, held_out=0.7, trained=1.5), True),
        (at(3, held_out=0.98, trained=1.5), False),  # within half of its interval
        (at(3, held_out=0.94, trained=1.5), True),  # just beyond it
        (at(3, held_out=0.7, trained=1.0), False),  # both fall: a bad step
        (at(3, held_out=1.2, trained=1.5), False),
        (at(3, held_out=math.nan, trained=1.5), False),
        (at(3, held_out=0.7, trained=math.nan), False),
        (at(3, held_out=0.7, trained=1.5, width=math.nan), False),  # one prompt has no interval
        (at(3, held_out=0.7, trained=1.5, width=0.0), False),  # nor have differences that are all equal
        (at(3, held_out=math.nextafter(1, 0), trained=1.5, width=0.0), False),  # least of all by rounding
    ],
)
def test_a_held_out_reward_falls_while_a_trained_one_rises(now: Standing, is_hacking: bool) -> None:
    assert bool(find_hacking([*HISTORY, now], {"trained": 1})) == is_hacking


def test_the_verdict_says_what_fell_since_when_and_what_rose() -> None:
    verdict = find_hacking([*HISTORY, at(3, 0.7, 1.5)], {"trained": 1})
    assert verdict is not None
    assert verdict.falls == (Fall("held_out", 1.0 - 0.7, "step 1", "trained"),)
    assert verdict.sentence("held-out prompts") == (
        "held_out on held-out prompts fell by 0.3 against step 1 while trained, which was trained on, rose: "
        "this looks like reward hacking"
    )


def test_a_first_validation_has_nothing_to_fall_from() -> None:
    assert find_hacking(HISTORY[:1], {"trained": 1}) is None


def test_without_a_held_out_reward_the_reward_of_the_training_steps_is_what_rises() -> None:
    history = [
        Standing(f"step {step}", {"trained": RewardMean(mean, mean - 0.1, mean + 0.1)}, in_training)
        for step, mean, in_training in ((1, 1.0, 1.0), (2, 0.5, 2.0))
    ]
    verdict = find_hacking(history, {"trained": 1})
    assert verdict is not None
    assert verdict.sentence("held-out prompts").startswith(
        "trained on held-out prompts fell by 0.5 against step 1 while the reward in training rose"
    )


def test_a_line_with_null_is_one_that_could_not_be_measured() -> None:
    line = {"step": 2, "rewards": {"held_out": {"tuned": None, "low": None, "high": None}}, "training_reward": None}
    assert find_hacking([*HISTORY, Standing.of_validation(line)], {"trained": 1}) is None


def test_every_fall_is_named() -> None:
    base = Standing("base", {name: RewardMean(1.0) for name in ("trained", "one", "two")})
    now = {"trained": RewardMean(2.0, 0.9, 1.1), "one": RewardMean(0.5, -0.6, -0.4)}
    for interval, falls in (((-0.21, 0.01), ["one"]), ((-0.15, -0.05), ["one", "two"])):  # 0 inside, 0 outside
        verdict = find_hacking([base, Standing("now", {**now, "two": RewardMean(0.9, *interval)})], {"trained": 1})
        assert verdict is not None
        assert [fall.reward for fall in verdict.falls] == falls


def test_a_held_out_reward_that_rises_is_not_a_trained_one() -> None:
    before = Standing("base", {name: RewardMean(1.0) for name in ("trained", "one", "two")})
    rewards = {
        "trained": RewardMean(1.0, -0.1, 0.1),
        "one": RewardMean(0.5, -0.6, -0.4),
        "two": RewardMean(2.0, 0.9, 1.1),
    }
    assert find_hacking([before, Standing("now", rewards)], {"trained": 1}) is None


def test_where_lower_scores_are_wanted_the_negative_of_a_reward_rises_and_falls() -> None:
    """As the same numbers with the other sign do where higher ones are wanted."""

    def flipped(standing: Standing, name: str) -> Standing:
        was = standing.rewards[name]
        return Standing(
            standing.when, {**standing.rewards, name: RewardMean(-was.mean, -was.high, -was.low, -was.gained)}
        )

    history = [*HISTORY, at(3, held_out=0.7, trained=1.5)]
    found = find_hacking([flipped(standing, "trained") for standing in history], {"trained": -1})
    assert found == Hacking((Fall("held_out", 1.0 - 0.7, "step 1", "-trained"),))
    assert find_hacking([flipped(standing, "trained") for standing in history], {"trained": 1}) is None
    both = [flipped(standing, "held_out") for standing in history]
    assert find_hacking(both, {"trained": 1, "held_out": -1}) == Hacking(
        (Fall("-held_out", 1.0 - 0.7, "step 1", "trained"),)
    )


def change(name: str, base: float, tuned: float, width: float = 0.02) -> SignChange:
    return SignChange(name, base, tuned, tuned - base - width / 2, tuned - base + width / 2)


@pytest.mark.parametrize(
    ("sign", "is_far"),
    [
        (change("saturation", 0.4, 0.52), True),
        (change("saturation", 0.4, 0.28), True),
        (change("saturation", 0.4, 0.48), False),  # a fifth
        (change("saturation", 0.4, 0.8, width=1.0), False),  # much, and not sure
        (change("saturation", 0.4, 0.8, width=math.nan), False),
        (change("saturation", 0.0, 0.8), False),  # black pictures have nothing to compare with
        (change("clipped", 0.0, 0.15), True),
        (change("clipped", 0.0, 0.09), False),
        (change("clipped", 0.3, 0.1), False),  # fewer burnt colours are no sign
        (change("near_duplicates", 0.0, 0.5), True),
        (change("near_duplicates", 0.5, 0.5), False),
        (change("diversity", 0.06, 0.02), True),
        (change("diversity", 0.06, 0.04), False),
        (change("diversity", 0.06, 0.2), False),  # more of it is no sign
        (change("batch_spread", 1.0, 0.3), True),
        (change("batch_spread", 1.0, 2.0), False),
        (change("saturation", math.nan, math.nan), False),
    ],
)
def test_a_sign_is_far_where_it_changed_surely_and_by_much(sign: SignChange, is_far: bool) -> None:
    assert sign.is_far == is_far


SATURATED, FLAT, BURNT = change("saturation", 0.4, 0.8), change("diversity", 0.06, 0.02), change("clipped", 0.0, 0.3)


@pytest.mark.parametrize(
    ("signs", "trained", "held_out", "is_hacking"),
    [
        ([SATURATED, FLAT], 0.5, 0.0, True),
        ([SATURATED, FLAT, BURNT], 0.5, 0.0, True),
        ([SATURATED, FLAT, BURNT], 0.5, 0.3, True),  # three, whatever is held out
        ([SATURATED, FLAT, BURNT], 0.0, 0.3, False),
        ([SATURATED], 0.5, 0.0, False),  # one alone
        ([SATURATED, change("clipped", 0.0, 0.05)], 0.5, 0.0, False),
        ([SATURATED, FLAT], 0.5, 0.3, False),  # what is held out has surely risen as well
        ([SATURATED, FLAT], 0.0, 0.0, False),  # nothing has risen
        ([SATURATED, FLAT], -0.5, 0.0, False),
        ([SATURATED, FLAT], 0.5, None, True),  # nothing is held out
    ],
)
def test_signs_speak_together_and_where_nothing_held_out_agrees(signs, trained, held_out, is_hacking) -> None:
    differences = {"trained": trained, **({} if held_out is None else {"held_out": held_out})}
    rewards = {name: RewardMean(1 + by, by - 0.1, by + 0.1) for name, by in differences.items()}
    base = Standing("base", {name: RewardMean(1.0, 0.0, 0.0) for name in rewards})
    verdict = find_hacking([base, Standing("now", rewards, signs=signs)], {"trained": 1})
    assert bool(verdict) == is_hacking
    if verdict is not None:
        assert verdict.signs == tuple(signs)
        assert verdict.falls == ()


def test_the_verdict_names_the_signs_that_it_saw() -> None:
    signs = (SATURATED, BURNT, change("batch_spread", 1.0, 0.25))
    assert Hacking((), signs, "toy").sentence("held-out prompts") == (
        "saturation is 2 times the base's, the share of clipped values is 0.3, the base's 0, the spread of the trained "
        "reward within a batch is 0.25 times what it was at first, while toy, which was trained on, rose: this looks "
        "like reward hacking"
    )


def test_signs_are_read_from_a_line_of_the_file() -> None:
    figures = {"base": 1.0, "tuned": 2.0, "low": 0.9, "high": 1.1, "n": 8, "difference": 1.0}
    line = {"step": 2, "rewards": {}, "diversity": figures, "signs": {"contrast": {**figures, "low": None}}}
    diversity, contrast = Standing.of_validation(line).signs
    assert diversity == SignChange("diversity", 1.0, 2.0, 0.9, 1.1)
    assert (contrast.name, contrast.tuned, contrast.is_far) == ("contrast", 2.0, False)

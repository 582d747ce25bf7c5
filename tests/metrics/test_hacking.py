"""One rule for reward hacking, in a training and in an evaluation."""

import math

import pytest

from draftcli.metrics.hacking import Fall, RewardMean, Standing, find_hacking, training_warning


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
    assert bool(find_hacking([*HISTORY, now], ["trained"])) == is_hacking


def test_the_verdict_says_what_fell_since_when_and_what_rose() -> None:
    verdict = find_hacking([*HISTORY, at(3, 0.7, 1.5)], ["trained"])
    assert verdict is not None
    assert verdict.falls == (Fall("held_out", 1.0 - 0.7, "step 1", "trained"),)
    assert verdict.sentence("held-out prompts") == (
        "held_out on held-out prompts fell by 0.3 against step 1 while trained, which was trained on, rose: "
        "this looks like reward hacking"
    )


def test_a_first_validation_has_nothing_to_fall_from() -> None:
    assert find_hacking(HISTORY[:1], ["trained"]) is None


def test_without_a_held_out_reward_the_reward_of_the_training_steps_is_what_rises() -> None:
    lines = [
        {
            "step": step,
            "rewards": {"trained": {"tuned": mean, "low": mean - 0.1, "high": mean + 0.1}},
            "training_reward": training,
        }
        for step, mean, training in ((1, 1.0, 1.0), (2, 0.5, 2.0))
    ]
    warning = training_warning(lines, ["trained"])
    assert warning is not None
    assert warning.startswith(
        "trained on held-out prompts fell by 0.5 against step 1 while the reward in training rose"
    )
    assert "lower optim.lr" in warning
    assert training_warning(lines[:1], ["trained"]) is None


def test_a_line_with_null_is_one_that_could_not_be_measured() -> None:
    line = {"step": 2, "rewards": {"held_out": {"tuned": None, "low": None, "high": None}}, "training_reward": None}
    assert find_hacking([*HISTORY, Standing.of_validation(line)], ["trained"]) is None


def test_every_fall_is_named() -> None:
    base = Standing("base", {name: RewardMean(1.0) for name in ("trained", "one", "two")})
    now = {"trained": RewardMean(2.0, 0.9, 1.1), "one": RewardMean(0.5, -0.6, -0.4)}
    for interval, falls in (((-0.21, 0.01), ["one"]), ((-0.15, -0.05), ["one", "two"])):  # 0 inside, 0 outside
        verdict = find_hacking([base, Standing("now", {**now, "two": RewardMean(0.9, *interval)})], ["trained"])
        assert verdict is not None
        assert [fall.reward for fall in verdict.falls] == falls


def test_a_held_out_reward_that_rises_is_not_a_trained_one() -> None:
    before = Standing("base", {name: RewardMean(1.0) for name in ("trained", "one", "two")})
    rewards = {
        "trained": RewardMean(1.0, -0.1, 0.1),
        "one": RewardMean(0.5, -0.6, -0.4),
        "two": RewardMean(2.0, 0.9, 1.1),
    }
    assert find_hacking([before, Standing("now", rewards)], ["trained"]) is None

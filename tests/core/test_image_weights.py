"""How much the penalty counts for each image: by its reward, or by the disagreement with rewards that are held out."""

import json
from math import erf, sqrt
from pathlib import Path

import pytest
import torch

from draftcli.config import DraftpConfig
from draftcli.core.batch import Batch
from draftcli.core.image_weights import HeldOutGate
from draftcli.core.penalty import Penalty, make_penalty
from draftcli.errors import InputError
from draftcli.planning.memory import memory_plan
from tests.command import draftp, recipe
from tests.ranks import train_in_ranks
from tests.tiny import batch, prefers_red, tiny_config, tiny_model

GATE, BY_REWARD = {"kl_gate": "held_out"}, {"kl_by_reward": True}
RED, GREEN = "tests.example_rewards:red", "tests.example_rewards:green"
every_way = pytest.mark.parametrize("settings", [GATE, BY_REWARD], ids=["gate", "by_reward"])
LONG = pytest.mark.slow(reason="more of the same")
gate_first = pytest.mark.parametrize("settings", [GATE, pytest.param(BY_REWARD, marks=LONG)], ids=["gate", "by_reward"])


def normal(z: float) -> float:
    return (1 + erf(z / sqrt(2))) / 2


def said(scores: torch.Tensor):
    """A reward that gives these scores, whatever it is shown."""
    return lambda images, prompts: scores


def weigh(penalty: Penalty, trained: list[float], *held_out: list[float]) -> list[float] | None:
    """The weights of images with these scores, in float64."""
    if isinstance(penalty.weights, HeldOutGate):
        scores = [torch.tensor(some, dtype=torch.float64) for some in held_out]
        penalty.weights.held_out = {f"judge {i}": said(some) for i, some in enumerate(scores)}
    images, rewards = torch.zeros(len(trained), 3, 1, 1), torch.tensor(trained, dtype=torch.float64)
    weights = penalty.weigh(images, [""] * len(trained), rewards)
    return None if weights is None else weights.tolist()


def take(penalty: Penalty, trained: list[float], *held_out: list[float]) -> list[float] | None:
    """A whole step of images with these scores; their weights."""
    weights = weigh(penalty, trained, *held_out)
    penalty.weights.end_step(penalty.weights.pop_scores())
    return weights


def penalty_with(settings: dict, beta: float = 2.0) -> Penalty:
    return make_penalty(DraftpConfig.model_validate({"kl_coeff": beta, **settings}))


# ------------------------------------------------------------------------------------------------- values by hand


def test_what_by_reward_says():
    penalty = penalty_with(BY_REWARD)
    assert take(penalty, [1.0, 3.0]) is None, "nothing to compare with yet"
    # mean 2, deviation 1
    assert weigh(penalty, [2.0, 3.0, 0.5]) == pytest.approx([1.0, 2 * normal(1), 2 * normal(-1.5)], rel=1e-12)
    penalty.weights.pop_scores()
    take(penalty, [4.0])
    # The first two count 0.99 each: mean (0.99 * 4 + 4) / 2.98, and their squares about it.
    mean = (0.99 * 4 + 4) / 2.98
    deviation = sqrt((0.99 * ((1 - mean) ** 2 + (3 - mean) ** 2) + (4 - mean) ** 2) / 2.98)
    assert weigh(penalty, [2.0]) == pytest.approx([2 * normal((2 - mean) / deviation)], rel=1e-12)


def test_what_the_gate_says():
    penalty = penalty_with(GATE)
    assert take(penalty, [1.0, 3.0], [10.0, 30.0]) is None
    assert take(penalty, [3.0, 1.0], [10.0, 30.0]) is None, "no excess is known to be typical yet"
    # Ranks in the second step were normal(1), normal(-1) by the trained reward and the other way round by the other, so
    # the excess was normal(1) - normal(-1) and 0. Both rewards still have means 2 and 20 and deviations 1 and 10.
    typical = (normal(1) - normal(-1)) / 2
    weights = weigh(penalty, [3.0, 2.0, 1.0, 2.5], [20.0, 20.0, 30.0, 25.0])
    assert weights == pytest.approx([(normal(1) - 0.5) / typical, 0.0, 0.0, 0.0], rel=1e-12, abs=1e-12)


def test_the_gate_takes_the_mean_of_the_held_out_rewards():
    penalty, silent = penalty_with(GATE), float("nan")
    take(penalty, [1.0, 3.0], [10.0, 30.0], [0.1, 0.3])
    take(penalty, [3.0, 1.0], [10.0, 30.0], [0.1, 0.3])
    typical = (normal(1) - normal(-1)) / 2
    weights = weigh(penalty, [3.0, 3.0, 3.0], [10.0, silent, silent], [0.2, 0.2, silent])
    expected = [(normal(1) - (normal(-1) + 0.5) / 2) / typical, (normal(1) - 0.5) / typical, 1.0]
    assert weights == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("trained", "held_out", "is_held"),
    [
        *((2.0, -2.0, True), (2.0, 0.0, True), (0.0, -2.0, True)),
        *((2.0, 2.0, False), (-2.0, -2.0, False), (-2.0, 2.0, False), (0.0, 2.0, False)),
    ],
)
def test_the_gate_holds_what_only_the_trained_reward_likes(trained, held_out, is_held):
    """The sign: GARDO's text, not its released code, which holds what the trained reward likes less than the others."""
    penalty, generator = penalty_with(GATE), torch.Generator().manual_seed(0)
    for _ in range(20):
        take(penalty, *torch.randn(2, 32, generator=generator, dtype=torch.float64).tolist())
    (weight,) = weigh(penalty, [trained], [held_out]) or [None]
    assert weight is not None
    assert weight > 1 if is_held else weight < 0.5


def test_a_disagreement_such_as_never_before_counts_six_times():
    penalty = penalty_with(GATE)
    take(penalty, [1.0, 3.0], [10.0, 30.0])
    take(penalty, [1.0, 1.0], [10.0, 9.9])
    assert weigh(penalty, [3.0, 1.0], [-30.0, 30.0]) == [6.0, 0.0]


def test_more_is_held_the_higher_the_reward_is_already():
    penalty, generator = penalty_with(BY_REWARD), torch.Generator().manual_seed(0)
    for _ in range(20):
        take(penalty, torch.randn(32, generator=generator, dtype=torch.float64).tolist())
    low, middle, high = weigh(penalty, [-2.0, 0.0, 2.0]) or []
    assert 0 < low < 0.1
    assert 0.8 < middle < 1.2
    assert 1.9 < high < 2


@every_way
@pytest.mark.parametrize("shared", [0.0, 0.9], ids=["unrelated", "nearly alike"])
def test_weights_are_1_on_average(settings, shared):
    """So that kl_coeff keeps its meaning, however alike the trained reward and the held-out one are."""
    penalty, generator, means = penalty_with(settings), torch.Generator().manual_seed(1), []
    for _ in range(200):
        scores = torch.randn(3, 16, generator=generator, dtype=torch.float64)
        scores[1] = shared * scores[0] + sqrt(1 - shared**2) * scores[1]
        weights = take(penalty, (7 + 3 * scores[0]).tolist(), scores[1].tolist())
        means += [] if weights is None else [sum(weights) / len(weights)]
    assert sum(means) / len(means) == pytest.approx(1, abs=0.05)


@every_way
def test_scores_that_are_all_alike_weigh_alike(settings):
    penalty = penalty_with(settings)
    assert [take(penalty, [2.0, 2.0], [1.0, 1.0]) for _ in range(4)] == [None] * 4


@every_way
def test_without_a_coefficient_nobody_is_asked(settings):
    penalty = penalty_with(settings, beta=0.0)
    assert penalty.weigh(torch.zeros(1, 3, 1, 1), [""], torch.zeros(1)) is None


def test_without_the_settings_all_images_are_alike():
    penalty = penalty_with({})
    assert [take(penalty, [1.0, 3.0]) for _ in range(3)] == [None] * 3
    assert penalty.state_dict() == {}


def test_a_gate_that_was_given_nothing_to_ask_says_so():
    with pytest.raises(InputError, match=r"has no reward to ask: assign model\.penalty\.weights\.held_out"):
        penalty_with(GATE).weigh(torch.zeros(1, 3, 1, 1), [""], torch.zeros(1))


# --------------------------------------------------------------------------------------------- exact, however cut up


@every_way
def test_the_order_and_number_of_micro_batches_leave_the_same_state_bit_for_bit(settings):
    whole, parts = penalty_with(settings), penalty_with(settings)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        scores = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        weights = take(whole, *scores.tolist())
        cut = [weigh(parts, *some.tolist()) for some in scores.flip(1).split(3, 1)]
        parts.weights.end_step(parts.weights.pop_scores())
        if weights is not None:
            in_parts = [weight for some in cut for weight in some or []]
            assert in_parts[::-1] == pytest.approx(weights, rel=1e-14, abs=1e-14)
    assert str(whole.state_dict()) == str(parts.state_dict())


@every_way
def test_the_state_comes_back_from_a_checkpoint_bit_for_bit(settings):
    one, two = penalty_with({**settings, "kl_target": 0.3}), penalty_with({**settings, "kl_target": 0.3})
    for scores in ([[1.0, 2.0], [0.1, 0.3]], [[2.0, 1.5], [0.2, 0.1]], [[3.0, 1.0], [0.1, 0.2]]):
        take(one, *scores)
        one.end_step(1.0)
    torch.save(one.state_dict(), "state.pt")
    two.load_state_dict(torch.load("state.pt", weights_only=True))
    assert two.beta == one.beta != 2.0
    more = [[2.5, 0.5], [0.15, 0.12]]
    weights = [[take(penalty, *more), weigh(penalty, *more)] for penalty in (one, two)]
    assert weights[0] == weights[1]
    assert None not in weights[0]


def greener(images, prompts):
    """A reward to hold out that disagrees with prefers_red, most in the upper half of a picture."""
    return (images[:, 1] - images[:, 0])[:, : images.shape[-2] // 2].mean((1, 2))


def weighed_model(folder, settings, **sections):
    """The tiny model, moved from its base, with the statistics of two steps; and its images."""
    sections["draftp"] = {**sections.get("draftp", {}), "kl_coeff": 0.7, **settings}
    held_out = {"held_out_rewards": {GREEN: {}}} if settings is GATE else {}
    model = tiny_model(folder, 0.1, **sections, **held_out)
    if settings is GATE:
        model.penalty.weights.held_out = {"greener": greener}
    if settings:
        for first in (10, 20):
            model.get_loss_and_metrics(batch(4, first=first))
            model.penalty.weights.end_step(model.penalty.weights.pop_scores())
        model.unet.zero_grad()
    return model, batch(4)


def gradient(model, images) -> tuple[torch.Tensor, float]:
    loss, _ = model.get_loss_and_metrics(images)
    return torch.cat([p.grad.flatten() for p in model.trainable_parameters if p.grad is not None]), loss


def one_image(images: Batch, i: int) -> Batch:
    return images.split(1)[i]


@gate_first
def test_the_gradient_is_that_of_a_coefficient_for_each_image(tiny_sdxl, settings):
    """An image by itself with the coefficient times its weight, and the mean of those gradients."""
    model, images = weighed_model(tiny_sdxl, settings)
    found, loss = gradient(model, images)
    pictures = model.generate(images, model.initial_noise(images))[0].detach() / 255
    weights = model.penalty.weigh(pictures, images.prompts, prefers_red(pictures, images.prompts))
    assert weights is not None
    assert weights.max() > 1.2 * weights.mean() + 0.05
    single = {"trainer": {"micro_batch_size": 1, "global_batch_size": 1}}
    parts, losses = [], []
    for i, weight in enumerate(weights.tolist()):
        alone = tiny_model(tiny_sdxl, 0.1, draftp={"kl_coeff": 0.7 * weight, "log_kl": True}, **single)
        part, part_loss = gradient(alone, one_image(images, i))
        parts.append(part)
        losses.append(part_loss)
    torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-9)
    plain, _ = gradient(*weighed_model(tiny_sdxl, {}))
    assert (plain - found).norm() > 0.01 * plain.norm(), "the weights matter"


WAYS = {
    "one micro-batch, decoded one by one": {"trainer": {"micro_batch_size": 4}, "sharding": {"decode_batch_size": 1}},
    "micro-batches of 1, recomputed": {"trainer": {"micro_batch_size": 1}, "sharding": {"recompute_steps": True}},
    "one backward": {"sharding": {"two_stage": False}},
}


@gate_first
def test_the_gradient_does_not_depend_on_how_it_is_computed(tiny_sdxl, settings):
    model, images = weighed_model(tiny_sdxl, settings)
    expected, loss = gradient(model, images)
    scores = model.penalty.weights.pop_scores()
    for name, sections in WAYS.items():
        model, images = weighed_model(tiny_sdxl, settings, **sections)
        found, found_loss = gradient(model, images)
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert found_loss == pytest.approx(loss, rel=1e-9), name
        again = model.penalty.weights.pop_scores()
        assert again.keys() == scores.keys()
        for key in scores:
            torch.testing.assert_close(again[key], scores[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "mode", ["low_variance", "matching", pytest.param("drtune", marks=LONG), pytest.param("sparse", marks=LONG)]
)
def test_every_gradient_mode_weighs_each_of_its_pieces(tiny_sdxl, mode):
    model, images = weighed_model(tiny_sdxl, BY_REWARD, draftp={"gradient": mode})
    found, _ = gradient(model, images)
    assert found.isfinite().all()
    (scores,) = model.penalty.weights.pop_scores().values()
    assert len(scores) == 4 * model.mode.pieces_per_image


def test_validation_asks_no_weights(tiny_sdxl):
    model, images = weighed_model(tiny_sdxl, BY_REWARD)
    weighed, _ = model.get_loss_and_metrics(images, forward_only=True)
    plain, images = weighed_model(tiny_sdxl, {})
    assert weighed == plain.get_loss_and_metrics(images, forward_only=True)[0]
    assert model.penalty.weights.pop_scores() == {}


# ----------------------------------------------------------------------------------------------------- in a training


def lines(run: str) -> list[dict]:
    drop = {"seconds", "images_per_second", "memory_gib"}
    text = (Path(run) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in text.splitlines()]


def of_gate(folder, **trainer):
    trainer = {"global_batch_size": 4, "max_steps": 4, "save_interval": 2, "val_check_interval": 0, **trainer}
    return recipe(folder, draftp={**GATE, "kl_coeff": 1.0}, held_out_rewards=[GREEN], trainer=trainer)


def test_a_resumed_run_is_the_same_bit_for_bit(tiny_sdxl):
    preset = of_gate(tiny_sdxl)
    said_so = draftp("train", "--preset", preset, "--output", "whole")
    assert said_so.code == 0
    assert "no effect" not in said_so.err, "the held-out reward is asked, though nothing is validated"
    for steps in (2, 4):
        settings = ("--set", f"trainer.max_steps={steps}")
        assert draftp("train", "--preset", preset, "--output", "parts", *settings).code == 0
    assert lines("whole") == lines("parts")
    weights = [line["kl_weight"] for line in lines("whole")]
    assert weights[:2] == [1.0, 1.0]
    assert weights[3] != 1.0, "after it was resumed"
    assert all(-1 < line[f"held_out/{GREEN}"] < 1 for line in lines("whole"))
    card = (Path("whole") / "final" / "README.md").read_text()
    assert "KL coefficient 1, counting by disagreement with the held-out rewards" in card


def test_two_processes_equal_one(tiny_sdxl):
    preset = of_gate(tiny_sdxl, max_steps=3)
    assert draftp("train", "--preset", preset, "--output", "one").code == 0
    ranks = train_in_ranks(2, preset, "two")
    assert [code for code, _ in ranks] == [0, 0], ranks
    for one, two in zip(lines("one"), lines("two"), strict=True):
        for name in ("loss", "reward", "kl_weight", f"held_out/{GREEN}"):
            assert one[name] == pytest.approx(two[name], abs=1e-4 if one["step"] > 1 else 1e-6), one["step"]


def test_the_plan_has_the_held_out_rewards_in_memory(tiny_sdxl):
    sections = {"rewards": {"brightness": 1.0}, "held_out_rewards": {"toy": {}}}
    without, gated = (
        memory_plan(tiny_config(tiny_sdxl, draftp=draftp_settings, **sections), tiny_sdxl).resident
        for draftp_settings in ({}, GATE)
    )
    assert "held-out rewards" not in without
    assert gated["held-out rewards"] > 1e5

"""rewards.NAME.robust: the gradient of the worst picture nearby (RSA-FT), by hand, in every mode and executor."""

import pytest
import torch

from draftcli.config import check_config, without_effect
from draftcli.errors import InputError
from draftcli.planning.ledger import count_flop, make_ledger
from draftcli.rewards import WeightedSum, get_reward_model
from draftcli.rewards.wrappers import AtWorst, InMicroBatches, as_reward, innermost
from tests.example_rewards import Choosy, Jury
from tests.tiny import batch, prefers_red, tiny_model

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROMPTS = ["a red cat", "a blue dog", "a green bird"]
CENTRE, STEEP, RHO = 0.25, 3.0, 0.2


def bowl(images, prompts):
    """-STEEP / 2 |x - CENTRE|^2."""
    return -STEEP / 2 * (images - CENTRE).square().sum((1, 2, 3))


def slope(images, prompts):
    """A linear reward: as steep everywhere."""
    return (images * torch.linspace(-1, 1, 8, dtype=images.dtype)).sum((1, 2, 3))


def gradient(reward, images=IMAGES):
    seen = images.clone().requires_grad_()
    scores = reward(seen, PROMPTS)
    scores.sum().backward()
    return scores.detach(), seen.grad


@pytest.mark.parametrize(("weight", "sign"), [(1.0, 1), (0.3, 1), (-2.0, -1)])
def test_a_bowl_by_hand(weight, sign):
    """h = -STEEP d with d = x - CENTRE, so the worst picture for who climbs is x + RHO d / |d|, and there the gradient
    is -STEEP (1 + RHO / |d|) d. Who wants it low goes down, and the worst picture is on the other side.
    """
    scores, found = gradient(AtWorst(as_reward(bowl, "bowl"), RHO, weight))
    d = IMAGES - CENTRE
    distance = d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, -STEEP * (1 + sign * RHO / distance) * d, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores, bowl(IMAGES, PROMPTS), rtol=0, atol=0)


def test_where_a_reward_is_as_steep_everywhere_nothing_changes():
    torch.testing.assert_close(gradient(AtWorst(as_reward(slope, "slope"), 5.0)), gradient(slope), rtol=1e-12, atol=0)


def test_on_the_top_there_is_no_worse_direction():
    top = torch.full_like(IMAGES, CENTRE)
    assert gradient(AtWorst(as_reward(bowl, "bowl"), RHO), top)[1].abs().max() == 0


def test_it_is_of_each_picture_by_itself():
    reward = AtWorst(as_reward(bowl, "bowl"), RHO)
    _, whole = gradient(reward)
    parts = gradient(AtWorst(InMicroBatches(as_reward(bowl, "bowl"), 1), RHO))[1]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_without_gradient_the_reward_is_asked_once():
    calls = []

    def counted(images, prompts):
        calls.append(len(prompts))
        return bowl(images, prompts)

    reward = AtWorst(as_reward(counted, "bowl"), RHO)
    with torch.no_grad():
        scores = reward(IMAGES, PROMPTS)
    assert calls == [3]
    torch.testing.assert_close(scores, bowl(IMAGES, PROMPTS), rtol=0, atol=0)
    gradient(reward)
    assert calls == [3, 3, 3]


def test_a_reward_that_is_silent_on_one_picture_teaches_by_the_others():
    total = WeightedSum({"choosy": AtWorst(as_reward(Choosy(), "choosy"), RHO)})
    scores, found = gradient(total)
    assert scores[1] == 0, "nothing to say about blue"
    assert found[1].abs().max() == 0
    assert found.isfinite().all()
    assert found[0].abs().max() > 0


def test_a_reward_without_gradient_is_refused_as_ever():
    detached = AtWorst(as_reward(lambda images, prompts: bowl(images, prompts).detach(), "bowl"), RHO)
    with pytest.raises(InputError, match="reward bowl cannot be trained on: its score has no gradient"):
        gradient(WeightedSum({"bowl": detached}))


def test_settings():
    cfg = check_config({"rewards": {"brightness": {"robust": 0.5, "weight": -1}, "saturation": 0.5}})
    rewards = get_reward_model(cfg).rewards
    robust = rewards["brightness"]
    assert isinstance(robust, AtWorst)
    assert not isinstance(rewards["saturation"], AtWorst)
    assert type(innermost(robust)) is type(innermost(get_reward_model("brightness")))
    assert WeightedSum(rewards).rewards["brightness"] is robust
    idle = check_config({"rewards": {"brightness": {"robust": 0.5, "weight": 0}, "saturation": 1}})
    assert any("rewards.brightness.robust has no effect with weight 0" in line for line in without_effect(idle))
    for rho in (0, -1, float("inf")):
        with pytest.raises(InputError, match=r"rewards\.brightness\.robust"):
            check_config({"rewards": {"brightness": {"robust": rho}}})
    with pytest.raises(InputError, match="not differentiable"):
        get_reward_model(check_config({"rewards": {f"{Jury.__module__}:jury": {"robust": 0.5}}}))


# ------------------------------------------------------------------------------------------- in a training step


def as_if_at_worst(images, prompts):
    """prefers_red with its gradient at the worst picture, worked out: R has the same everywhere, B one that grows."""
    count = images.shape[-1] * images.shape[-2]
    factor = 1 + torch.tensor([float(len(p)) for p in prompts], dtype=images.dtype).view(-1, 1, 1) / 10
    red = torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype).expand_as(images[:, 0]) / count
    blue = images[:, 2].detach()
    h = torch.stack([red, torch.zeros_like(red), -factor * blue / count], 1)
    worst_blue = blue - RHO * h[:, 2] / h.flatten(1).norm(dim=1).view(-1, 1, 1)
    there = torch.stack([red, torch.zeros_like(red), -factor * worst_blue / count], 1)
    value = (there * images).sum((1, 2, 3))
    return value - value.detach() + prefers_red(images.detach(), prompts)


WAYS = {
    "last_k": {},
    "one backward": {"sharding": {"two_stage": False}},
    "recomputed": {"sharding": {"recompute_steps": True}},
    "random_k": {"draftp": {"gradient": "random_k"}},
    "low_variance": {"draftp": {"gradient": "low_variance"}},
    "refl": {"draftp": {"gradient": "refl"}},
    "drtune": {"draftp": {"gradient": "drtune"}},
    "sparse": {"draftp": {"gradient": "sparse"}},
    "matching": {"draftp": {"gradient": "matching"}},
}


QUICK = {"last_k", "one backward", "recomputed", "matching"}


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(sections, id=name, marks=[] if name in QUICK else pytest.mark.slow(reason="more of the same"))
        for name, sections in WAYS.items()
    ],
)
def test_in_every_mode_and_executor(tiny_sdxl, sections):
    gradients = []
    for reward in (AtWorst(as_reward(prefers_red, "red"), RHO), as_if_at_worst, prefers_red):
        model = tiny_model(tiny_sdxl, 0.1, **sections)
        model.reward_model = reward
        model.get_loss_and_metrics(batch(4))
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters if p.grad is not None]))
    found, expected, plain = gradients
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert (found - plain).norm() > 1e-5 * plain.norm()


def test_the_ledger_counts_the_second_pass(tiny_sdxl):
    found, foreseen = [], []
    for robust in (None, 0.5):
        model = tiny_model(tiny_sdxl, 0.1, rewards={"toy": {"robust": robust}}, model={"precision": "fp32"})
        model.reward_model, images = get_reward_model(model.cfg), batch(4)
        model.encode(images)
        counted = count_flop(lambda model=model, images=images: model.get_loss_and_metrics(images))
        found.append(counted.get_total_flops())
        foreseen.append(4 * make_ledger(model.cfg, tiny_sdxl).total)
    assert foreseen[1] - foreseen[0] == pytest.approx(found[1] - found[0], rel=1e-9)
    assert foreseen[1] > 1.01 * foreseen[0]

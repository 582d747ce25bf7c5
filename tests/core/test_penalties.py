"""What every penalty promises. One that is added to PENALTIES is in all of these tests by its name."""

import json

import pytest
import torch

from draftcli.config import DraftpConfig
from draftcli.core.guidance import NoiseEstimate
from draftcli.core.penalty import PENALTIES, Penalty, make_penalty
from draftcli.core.schedule import make_schedule
from draftcli.errors import InputError
from tests.core.golden import golden_model
from tests.tiny import gradient_steps

every_kind = pytest.mark.parametrize("kind", PENALTIES)
LEVELS = [make_schedule(5).level(i) for i in (2, 3, 4)]


def penalty_of(kind: str, beta: float = 0.7) -> Penalty:
    return make_penalty(DraftpConfig.model_validate({"kl_kind": kind, "kl_coeff": beta, "log_kl": False}))


def estimates(steps: int = 3, images: int = 4) -> tuple[NoiseEstimate, NoiseEstimate]:
    """Those of tuned and base (K, B, C, H, W), in float64."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, steps, images, 4, 8, 8, generator=generator, dtype=torch.float64)
    tuned = NoiseEstimate(numbers[0].requires_grad_(), numbers[1].requires_grad_())
    return tuned, NoiseEstimate(numbers[2], numbers[3])


def some(estimate: NoiseEstimate, at: tuple) -> NoiseEstimate:
    return NoiseEstimate(estimate.guided[at], estimate.conditional[at])


@every_kind
def test_it_pulls_towards_the_base_and_ends_there(kind):
    penalty, (tuned, base) = penalty_of(kind), estimates()
    kl = penalty(tuned, base, LEVELS)
    assert kl.shape == ()
    assert kl > 0
    slopes = torch.autograd.grad(kl, tuned, allow_unused=True)
    pull = [(slope * (a - b)).sum() for slope, a, b in zip(slopes, tuned, base, strict=True) if slope is not None]
    assert pull
    assert all(part > 0 for part in pull)
    assert penalty(base, base, LEVELS) == 0


@every_kind
def test_it_is_a_mean_over_steps_and_images(kind):
    """So that steps that run again one by one, and micro-batches, add up to the same loss."""
    penalty, (tuned, base) = penalty_of(kind), estimates()
    whole = penalty(tuned, base, LEVELS)
    steps, images = [(slice(k, k + 1),) for k in range(3)], [(slice(None), slice(i, i + 1)) for i in range(4)]
    by_step = [penalty(some(tuned, at), some(base, at), [LEVELS[k]]) for k, at in enumerate(steps)]
    by_image = [penalty(some(tuned, at), some(base, at), LEVELS) for at in images]
    for parts in (by_step, by_image):
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


@every_kind
def test_weights_are_of_each_image(kind):
    penalty, (tuned, base) = penalty_of(kind), estimates()
    weights = torch.tensor([0.0, 0.5, 1.0, 2.5], dtype=torch.float64)
    alone = [(slice(None), slice(i, i + 1)) for i in range(4)]
    by_image = torch.stack([penalty(some(tuned, at), some(base, at), LEVELS) for at in alone])
    torch.testing.assert_close(penalty(tuned, base, LEVELS, weights), (weights * by_image).mean(), rtol=1e-12, atol=0)


@every_kind
def test_its_state_comes_back_from_a_checkpoint(kind):
    one, two = penalty_of(kind), penalty_of(kind)
    for kl in (0.1, 0.4, 0.2):
        one.end_step(kl)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for penalty in (one, two):
        penalty.end_step(0.3)
    assert one.beta == two.beta >= 0


def test_a_penalty_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"draftp.kl_kind 'none': there is no such penalty; available are eps"):
        penalty_of("none")


@every_kind
def test_the_base_is_asked_where_the_loss_needs_it(kind):
    assert penalty_of(kind, 0.7).is_measured


# --------------------------------------------------------------------------------------- a coefficient that is steered


def steered(beta: float = 8.0, target: float = 0.3) -> Penalty:
    return make_penalty(DraftpConfig(kl_coeff=beta, kl_target=target))


@pytest.mark.parametrize(
    ("penalties", "beta"),
    [
        ([], 8.0),
        ([0.3], 8.0),
        ([0.33], 8 * 1.025),  # a tenth above the target: a quarter of that
        ([0.27], 8 * 0.975),
        ([0.36], 8 * 1.05),
        ([0.36, 1e9], 8 * 1.05**2),  # how far beyond a fifth does not matter
        ([0.0, 0.4], 8 * 0.95 * 1.05),
        ([0.0] * 100, 0.08),  # it begins at 0, and the coefficient stays within reach
        ([0.0] * 100 + [1.0], 0.084),
        ([1.0] * 100, 800.0),
    ],
)
def test_a_coefficient_follows_its_penalty(penalties, beta):
    penalty = steered()
    for kl in penalties:
        penalty.end_step(kl)
    assert penalty.beta == pytest.approx(beta, rel=1e-12)
    assert penalty.figures() == {"kl_coeff": penalty.beta}


def test_a_steered_coefficient_comes_back_from_a_checkpoint_bit_for_bit():
    one, two = steered(), steered()
    for kl in (0.0, 0.5, 0.0, 0.0):
        one.end_step(kl)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.beta == one.beta != steered().beta


def test_a_fixed_coefficient_stays_and_is_not_logged():
    penalty = penalty_of("eps")
    penalty.end_step(9.0)
    assert penalty.beta == 0.7
    assert penalty.figures() == {}


# ------------------------------------------------------------------------------------------------- values by hand


def measured(scale: float) -> tuple[dict[str, float], dict[str, float]]:
    """The last two steps of the analytic network with guidance `scale`, from latents that do not depend on it: what
    each kind measures, and what it should be, from the network's raw outputs.
    """
    model, cond, data = golden_model("analytic", torch.float64, 2, scale=scale)
    x, first = 0.2 * model.networks.at_first_level(data["inputs/x_T"]), model.cfg.sampling.steps - 2
    levels = model.sampler.levels(first)

    def raw(half, x, level):
        seen, text = x / (1 + level.sigma**2) ** 0.5, {"text_embeds": half.text_embeds}
        return model.unet(seen, torch.tensor(level.timestep), half.prompt_embeds, text, False)[0]

    with torch.no_grad():
        walked = gradient_steps(model, cond, x, first)
        assert walked.eps is not None
        assert walked.eps_base is not None
        found = {kind: float(make(walked.eps, walked.eps_base, levels)) for kind, make in PENALTIES.items()}
        sums = dict.fromkeys(PENALTIES, 0.0)
        for level in levels:
            u, c = raw(cond.unconditional, x, level), raw(cond.conditional, x, level)
            with model.base_weights():
                u_base, c_base = raw(cond.unconditional, x, level), raw(cond.conditional, x, level)
            eps, eps_base = u + scale * (c - u), u_base + scale * (c_base - u_base)
            picture, picture_base = x - level.sigma * eps, x - level.sigma * eps_base
            sums["eps"] += float(((eps - eps_base) ** 2).mean()) / 2
            sums["conditional"] += float(((c - c_base) ** 2).mean()) / 2
            sums["x0"] += float(((picture - picture_base) ** 2).mean()) / 2
            x = x + (level.sigma_next - level.sigma) * eps
    return found, sums


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_each_kind_is_what_it_says(scale):
    found, expected = measured(scale)
    assert found == pytest.approx(expected, rel=1e-9, abs=0)
    assert found["eps"] > 1e-6
    # Without guidance there is one estimate, and both kinds are the same.
    assert (found["eps"] == found["conditional"]) == (scale == 1)


def test_the_conditional_kind_does_not_move_with_guidance():
    """At the first of the two steps, whose latents are the same; guidance moves those of the second a little."""
    strong, weak = measured(7.5)[0], measured(3.0)[0]
    assert strong["conditional"] == pytest.approx(weak["conditional"], rel=0.05)
    assert strong["eps"] > 2 * weak["eps"]

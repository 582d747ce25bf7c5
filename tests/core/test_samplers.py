"""The solvers: each is diffusers' own scheduler on the same grid, and AIG is the same mixture with each.

Tolerances: diffusers keeps its tables in float32, which moves latents of size 10 by some 1e-5.
"""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)

from draftcli.core.annealing import evaluations, mixed, step_weights
from draftcli.core.denoise import LANDINGS, SOLVERS, Sampler
from draftcli.core.guidance import network_input
from draftcli.core.schedule import Level, make_schedule
from draftcli.core.weighings import weighing
from draftcli.errors import InputError
from draftcli.sampling.draw import Column
from tests.core.test_equivalences import count_calls
from tests.tiny import SDXL_SCHEDULER, batch, tiny_model

BETAS = {k: SDXL_SCHEDULER[k] for k in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}
THEIRS = {
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "ddim": lambda: DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**BETAS),
    "euler_ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "lcm": lambda: LCMScheduler(**BETAS, original_inference_steps=1000),  # takes timesteps of its own grid, here all
}
every_sampler = pytest.mark.parametrize("sampler", SOLVERS)


def eps(z, timestep):
    """A network in closed form of the variance-preserving sample, bent enough that orders of solvers show."""
    return torch.tanh(1.5 * z + math.sin(timestep / 150)) + 0.3 * z.roll(1, -1)


def other(z, timestep):
    return torch.sin(z) + 0.2 * math.cos(timestep / 90)


def predicts(network):
    return lambda x, level: network(network_input(x, level), level.timestep)


def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def walk(sampler, network, steps):
    schedule, generator = make_schedule(steps), torch.Generator().manual_seed(7)

    def fresh(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Sampler.named(sampler, schedule).walk(network, noise() * schedule.init_scale, fresh)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@every_sampler
def test_each_solver_is_diffusers_own_scheduler(sampler, steps):
    scheduler, schedule = THEIRS[sampler](), make_schedule(steps)
    if sampler in ("ddim", "euler_ancestral"):  # take no grid; theirs is ours where the number of steps divides 1000
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == schedule.timesteps.tolist()
    else:
        scheduler.set_timesteps(timesteps=schedule.timesteps.tolist())
    preserving = sampler in ("ddim", "dpmpp_2m", "lcm")  # theirs walk z = x / sqrt(1 + sigma^2)
    z = noise() if preserving else noise() * schedule.init_scale
    noisy = {"generator": torch.Generator().manual_seed(7)} if sampler in LANDINGS else {}
    for timestep in scheduler.timesteps:
        said = eps(scheduler.scale_model_input(z, timestep), int(timestep))
        z = scheduler.step(said, timestep, z, **noisy).prev_sample
    ours = walk(sampler, predicts(eps), steps)
    torch.testing.assert_close(ours, z.double(), atol=2e-5 * ours.abs().max().item(), rtol=0)


def test_ddim_is_eulers_step_and_the_others_are_not():
    euler, ddim, heun, multistep = (walk(s, predicts(eps), 6) for s in ("euler", "ddim", "heun", "dpmpp_2m"))
    torch.testing.assert_close(ddim, euler, atol=1e-12, rtol=0)
    assert min((a - b).abs().max() for a, b in [(heun, euler), (multistep, euler), (heun, multistep)]) > 1e-2


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_of_second_order_solve_the_mixture_to_second_order(sampler, order):
    """AIG of constant weight is one equation, whatever the solver; halving the steps halves or quarters the error."""

    def end(sampler, steps):
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64).tolist()
        predict = mixed(lambda x, level: x / level.sigma, lambda x, level: x.sin() / level.sigma, [0.3] * steps)
        x, earlier = torch.tensor(10.0, dtype=torch.float64), []
        for i in range(steps):
            x = SOLVERS[sampler](predict, x, Level(i, steps, sigmas[i], sigmas[i + 1], sigmas[i], 0, 0), earlier)
        return x.item()

    exact = end("heun", 2000)
    assert (end(sampler, 20) - exact) / (end(sampler, 40) - exact) == pytest.approx(2**order, rel=0.35)


@every_sampler
def test_a_step_mixes_with_one_weight(sampler):
    """Linear in the estimates at each call, with the weight of the step that the call belongs to."""
    weights, asked = step_weights(weighing("linear"), make_schedule(5)), []

    def spy(network):
        def predict(x, level):
            asked.append(level.index)
            return network(network_input(x, level), level.timestep)

        return predict

    annealed = walk(sampler, mixed(spy(eps), spy(other), weights), 5)

    def by_hand(x, level):
        z = network_input(x, level)
        w = level.index / level.total
        return (1 - w) * other(z, level.timestep) + w * eps(z, level.timestep)

    torch.testing.assert_close(annealed, walk(sampler, by_hand, 5), atol=1e-12, rtol=0)
    per_step = [asked.count(i) for i in range(5)]
    assert per_step == ([2, 4, 4, 4, 2] if sampler == "heun" else [1, 2, 2, 2, 2])


@pytest.mark.parametrize("scheme", [{}, {"peft": {"peft_scheme": "none"}}], ids=["lora", "full"])
@every_sampler
def test_weight_0_and_1_are_base_and_tuned_with_every_sampler(tiny_sdxl, sampler, scheme):
    """Bit for bit, and the base is the model before it was moved."""
    model = tiny_model(tiny_sdxl, 0.02 if scheme else 0.1, **scheme, sampling={"sampler": sampler})
    untouched = tiny_model(tiny_sdxl, sampling={"sampler": sampler})
    x = model.initial_noise(batch(2))

    def picture(kind, of=model):
        return of.annealed_guidance(batch(2), x, weighing(kind))

    for zero, one in (("constant_0", "constant_1"), ("reverse_tuned", "reverse_base"), ("step_1", "step_0")):
        assert torch.equal(picture(zero), picture("base"))
        assert torch.equal(picture(one), picture("tuned"))
    torch.testing.assert_close(picture("base"), picture("base", untouched), atol=1e-9, rtol=0)
    assert (picture("linear") - picture("base")).abs().mean() > 0.05
    assert (picture("linear") - picture("tuned")).abs().mean() > 0.05


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", ["base", "tuned", "linear", "step_0.5", "interval_0.25_0.75", "reverse_power_2"])
@every_sampler
def test_evaluations_are_counted_as_they_are_made(tiny_sdxl, sampler, kind, stochastic):
    """The networks see the picture twice a call, for guidance."""
    model = tiny_model(tiny_sdxl, 0.1, sampling={"sampler": sampler})
    calls = count_calls(model.unet)
    model.annealed_guidance(batch(1), model.initial_noise(batch(1)), weighing(kind), stochastic)
    weights = step_weights(weighing(kind), model.schedule)
    assert evaluations(weights, model.schedule, SOLVERS[sampler], stochastic) == 2 * len(calls)


@pytest.mark.parametrize("sampling", [{"scale": 1.0}, {"guidance_interval": (0.25, 0.75)}], ids=["none", "in part"])
@pytest.mark.parametrize("kind", ["tuned", "linear"])
@every_sampler
def test_evaluations_where_guidance_is_in_part_or_none(tiny_sdxl, sampler, kind, sampling):
    """Rows of latents that the networks see are what is counted, and what sample and eval say."""
    model, rows = tiny_model(tiny_sdxl, 0.1, sampling={"sampler": sampler, "steps": 4, **sampling}), []
    model.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.annealed_guidance(batch(1), model.initial_noise(batch(1)), weighing(kind))
    assert Column.of(kind).evaluations(model) == sum(rows)


def test_churn_works_with_every_sampler(tiny_sdxl):
    """And so does a sampler's own noise, with which it does not go: both belong to the picture, not to the batch."""
    for sampler in SOLVERS:
        churn = 0.0 if sampler in LANDINGS else 1.2
        model = tiny_model(tiny_sdxl, 0.05, sampling={"s_churn": churn, "sampler": sampler})
        both = model.annealed_guidance(batch(2), model.initial_noise(batch(2)))
        alone = model.annealed_guidance(batch(1, first=0), model.initial_noise(batch(1)))
        torch.testing.assert_close(both[:1], alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_a_sampler_that_cannot_train_says_so(tiny_sdxl, sampler):
    model = tiny_model(tiny_sdxl, sampling={"sampler": sampler})
    with pytest.raises(InputError, match="train with euler, ddim, euler_ancestral or lcm, and generate"):
        model.get_loss_and_metrics(batch(2))


def test_ddim_trains_as_euler(tiny_sdxl):
    losses = [
        tiny_model(tiny_sdxl, 0.1, sampling={"sampler": s}).get_loss_and_metrics(batch(2))[0] for s in ("euler", "ddim")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


# ------------------------------------------------------------------------------------------------------- stochastic


def test_stochastic_draws_belong_to_the_picture(tiny_sdxl):
    """Not to the batch or its order; each picture has draws of its own."""
    model = tiny_model(tiny_sdxl, 0.1, sampling={"steps": 6})
    together = model.annealed_guidance(
        batch(4), model.initial_noise(batch(4)), weighing("constant_0.5"), stochastic=True
    )
    for part, expected in zip(batch(4).split(1), together.split(1), strict=True):
        alone = model.annealed_guidance(part, model.initial_noise(part), weighing("constant_0.5"), stochastic=True)
        torch.testing.assert_close(alone, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["base", "tuned", "step_0.5"])
def test_stochastic_with_weights_0_and_1_is_the_exact_form(tiny_sdxl, kind):
    model = tiny_model(tiny_sdxl, 0.1)
    x = model.initial_noise(batch(3))
    exact, chance = (model.annealed_guidance(batch(3), x, weighing(kind), stochastic=s) for s in (False, True))
    assert torch.equal(exact, chance)


def test_stochastic_asks_tuned_as_often_as_the_weight_says(tiny_sdxl):
    model = tiny_model(
        tiny_sdxl, 0.02, sampling={"steps": 40}, peft={"peft_scheme": "none"}, draftp={"truncation_steps": 1}
    )
    tuned, base = count_calls(model.unet), count_calls(model.base_unet)
    for seed in range(4):
        one = batch(1, first=seed)
        model.annealed_guidance(one, model.initial_noise(one), weighing("constant_0.25"), stochastic=True)
    assert len(tuned) + len(base) == 160
    assert 20 <= len(tuned) <= 60  # 40 expected, 5.5 is one deviation

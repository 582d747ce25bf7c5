"""A prefix of its own (draftp.prefix_steps): where it arrives, what it leaves alone, and what it refuses.

float64 on the tiny model; how near it comes to the exact latents is measured on the toy model.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from draftcli import load_config
from draftcli.config import without_effect
from draftcli.core.backward import Work
from draftcli.core.denoise import SOLVERS, Prefix
from draftcli.core.draftp import SDXLDRaFTPModel, training_step
from draftcli.core.gradient.mode import make_mode
from draftcli.core.phase import Phase
from draftcli.core.prefix import prefix_levels, training_sampler
from draftcli.core.schedule import make_schedule
from draftcli.errors import InputError
from draftcli.planning.memory import memory_plan
from draftcli.planning.plan import configuration_folder, count_evaluations
from draftcli.prompts import Prompt
from draftcli.sampling.draw import Column, Picture
from draftcli.sampling.identity import Provenance
from tests.tiny import batch, prefers_red, rows_asked, tiny_config, tiny_model

# Every mode that can leave the first steps alone, with options that make it do so in N = 4.
LATE = {
    "last_k": "last_k",
    "low_variance": "low_variance",
    "random_k": {"mode": "random_k", "low": 2, "high": 2},
    "refl": {"mode": "refl", "window": 1},
    "drtune": {"mode": "drtune", "at": [2], "stop": 1},
    "sparse": {"mode": "sparse", "at": [2, 3]},
}
late = pytest.mark.parametrize("gradient", LATE.values(), ids=LATE)


def gradient_of(model, sampler):
    model.unet.zero_grad()
    work = Work(micro=2, prefix=4, decode=2, recompute=False, scale=lambda loss: loss)
    training_step(model.networks, prefers_red, model.mode, model.penalty, sampler, batch(4), work)
    return torch.cat([p.grad.flatten() for p in model.trainable_parameters])


@pytest.mark.parametrize("count", [1, 3, 10, 24, 60])
@pytest.mark.parametrize("schedule", [{}, {"spacing": "leading"}, {"zero_terminal_snr": True}], ids=str)
def test_levels_are_uniform_in_log_sigma_and_known_to_the_network(schedule, count):
    run = make_schedule(25, **schedule)
    levels = prefix_levels(run, 24, count)
    assert len(levels) == count
    assert levels[0].sigma == run.sigmas[0]
    assert (levels[-1].sigma_next, levels[-1].timestep_next) == (run.sigmas[24], run.timesteps[24])
    assert all(a.sigma_next == b.sigma and a.timestep_next == b.timestep for a, b in pairwise(levels))
    assert all(level.sigma == level.table_sigma == run.table[level.timestep] for level in levels)
    assert all(level.sigma > level.sigma_next for level in levels)
    assert all(run.sigmas[at.index] >= at.sigma > run.sigmas[at.index + 1] for at in levels), "the run's step"
    distances = [math.log(level.sigma / level.sigma_next) for level in levels]
    if count <= 10 and not schedule.get("zero_terminal_snr"):
        assert max(distances) < 1.1 * min(distances)


@late
def test_on_the_runs_own_grid_it_is_the_run(tiny_sdxl, gradient):
    """To the bit, in every mode: what a prefix replaces is the walk before the first step with gradient, no more."""
    model = tiny_model(tiny_sdxl, 0.1, draftp={"gradient": gradient})
    first = model.mode.first
    assert first > 0
    own = Prefix(model.sampler.levels(stop=first), SOLVERS["euler"], first)
    expected = gradient_of(model, model.sampler)
    assert gradient_of(model, replace(model.sampler, prefix=own)).equal(expected)
    other = training_sampler(tiny_config(tiny_sdxl, draftp={"prefix_steps": 5}), first, model.sampler)
    assert not gradient_of(model, other).equal(expected)


@pytest.mark.parametrize("sharding", [{}, {"two_stage": False}, {"recompute_steps": True}], ids=str)
def test_one_euler_step_before_the_last_k_is_the_runs_own(tiny_sdxl, sharding):
    """By the settings: with N = K + 1 both grids have the one step from the first level to the second."""
    found = []
    for draftp in ({}, {"prefix_steps": 1, "prefix_sampler": "euler"}, {"prefix_steps": 3}):
        model = tiny_model(tiny_sdxl, 0.1, draftp={"truncation_steps": 3, **draftp}, sharding=sharding)
        found.append(model.get_loss_and_metrics(batch(2))[0])
    assert found[0] == found[1] != found[2]


@late
@pytest.mark.parametrize("sampling", [{}, {"guidance_interval": [0.25, 0.75]}, {"scale": 1.0}], ids=str)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_evaluations_are_those_that_are_made(tiny_sdxl, gradient, sampling, solver):
    """The plan's count is what the network is asked for, guided where the run guides at that noise level."""
    draftp = {"gradient": gradient, "prefix_steps": 3, "prefix_sampler": solver}
    model = tiny_model(tiny_sdxl, 0.1, draftp=draftp, sampling=sampling, sharding={"fold_lora": False})
    rows, planned = rows_asked(model, batch(4)), count_evaluations(model.cfg)
    assert rows[True] == 4 * planned["with_gradient"]
    assert rows[False] == 4 * (planned["forward"] - planned["with_gradient"] + planned["base"])


def test_pictures_are_drawn_on_the_runs_own_grid(tiny_sdxl):
    """generate, AIG and validation; and what pictures are kept by (identity.py) knows nothing of it."""
    drawn, keys = [], []
    for draftp in ({}, {"prefix_steps": 2}):
        model = tiny_model(tiny_sdxl, 0.1, draftp=draftp)
        noise = model.initial_noise(batch(2))
        metrics = model.get_loss_and_metrics(batch(2), forward_only=True)[1]
        drawn.append([model.generate(batch(2), noise)[0].detach(), model.annealed_images(batch(2), noise)])
        drawn[-1].append(metrics["images_and_captions"][0])
        keys.append(Provenance(model).key(Picture(Prompt("night"), 1, (64, 64)), Column.of("tuned").on(model)))
    assert all(a.equal(b) for a, b in zip(*drawn, strict=True))
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("draftp", "sampling", "said"),
    [
        ({"gradient": "matching"}, {}, "draftp.gradient matching may train the first sampler step"),
        ({"gradient": "drtune"}, {}, "draftp.gradient drtune may train the first sampler step"),
        ({"gradient": "sparse"}, {}, "draftp.gradient sparse may train the first sampler step"),
        ({"gradient": "random_k"}, {}, "draftp.gradient random_k may train the first sampler step"),
        ({"truncation_steps": 4}, {}, "draftp.gradient last_k may train the first sampler step"),
        ({"prefix_steps": 500}, {"steps": 4}, "the network knows 500 noise levels before sampler step 2"),
        ({"prefix_steps": 501}, {"steps": 4}, "give 500 or less"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_refused(tiny_sdxl, draftp, sampling, said):
    cfg = tiny_config(tiny_sdxl, draftp={"prefix_steps": 2, **draftp}, sampling=sampling)
    if draftp.get("prefix_steps") == 500:
        assert make_mode(cfg).first == 2
        return
    with pytest.raises(InputError, match=said):
        make_mode(cfg)


def test_churn_is_refused(tiny_sdxl):
    with pytest.raises(InputError, match=r"draftp.prefix_steps cannot be combined with sampling.s_churn"):
        tiny_config(tiny_sdxl, draftp={"prefix_steps": 2}, sampling={"s_churn": 1.0})
    with pytest.raises(InputError, match=r"draftp.prefix_steps cannot be combined with sampling.sampler lcm"):
        tiny_config(tiny_sdxl, draftp={"prefix_steps": 2}, sampling={"sampler": "lcm"})


@pytest.mark.parametrize(
    ("draftp", "said"),
    [
        ({"prefix_sampler": "heun"}, "draftp.prefix_sampler heun has no effect without draftp.prefix_steps"),
        ({"prefix_steps": 24}, "draftp.prefix_steps 24 of dpmpp_2m saves nothing: the run's own 24 steps"),
        ({"prefix_steps": 12, "prefix_sampler": "heun"}, "draftp.prefix_steps 12 of heun saves nothing"),
        ({"prefix_steps": 23}, None),
        ({"prefix_steps": 24, "gradient": {"mode": "refl", "window": 1}}, None),
    ],
    ids=str,
)
def test_what_has_no_effect_is_said(tiny_sdxl, draftp, said):
    cfg = tiny_config(tiny_sdxl, draftp={"truncation_steps": 1, **draftp}, sampling={"steps": 25})
    found = [text for text in without_effect(cfg) if "prefix" in text]
    assert found == [] if said is None else said in found[0]


def test_the_memory_plan_knows_it(tiny_sdxl):
    """A solver that looks back holds one estimate of x_0 more than Euler's: nothing beside a UNet's activations."""
    plans = []
    for draftp in ({}, {"prefix_steps": 5}):
        cfg = tiny_config(tiny_sdxl, draftp=draftp, sampling={"steps": 8})
        plans.append(memory_plan(cfg, configuration_folder(cfg)).phases[Phase.PREFIX])
    assert plans[0] <= plans[1] < 1.02 * plans[0]


@torch.no_grad()
def test_twelve_steps_are_nearer_than_twenty_four_of_euler():
    """On the toy model, N 25, K 1, guidance 5: distance from a fine solution, as a share of its norm."""
    model = SDXLDRaFTPModel(load_config("toy", ["sampling.steps=25", "draftp.truncation_steps=1"]))
    prompts = ["a small red circle on a white background", "two blue squares on a black background"]
    two = replace(batch(2), prompts=prompts)
    x, tuned = model.networks.start(two), model.networks.tuned(model.encode(two))

    def walked(solver, count):
        return Prefix(prefix_levels(model.schedule, 24, count), SOLVERS[solver], 24).walk(tuned, x)

    exact = walked("heun", 80)

    def error(x_k):
        return float((x_k - exact).norm() / exact.norm())

    own, ten, twelve = error(model.sampler.walk(tuned, x, stop=24)), *(error(walked("dpmpp_2m", n)) for n in (10, 12))
    assert twelve < own < 0.1
    assert ten < 1.6 * own

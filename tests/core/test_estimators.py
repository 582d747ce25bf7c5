"""The gradient modes against each other and against a second computation, written from the equations: float64, 1e-9."""

from itertools import pairwise
from random import Random

import pytest
import torch

from draftcli.core.backward import Work
from draftcli.core.batch import Batch, derived_seed
from draftcli.core.denoise import Sampler
from draftcli.core.draftp import training_step
from draftcli.core.gradient.matching import Matching
from draftcli.core.gradient.mode import idle_beside_mode, make_mode, mode_names, recomputes_steps
from draftcli.core.guidance import network_input
from draftcli.core.penalty import kl_penalty
from draftcli.core.rollout import Rollout
from draftcli.core.schedule import Level, make_schedule
from draftcli.errors import InputError
from draftcli.planning.plan import count_evaluations
from tests.core.test_gradient_modes import ON_ALL, assert_same, gradient, model_of, step
from tests.tiny import batch, latents_at, prefers_red, rows_asked, tiny_config, tiny_model

N = 4


def found(folder, options, micro=4, recompute=True, **sections):
    return step(model_of(folder, options, **sections), recompute=recompute, micro=micro)


@pytest.mark.parametrize(
    ("options", "same_as", "k"),
    [
        ({"mode": "random_k", "low": 1, "high": 1}, "last_k", 1),
        ({"mode": "random_k", "low": 3, "high": 3}, "last_k", 3),
        ({"mode": "random_k", "low": 2, "high": 2, "mean": 9.0, "std": 1.0}, "last_k", 2),
        ({"mode": "refl", "window": 1}, "last_k", 1),
        ({"mode": "sparse", "at": [N - 1], "rescale": 0}, "last_k", 1),
        ({"mode": "sparse", "steps": 1, "tail": 0.25, "rescale": 0}, "last_k", 1),
        ({"mode": "sparse", "steps": N}, {"mode": "sparse", "at": [*range(N)]}, 1),
        ({"mode": "drtune", "at": [N - 1], "stop": 1}, "last_k", 1),
        ({"mode": "drtune", "at": [*range(N)], "stop": 1, "detach": False}, "last_k", N),
        ({"mode": "drtune", "at": [*range(N)], "stop": 1}, {"mode": "sparse", "at": [*range(N)], "rescale": 0}, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("churn", [0, 1.2], ids=["calm", "churn"])
def test_modes_that_are_the_same(tiny_sdxl, options, same_as, k, churn):
    sampling = {"s_churn": churn}
    expected = found(tiny_sdxl, same_as, k=k, sampling=sampling)
    assert_same(found(tiny_sdxl, options, micro=1, sampling=sampling), expected)


# --------------------------------------------------------------------------- a second computation, from the equations


class Walk:
    """The walk of one image of a batch, step by step: what each equation below is written with."""

    def __init__(self, model, i):
        whole = batch(4)
        self.one = whole.some([i])
        self.cond, start = model.encode(self.one), model.networks.start(self.one)
        self.tuned, self.base = model.networks.tuned(self.cond), model.networks.base(self.cond)
        self.levels = [model.schedule.level(k) for k in range(N)]
        self.x = [latents_at(model, self.cond, start, k) for k in range(N + 1)]
        self.moves = [b - a for a, b in pairwise(map(float, model.schedule.sigmas))]
        self.model = model

    def reward(self, x_0):
        return prefers_red(self.model.decode(x_0), self.one.prompts).mean()

    def kl(self, at):
        return sum(kl_penalty(self.tuned(self.x[i], self.levels[i]), self.base(self.x[i], self.levels[i])) for i in at)


def random_k(walk, draw):
    k = draw.randint(1, N)
    x, kl = walk.x[N - k], 0
    for i in range(N - k, N):
        eps = walk.tuned(x, walk.levels[i])
        kl = kl + kl_penalty(eps, walk.base(x, walk.levels[i])) / k
        x = x + walk.moves[i] * eps
    return walk.reward(x), kl


def refl(walk, draw):
    stop = draw.randint(N - 2, N - 1)
    eps = walk.tuned(walk.x[stop], walk.levels[stop])
    return walk.reward(walk.x[stop] - walk.levels[stop].sigma * eps), walk.kl([stop])


def sparse(walk, draw):
    keys = {i: draw.random() ** (1 / (i + 1)) for i in range(N)}
    at = sorted(sorted(keys, key=lambda i: -keys[i])[:2])
    f = sum(map(abs, walk.moves)) / sum(abs(walk.moves[i]) for i in at)
    x_0 = walk.x[N]
    for i in at:
        eps = walk.tuned(walk.x[i], walk.levels[i])
        x_0 = x_0 + (1 + 0.5 * (f - 1)) * walk.moves[i] * (eps - eps.detach())
    return walk.reward(x_0), walk.kl(at) / 2


def drtune(walk, draw):
    stop = draw.randint(N - 2, N - 1)
    apart = stop // 2
    _, start = draw.choice([(apart, start) for start in range(stop - apart)])
    at, x = [start, start + apart], walk.x[0]
    for i in range(stop):
        eps = walk.tuned(x.detach(), walk.levels[i])
        x = x + walk.moves[i] * (eps if i in at else eps.detach())
    eps = walk.tuned(x.detach(), walk.levels[stop])
    return walk.reward(x - walk.levels[stop].sigma * eps.detach()), walk.kl(at) / 2


EQUATIONS = {
    "random_k": (random_k, {}, "random k"),
    "refl": (refl, {}, "refl"),
    "sparse": (sparse, {"steps": 2}, "sparse"),
    "drtune": (drtune, {"steps": 2}, "drtune"),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_gradient_is_that_of_the_equations(tiny_sdxl, name):
    """Of four images, each with its own draw, in one backward through everything."""
    equation, options, purpose = EQUATIONS[name]
    model = model_of(tiny_sdxl, {"mode": name, **options})
    ours = step(model, recompute=True, micro=2)
    model.unet.zero_grad()
    seeds = batch(4).seeds
    parts = [equation(Walk(model, i), Random(derived_seed(seeds[i], purpose))) for i in range(4)]
    reward, kl = (sum(values) / 4 for values in zip(*parts, strict=True))
    loss = -reward + 0.1 * kl
    loss.backward()
    theirs = {"loss": loss.item(), "reward": reward.item(), "kl_penalty": kl.item()}
    assert_same(ours, (theirs, gradient(model)))


@pytest.mark.parametrize("kl_coeff", [0.0, 0.3])
def test_matching_is_the_regression_of_its_equation(tiny_sdxl, kl_coeff):
    options = {"mode": "matching", "share": 0.5, "scale": 40.0, "weight": 0.7}
    model = model_of(tiny_sdxl, options)
    model.penalty.beta = kl_coeff
    ours = step(model, recompute=True)
    model.unet.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for i, seed in enumerate(batch(4).seeds):
        walk = Walk(model, i)
        for k in Random(derived_seed(seed, "matching")).sample(range(N), 2):
            sigma, eps = walk.levels[k].sigma, walk.tuned(walk.x[k], walk.levels[k])
            x_0 = (walk.x[k] - sigma * eps).detach().requires_grad_()
            (h,) = torch.autograd.grad(walk.reward(x_0), x_0)
            target = walk.base(walk.x[k], walk.levels[k]) - 40 * h / max(1, h.norm().item()) / (1 + sigma) ** 3
            loss = loss + 0.7 * (eps - target).square().mean() / 8 + kl_coeff * walk.kl([k]) / 8
    loss.backward()
    assert (ours[1] - gradient(model)).norm() <= 1e-9 * ours[1].norm()


@pytest.mark.parametrize("sigma", [0.03, 0.7, 14.6])
def test_matchings_coordinates_are_a_flow_models(sigma):
    """v = n - x_0 regressed onto v_base - s (1 - u)^2 h, by finite differences of the reward at the prediction."""
    generator = torch.Generator().manual_seed(3)
    x, eps, eps_base = torch.randn(3, 1, 2, 3, 3, generator=generator, dtype=torch.float64)
    u, scale = sigma / (1 + sigma), 5.0

    def reward(x_0):
        return x_0.sin().sum() / 30

    def velocity(noise_estimate):
        """n - x_0 where x = x_0 + sigma n."""
        return noise_estimate - (x - sigma * noise_estimate)

    # d r / d y of the flow model's prediction y - u sg(v), y = x / (1 + sigma), one entry of y at a time
    y, h = x / (1 + sigma), torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros_like(x)
        step.view(-1)[i] = 1e-6
        there, here = (reward(y + sign * step - u * velocity(eps)) for sign in (1, -1))
        h.view(-1)[i] = (there - here) / 2e-6
    assert h.norm() < 1, "not clipped"
    target = velocity(eps_base) - scale * (1 - u) ** 2 * h
    mode = Matching(N, 1, scale=scale)
    x_0 = (x - sigma * eps).requires_grad_()
    (ours,) = torch.autograd.grad(reward(x_0), x_0)
    level = Level(0, N, sigma, 0.0, sigma, 0)
    loss = mode.loss(ours, eps, eps_base, level)
    assert loss.item() == pytest.approx(((velocity(eps) - target) / (1 + sigma)).square().mean().item(), rel=1e-7)
    at_the_fixed_point = eps_base - scale * ours / (1 + sigma) ** 3
    assert mode.loss(ours, at_the_fixed_point, eps_base, level).item() == pytest.approx(0, abs=1e-20)


# ------------------------------------------------------------------------------------------------- draws and options


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "random_k"},
        {"mode": "random_k", "low": 2},
        {"mode": "random_k", "mean": 2.5, "std": 1.0},
        {"mode": "refl"},
        {"mode": "refl", "window": 4},
        {"mode": "sparse", "steps": 2},
        {"mode": "sparse", "steps": 1, "tail": 0.5, "late_bias": 3},
        {"mode": "drtune"},
        {"mode": "drtune", "steps": 1, "stop": 3},
        {"mode": "matching", "share": 0.5},
    ],
    ids=str,
)
def test_the_mean_number_of_evaluations_is_that_of_the_draws(tiny_sdxl, options):
    """Planned beside counted, over 400 trajectories of an analytic network, with a different price for each step."""
    cfg = tiny_config(tiny_sdxl, draftp={"gradient": options}, sampling={"guidance_interval": [0.25, 0.75]})
    mode = make_mode(cfg)
    per_step = [1 + cfg.sampling.is_guided(i) for i in range(N)]
    counted = 0
    for piece in pieces_of(mode, 400):
        counted += len(piece) * sum(per_step[level.index] for level in piece.levels) / 400
    assert counted == pytest.approx(mode.evaluations(per_step, True).with_gradient, rel=0.08)


class Analytic:
    """The noise estimate of pictures that are all 0; no other network is asked for."""

    def tuned(self, cond):
        return lambda x, level: x * (level.sigma / (1 + level.sigma**2))


def pieces_of(mode, count):
    images = Batch([""] * count, list(range(count)), (16, 16))
    start, sampler = torch.zeros(count, 1, 2, 2), Sampler(make_schedule(N))
    return list(mode.pieces(Rollout(Analytic(), sampler, images, torch.zeros(count), start, True)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "random_k", "low": 0}, "has low 0; it is a whole number from 1 to 4"),
        ({"mode": "random_k", "low": 3, "high": 2}, "has low 3; it is a whole number from 1 to 2"),
        ({"mode": "random_k", "high": 5}, "has high 5; it is a whole number from 1 to 4"),
        ({"mode": "random_k", "mean": 2}, "takes mean and std together"),
        ({"mode": "random_k", "mean": 2, "std": 0}, "has std 0; it is a number above 0"),
        ({"mode": "refl", "window": 5}, "has window 5; it is a whole number from 1 to 4"),
        ({"mode": "refl", "window": True}, "has window True"),
        ({"mode": "sparse", "steps": 5}, "has steps 5; it is a whole number from 1 to 4"),
        ({"mode": "sparse", "steps": 3, "tail": 0.5}, "has steps 3; it is a whole number from 1 to 2"),
        ({"mode": "sparse", "tail": 0}, "has tail 0; it is a number above 0 and at most 1"),
        ({"mode": "sparse", "rescale": "much"}, "has rescale 'much'; it is a number from 0 to 1"),
        ({"mode": "sparse", "at": [1, 4]}, r"has at \[1, 4\]: step 4 is not among 0 .. 3"),
        ({"mode": "sparse", "at": [1, 1]}, r"has at \[1, 1\], in which a step is repeated"),
        ({"mode": "sparse", "at": []}, "it is a list of sampler steps"),
        ({"mode": "sparse", "at": 3}, "it is a list of sampler steps"),
        ({"mode": "sparse", "at": [1], "steps": 1}, "has at, which names the steps, and steps for drawing them"),
        ({"mode": "sparse", "at": [1], "late_bias": 1.0, "tail": 0.5}, "and late_bias and tail for drawing them"),
        ({"mode": "drtune", "at": [1], "steps": 2}, "draftp.gradient drtune has at, which names the steps, and steps"),
        ({"mode": "drtune", "at": [-1]}, "step -1 is not among 0 .. 3"),
        ({"mode": "drtune", "at": [0, 0], "stop": 1}, "in which a step is repeated"),
        ({"mode": "drtune", "at": [3]}, "trains step 3, and can stop at step 2 of 4: give stop 1 or less"),
        ({"mode": "drtune", "steps": 4}, "has steps 4; it is a whole number from 1 to 2"),
        ({"mode": "drtune", "stop": 4}, "has stop 4; it is a whole number from 1 to 3"),
        ({"mode": "drtune", "detach": 0}, "has detach 0; it is true or false"),
        ({"mode": "matching", "share": 0}, "has share 0; it is a number above 0 and at most 1"),
        ({"mode": "matching", "scale": -1}, "has scale -1"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_is_refused(tiny_sdxl, options, words):
    with pytest.raises(InputError, match=words):
        make_mode(tiny_config(tiny_sdxl, draftp={"gradient": options}))


@pytest.mark.parametrize(
    ("draftp", "given", "said"),
    [
        ({}, (), None),
        ({"truncation_steps": 4, "gradient": "low_variance"}, (), None),
        ({"truncation_steps": 1, "gradient": "refl"}, (), None),
        ({"truncation_steps": 2, "gradient": "refl"}, (), "truncation_steps 2 has no effect with draftp.gradient refl"),
        ({"truncation_steps": 9, "gradient": "sparse"}, (), "truncation_steps 9 has no effect with draftp.gradient"),
        ({"truncation_steps": 9, "gradient": "random_k"}, ("draftp.gradient",), None),
        (
            {"truncation_steps": 1, "gradient": "drtune"},
            ("draftp.gradient", "draftp.truncation_steps"),
            "drtune, whose",
        ),
    ],
    ids=str,
)
def test_a_k_that_a_mode_does_not_use_is_said_and_not_refused(tiny_sdxl, draftp, given, said):
    """That of a recipe stands for the recipe's mode, and is passed over where another one is given beside it."""
    found = idle_beside_mode(tiny_config(tiny_sdxl, draftp=draftp), given)
    assert found == [] if said is None else said in found[0]


def test_a_k_above_n_changes_nothing_where_the_mode_does_not_use_it(tiny_sdxl):
    large, small = (model_of(tiny_sdxl, "refl", k=k) for k in (9, 2))
    assert_same(step(large), step(small))
    assert large.generate(batch(1), large.initial_noise(batch(1)))[0].isfinite().all()


@pytest.mark.parametrize("name", mode_names())
def test_steps_that_are_kept_in_vain_are_said(tiny_sdxl, name):
    """Where the mode runs its steps again in any case, asking for the opposite has no effect."""
    cfg = tiny_config(tiny_sdxl, draftp={"gradient": name}, sharding={"recompute_steps": False})
    found = [text for text in idle_beside_mode(cfg, ("draftp.gradient",)) if "recompute_steps" in text]
    assert bool(found) == recomputes_steps(cfg)


@pytest.mark.parametrize(
    ("draftp", "again"),
    [
        ({"truncation_steps": 2}, True),
        ({"truncation_steps": 1}, False),
        ({"truncation_steps": 1, "gradient": {"mode": "random_k", "low": 3, "high": 3}}, True),
        ({"truncation_steps": 2, "gradient": {"mode": "random_k", "low": 1, "high": 1}}, False),
        ({"truncation_steps": 2, "gradient": {"mode": "refl", "window": 1}}, False),
    ],
    ids=str,
)
def test_by_default_checkpointed_steps_run_again_where_several_follow_each_other(tiny_sdxl, draftp, again):
    """Whatever the number is called; and the plan counts what runs. A checkpoint repeats blocks, not the network."""
    sharding = {"activation_checkpointing": True, "fold_lora": False}
    model = tiny_model(tiny_sdxl, 0.1, draftp=draftp, sharding=sharding)
    assert recomputes_steps(model.cfg) == again
    rows, planned = rows_asked(model, batch(4)), count_evaluations(model.cfg)
    assert rows[True] == 4 * planned["with_gradient"]
    assert rows[False] == 4 * (planned["forward"] - planned["with_gradient"] + planned["base"])


@pytest.mark.parametrize("name", ["sparse", "drtune", "matching", "low_variance"])
def test_a_mode_whose_reward_comes_first_needs_two_stages(tiny_sdxl, name):
    with pytest.raises(InputError, match=r"needs sharding\.two_stage"):
        make_mode(tiny_config(tiny_sdxl, draftp={"gradient": name}, sharding={"two_stage": False}))


def test_fsdp_needs_the_same_number_of_calls_in_every_process(tiny_sdxl):
    fsdp = {"strategy": "fsdp"}
    with pytest.raises(InputError, match="makes more network calls for some images than for others"):
        make_mode(tiny_config(tiny_sdxl, draftp={"gradient": "random_k"}, sharding=fsdp))
    for name in ("refl", "sparse", "drtune", "matching", {"mode": "random_k", "low": 2, "high": 2}):
        make_mode(tiny_config(tiny_sdxl, draftp={"gradient": name}, sharding=fsdp))


@pytest.mark.parametrize("name", ["refl", "sparse", "drtune", "matching"])
def test_in_lockstep_the_number_of_calls_is_the_same_whatever_is_drawn(tiny_sdxl, name):
    """FSDP gathers weights in each call: with another number of them two processes would wait for each other."""
    model, counts = model_of(tiny_sdxl, name), set()
    work = Work(micro=2, prefix=4, decode=2, recompute=True, scale=lambda loss: loss, lockstep=True)
    for first in range(12):
        calls = []
        hook = model.unet.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(1))
        part = Batch(["a red circle"] * 2, [2 * first, 2 * first + 1], batch(2).size)
        training_step(model.networks, prefers_red, model.mode, model.penalty, model.sampler, part, work)
        hook.remove()
        counts.add(len(calls))
    assert len(counts) == 1


def detached_model(folder, gradient):
    settings = {"gradient": gradient, "truncation_steps": 2, "detach_uncond": True}
    return tiny_model(folder, 0.1, peft=ON_ALL, draftp=settings)


@pytest.mark.parametrize("name", ["last_k", "sparse", "matching"])
def test_no_gradient_through_the_unconditional_half(tiny_sdxl, name):
    """The figures stay, the gradient is another, and half of the evaluations have one."""
    whole = step(model_of(tiny_sdxl, name), recompute=True)
    model, rows = detached_model(tiny_sdxl, name), {True: 0, False: 0}

    def count(module, inputs):
        rows[torch.is_grad_enabled()] += len(inputs[0])

    model.unet.register_forward_pre_hook(count)
    detached = step(model, recompute=True)
    assert detached[0] == pytest.approx(whole[0], abs=1e-9)
    assert (detached[1] - whole[1]).norm() > 1e-3 * whole[1].norm()
    assert rows[True] == pytest.approx(4 * count_evaluations(model.cfg)["with_gradient"])


def test_the_detached_gradient_is_that_of_the_equation(tiny_sdxl):
    """guided = sg(u) + s (c - sg(u))."""
    model = detached_model(tiny_sdxl, {"mode": "refl", "window": 1})
    ours, last = step(model, recompute=True), N - 1
    model.unet.zero_grad()
    for i in range(4):
        walk = Walk(model, i)
        x, level, scale = walk.x[last], walk.levels[last], model.cfg.sampling.scale
        uncond, cond = (
            model.networks.family.predict(model.unet, network_input(x, level), level.timestep, half)
            for half in (walk.cond.unconditional, walk.cond.conditional)
        )
        eps = uncond.detach() + scale * (cond - uncond.detach())
        loss = -walk.reward(x - level.sigma * eps) + 0.1 * kl_penalty(eps, walk.base(x, level))
        (loss / 4).backward()
    assert (ours[1] - gradient(model)).norm() <= 1e-9 * ours[1].norm()

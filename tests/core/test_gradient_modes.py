"""Every gradient mode, found by its file: two executors, one objective, and the evaluations that it promises.

float64 and 1e-9. A mode that is added to core/gradient/ is in all of these tests by its name alone.
"""

import math

import pytest
import torch

from draftcli.config import Config
from draftcli.config.rules import USE_K
from draftcli.core.backward import Piece, Work
from draftcli.core.draftp import SDXLDRaFTPModel, training_step
from draftcli.core.gradient.last_k import LastK
from draftcli.core.gradient.mode import make_mode, mode_names
from draftcli.core.penalty import PENALTIES, Penalty, kl_penalty
from draftcli.errors import InputError
from draftcli.planning.plan import count_evaluations
from tests.tiny import batch, latents_at, prefers_red, rows_asked, tiny_config, tiny_model

every_mode = pytest.mark.parametrize("name", mode_names())
# Where a mode draws its steps: options with which every draw takes as many evaluations as their mean.
EVEN = {
    "random_k": {"mode": "random_k", "low": 2, "high": 2},
    "refl": {"mode": "refl", "window": 1},
    "drtune": {"mode": "drtune", "at": [1, 2], "stop": 1},
    "sparse": {"mode": "sparse", "at": [1, 2]},
    "matching": {"mode": "matching", "share": 1.0},
}
ON_ALL = {"rank": 2, "target_modules": ["to_q", "to_v", "ff.net.2", "conv1", "proj_in"]}


def model_of(folder, name, k=2, **sections):
    draftp = {"gradient": name, "truncation_steps": k}
    return tiny_model(folder, 0.1, peft=ON_ALL, draftp=draftp, **sections)


def step(model, mode=None, recompute=False, micro=4, prompts=None):
    """Metrics and gradient of one training step in a given way."""
    model.unet.zero_grad()
    work = Work(micro=micro, prefix=4, decode=2, recompute=recompute, scale=lambda loss: loss)
    figures = training_step(
        model.networks, prefers_red, mode or model.mode, model.penalty, model.sampler, prompts or batch(4), work
    )
    return figures.metrics(model.penalty.beta), gradient(model)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.trainable_parameters])


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-9)
    assert expected[1].norm() > 1e-5
    assert (found[1] - expected[1]).norm() <= 1e-9 * expected[1].norm()


def test_the_modes_are_there():
    assert mode_names() == ["drtune", "last_k", "low_variance", "matching", "random_k", "refl", "sparse"]


@every_mode
def test_the_rules_know_which_modes_use_k(tiny_sdxl, name):
    mode = make_mode(tiny_config(tiny_sdxl, draftp={"gradient": name}))
    assert mode.uses_k == (name in USE_K)


@every_mode
@pytest.mark.parametrize(
    "sampling", [{}, {"s_churn": 1.2}, {"sampler": "euler_ancestral"}, {"sampler": "lcm"}], ids=str
)
def test_kept_and_recomputed_steps_agree(tiny_sdxl, name, sampling):
    model = model_of(tiny_sdxl, name, sampling=sampling)
    assert_same(step(model, recompute=True, micro=1), step(model))


@pytest.mark.parametrize("name", sorted({*mode_names()} - {"matching"}))
@pytest.mark.parametrize("kl_coeff", [0.0, 0.7])
def test_one_objective(tiny_sdxl, name, kl_coeff):
    """NeMo's function with one backward through everything is `training_step`. Matching regresses onto the reward's
    gradient, which has to be there first."""
    model = model_of(tiny_sdxl, name)
    model.penalty.beta = kl_coeff
    expected = step(model)
    model.unet.zero_grad()
    image, loss_func = model.get_forward_output_and_loss_func()(iter([batch(4)]), model)
    loss, metrics = loss_func(image)
    loss.backward()
    assert_same((metrics, gradient(model)), expected)


@every_mode
def test_every_way_has_the_same_penalty(tiny_sdxl, name):
    """Graph kept, steps run again, one backward through everything; with a penalty of all kinds at once. The guidance
    interval ends before the last step, whose estimates are one."""
    model = model_of(tiny_sdxl, name, sampling={"guidance_interval": [0.0, 0.75]})
    model.penalty = Penalty(lambda *asked: torch.stack([kind(*asked) for kind in PENALTIES.values()]).sum(), 0.7)
    expected = step(model)
    assert expected[0]["kl_penalty"] > 1e-6
    assert_same(step(model, recompute=True, micro=1), expected)
    if name != "matching":
        model.unet.zero_grad()
        image, loss_func = model.get_forward_output_and_loss_func()(iter([batch(4)]), model)
        loss, metrics = loss_func(image)
        loss.backward()
        assert_same((metrics, gradient(model)), expected)


@every_mode
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("sampling", [{}, {"guidance_interval": [0.25, 0.75]}, {"scale": 1.0}], ids=str)
def test_evaluations_are_those_that_are_made(tiny_sdxl, name, recompute, sampling):
    """What a plan counts is what the network is asked for: rows with gradient and without, and the base's."""
    settings = {"sharding": {"recompute_steps": recompute, "fold_lora": False}, "sampling": sampling}
    model = model_of(tiny_sdxl, EVEN.get(name, name), **settings)
    rows, planned = rows_asked(model, batch(4)), count_evaluations(model.cfg)
    assert rows[True] == 4 * planned["with_gradient"]
    assert rows[False] == 4 * (planned["forward"] - planned["with_gradient"] + planned["base"])


@every_mode
def test_a_pictures_gradient_is_its_own(tiny_sdxl, name):
    """Whatever it is drawn with: the mode's randomness belongs to the picture's seed, or two ranks would not be one."""
    model = model_of(tiny_sdxl, name)
    together = step(model, prompts=batch(2))
    parts = [step(model, prompts=part) for part in batch(2).split(1)]
    assert together[0]["loss"] == pytest.approx(sum(p[0]["loss"] for p in parts) / 2, abs=1e-9)
    assert_same((together[0], sum(p[1] for p in parts) / 2), together)


@every_mode
def test_a_mode_says_what_it_does(tiny_sdxl, name):
    assert "sampler steps" in make_mode(tiny_config(tiny_sdxl, draftp={"gradient": name})).describe()


# ------------------------------------------------------------------------------------------- a mode of another kind


class AtSteps(LastK):
    """As DRTune and FlowBP have it: chosen steps, each at a detached x, reward on the true x_0."""

    recomputes = True

    def __init__(self, steps, at, reach):
        super().__init__(steps, len(at))
        self.at, self.reach = at, reach

    def pieces(self, rollout):
        whole = rollout.piece(0)
        levels, x = [whole.levels[i] for i in self.at], [whole.x[i] for i in self.at]
        yield Piece(whole.prompts, whole.cond, levels, x, whole.x_0, reach=self.reach)


def test_steps_at_a_detached_x(tiny_sdxl):
    """A piece whose steps stand by themselves: against a surrogate written by hand, with the penalty."""
    model, at, reach = model_of(tiny_sdxl, "last_k"), [0, 2, 3], [-0.5, 0.25, -0.1]
    found = step(model, AtSteps(4, at, reach), recompute=True, micro=2)
    model.unet.zero_grad()
    cond, start = model.encode(batch(4)), model.networks.start(batch(4))
    tuned, base = model.networks.tuned(cond), model.networks.base(cond)
    x_0, penalties = latents_at(model, cond, start, 4), []
    for i, weight in zip(at, reach, strict=True):
        level, x = model.schedule.level(i), latents_at(model, cond, start, i)
        eps = tuned(x, level)
        x_0 = x_0 + weight * (eps - eps.detach())
        penalties.append(kl_penalty(eps, base(x, level)))
    reward, kl = prefers_red(model.decode(x_0), batch(4).prompts).mean(), sum(penalties) / 3
    loss = -reward + 0.1 * kl
    loss.backward()
    assert_same(found, ({"loss": loss.item(), "reward": reward.item(), "kl_penalty": kl.item()}, gradient(model)))
    assert_same(step(model, AtSteps(4, at, reach), micro=2), found)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("draftp", "words"),
    [
        (
            {"gradient": "nonesuch"},
            r"draftp.gradient .nonesuch.: there is no such mode; available are drtune, last_k, low_",
        ),
        ({"gradient": "mode"}, "no such mode"),
        ({"gradient": "../low_variance"}, "no such mode"),
        ({"gradient": {"mode": "last_k", "samples": 2}}, "draftp.gradient last_k has no option 'samples'; it has none"),
        ({"gradient": {"mode": "low_variance", "n": 2}}, "has no option 'n'; it has samples"),
        ({"gradient": {"mode": "low_variance", "samples": 0}}, "has samples 0; allowed are 1 and more"),
    ],
    ids=str,
)
def test_a_mode_that_cannot_be_is_refused(tiny_sdxl, draftp, words):
    with pytest.raises(InputError, match=words):
        make_mode(tiny_config(tiny_sdxl, draftp=draftp))


def test_the_older_name_of_low_variance_is_the_same(tiny_sdxl):
    older = tiny_model(tiny_sdxl, 0.1, peft=ON_ALL, draftp={"truncation_steps": 1, "low_variance_samples": 3})
    newer = model_of(tiny_sdxl, {"mode": "low_variance", "samples": 3}, k=1)
    assert_same(step(newer), step(older))


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_sampler_that_cannot_carry_gradient_is_refused_on_every_path(tiny_sdxl, sampler, recompute, k):
    """dpmpp_2m with recomputed steps and K >= 2 once gave a wrong gradient without a word, heun an IndexError."""
    settings = {"sampling": {"sampler": sampler}, "sharding": {"recompute_steps": recompute}}
    model = tiny_model(tiny_sdxl, draftp={"truncation_steps": k}, **settings)
    noise = model.initial_noise(batch(1))
    for path in (
        lambda: model.mode,
        lambda: make_mode(model.cfg),
        lambda: model.get_loss_and_metrics(batch(1)),
        lambda: model.get_loss_and_metrics(batch(1), forward_only=True),
        lambda: model.get_forward_output_and_loss_func()(iter([batch(1)]), model),
        lambda: model.generate(batch(1), noise),
        lambda: count_evaluations(model.cfg),
    ):
        with pytest.raises(InputError, match="train with euler, ddim, euler_ancestral or lcm"):
            path()
    assert model.annealed_guidance(batch(1), noise).isfinite().all(), "it draws"


def test_training_without_a_reward_says_what_to_do(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    model.reward_model = None
    for path in (
        lambda: model.get_loss_and_metrics(batch(1)),
        lambda: model.get_loss_and_metrics(batch(1), forward_only=True),
    ):
        with pytest.raises(InputError, match=r"assign model.reward_model first"):
            path()


def test_metrics_are_plain_numbers(tiny_sdxl):
    metrics, _ = step(model_of(tiny_sdxl, "last_k"))
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_an_overridden_objective_is_refused():
    """It would be passed over in silence: an objective of one's own is an argument."""
    with pytest.raises(TypeError, match="pass an objective as loss="):
        type("Own", (SDXLDRaFTPModel,), {"get_forward_output_and_loss_func": lambda self: None})


@every_mode
def test_validation_and_generate_are_of_the_batch_itself(tiny_sdxl, name):
    """NeMo-Aligner's contract, whatever pieces a mode cuts a training batch into; and no evaluation beyond it."""
    model, rows = model_of(tiny_sdxl, name), []
    images, captions = model.get_loss_and_metrics(batch(2), forward_only=True)[1]["images_and_captions"]
    assert images.shape[0] == 2
    assert captions == list(batch(2).prompts)
    model.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    image, eps, _ = model.generate(batch(2), model.initial_noise(batch(2)))
    assert image.shape[0] == 2
    assert eps.shape[:2] == (2, 2)
    assert rows == [4] * (4 + 2), "N steps, and the base in the last two"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"draftp": {"truncation_steps": 9}}, "K can be at most 4"),
        ({"trainer": {"micro_batch_size": 3}}, "not a multiple of trainer.micro_batch_size"),
        ({"draftp": {"gradient": "low_variance"}, "sharding": {"two_stage": False}}, "needs sharding.two_stage"),
        ({"draftp": {"gradient": "sparse", "low_variance_samples": 1}}, "remove it or draftp.gradient"),
        ({"sharding": {"offload": True, "recompute_steps": False}}, "sharding.offload needs"),
    ],
    ids=str,
)
def test_settings_made_in_python_are_held_to_the_rules(tiny_sdxl, sections, words):
    """Config(...) checks each section by itself; what forbids each other is seen before anything is loaded."""
    whole = tiny_config(tiny_sdxl).model_dump()
    cfg = Config.model_validate({name: {**values, **sections.get(name, {})} for name, values in whole.items()})
    with pytest.raises(InputError, match=words):
        SDXLDRaFTPModel(cfg)

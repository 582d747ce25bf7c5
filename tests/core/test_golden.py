"""Held to the reference's own numbers (tests/golden/README.md), in float64 and float32."""

import pytest
import torch
from safetensors.torch import load_file

import draftcli
from draftcli.core.annealing import annealed_denoiser, step_weights
from draftcli.core.penalty import kl_penalty
from draftcli.core.schedule import make_schedule, sigma_table
from draftcli.core.weighings import weighing
from tests.core.golden import FOLDER, GOLDEN, flat_factors, golden_model
from tests.tiny import gradient_steps, latents_at

SUGGESTED = GOLDEN["tolerance"]["float32_suggested"]
TOLERANCE = {
    torch.float64: {"latents": 1e-9, "eps": 1e-9, "kl": 1e-9, "loss": 1e-9, "grad": 1e-9},
    torch.float32: {
        **{k: SUGGESTED[k] for k in ("latents", "eps", "kl", "loss")},
        "grad": SUGGESTED["grad_relative_norm"],
    },
}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
both_networks = pytest.mark.parametrize("name", ["analytic", "unet"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 25, 30, 40, 50])
def test_schedule_is_exact(n):
    recorded, schedule = load_file(FOLDER / "schedule.safetensors"), make_schedule(n)
    assert torch.equal(schedule.timesteps, recorded[f"n{n}/timesteps"])
    assert draftcli.timesteps(n) == recorded[f"n{n}/timesteps"].tolist()
    assert torch.equal(schedule.sigmas, recorded[f"n{n}/sigmas"])
    assert schedule.init_scale == recorded[f"n{n}/init_scale"].item()


def test_sigma_table_is_exact():
    assert torch.equal(sigma_table(), load_file(FOLDER / "schedule.safetensors")["table/sigmas"])


@both_dtypes
@both_networks
def test_base_trajectory(name, dtype):
    model, cond, data = golden_model(name, dtype)
    x = model.networks.at_first_level(data["inputs/x_T"])
    seen, eps = [x], []
    predict = model.networks.base(cond)

    def record(x, level):
        if level.index:
            seen.append(x)
        eps.append(predict(x, level))
        return eps[-1]

    seen.append(model.sampler.walk(record, x))
    close(torch.stack(seen), data["base/latents"], TOLERANCE[dtype]["latents"])
    close(torch.stack(eps), data["base/eps"], TOLERANCE[dtype]["eps"])


@both_dtypes
@both_networks
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kl_coeff", ["0", "0.1", "1"])
def test_loss_kl_and_lora_gradient(name, dtype, k, kl_coeff):
    tolerance, expected = TOLERANCE[dtype], GOLDEN[name]["losses"][f"K{k}/kl{kl_coeff}"]
    model, cond, data = golden_model(name, dtype, k, float(kl_coeff))
    first = model.cfg.sampling.steps - k
    x = latents_at(model, cond, model.networks.at_first_level(data["inputs/x_T"]), first)
    assert not x.requires_grad
    walked = gradient_steps(model, cond, x, first)
    x_0, eps_tuned, eps_base = walked.x_0, walked.eps.guided, walked.eps_base.guided
    close(x_0, data["generate/x0"], tolerance["latents"])
    close(eps_tuned, data[f"generate/K{k}/eps_draft"], tolerance["eps"])
    close(eps_base, data[f"generate/K{k}/eps_init"], tolerance["eps"])
    kl = kl_penalty(eps_tuned, eps_base)
    assert kl.item() == pytest.approx(expected["kl"], abs=tolerance["kl"], rel=0)
    reward = (data["inputs/reward_latent"].to(x_0) * x_0).sum((1, 2, 3))
    close(reward, data["generate/reward"], tolerance["loss"])
    loss = -reward.mean() + float(kl_coeff) * kl
    assert loss.item() == pytest.approx(expected["loss"], abs=tolerance["loss"], rel=0)
    loss.backward()
    gradient = torch.cat([f.grad.flatten() for f in flat_factors(model.unet, GOLDEN[name]["lora"])]).double()
    recorded = data[f"generate/K{k}/grad_kl{kl_coeff}"]
    assert (gradient - recorded).norm() <= tolerance["grad"] * recorded.norm()
    assert gradient.norm().item() == pytest.approx(expected["grad_norm"], rel=tolerance["grad"])


@both_dtypes
@both_networks
@pytest.mark.parametrize("kind", ["base", "draft", "linear", "power_2", "power_0.5", "step_0.6"])
def test_annealed_guidance(name, dtype, kind):
    model, cond, data = golden_model(name, dtype)
    weigh = weighing(kind)
    steps = GOLDEN["steps"]
    weights = [weigh(0.0, 0.0, i, steps) for i in range(steps)]
    assert weights == pytest.approx(GOLDEN[name]["annealed_weights"][kind], abs=1e-15)
    nets, weights = model.networks, step_weights(weigh, model.schedule)
    annealed = annealed_denoiser(nets.tuned, nets.base, (cond, cond), weights)
    x_0 = model.sampler.walk(annealed, nets.at_first_level(data["inputs/x_T"]))
    close(x_0, data[f"annealed/{kind}"], TOLERANCE[dtype]["latents"])


def test_churn_levels_of_the_reference():
    """s_churn 1.2 with 4 steps asks the network at 999, 808, 576, 323; levels above the table are clipped."""
    schedule = make_schedule(4)
    levels = [schedule.level(i, churn=1.2) for i in range(4)]
    assert [level.timestep for level in levels] == [999, 808, 576, 323]
    assert levels[0].sigma > levels[0].table_sigma == pytest.approx(14.614641190)

"""Few-step models are drawn as diffusers' own pipeline draws them, with the scheduler that their cards name: SDXL Turbo
(EulerAncestral, trailing), Lightning (Euler, trailing; its model for one step predicts the picture) and LCM; and their
gradient is that of a walk written by hand.

Tolerance: float32, as in test_diffusers.py; measured, a picture in [0, 1] moves by up to 1e-5.
"""

import functools

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline

from draftcli.core.batch import derived_seed
from draftcli.core.rollout import churn_noise
from tests.command import draftp, recipe
from tests.tiny import batch, make_sdxl, prefers_red, tiny_config, tiny_model

TURBO = (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, "euler_ancestral")
LIGHTNING = (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, "euler")
LCM = (LCMScheduler, {}, "lcm")
CASES = [
    *((TURBO, prediction) for prediction in ("epsilon", "v_prediction")),  # theirs has no sample
    *((kind, prediction) for kind in (LIGHTNING, LCM) for prediction in ("epsilon", "v_prediction", "sample")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("predictions")
    return functools.cache(lambda prediction: make_sdxl(root / prediction, prediction))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("kind", "prediction"), CASES, ids=lambda case: case if isinstance(case, str) else case[2])
def test_diffusers_own_pipeline_with_the_models_scheduler(folders, kind, prediction, steps):
    folder, (scheduler, options, sampler) = folders(prediction), kind
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    pipe.scheduler.set_timesteps(steps)
    grid = [int(t) for t in pipe.scheduler.timesteps]
    sampling = {"timesteps": grid, "steps": steps, "scale": 1.0, "sampler": sampler}
    model = tiny_model(folder, model={"precision": "fp32"}, sampling=sampling, draftp={"truncation_steps": 1})
    prompts = batch(2)
    noise = model.initial_noise(prompts)
    with torch.no_grad():
        ours = model.generate(prompts, noise)[0] / 255
    # Trailing Euler starts at sigma times the noise there, here as in the reference at sqrt(1 + sigma^2) times it.
    start = 1.0 if sampler == "lcm" else model.schedule.init_scale / float(pipe.scheduler.init_noise_sigma)
    theirs = pipe(
        list(prompts.prompts),
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=noise * start,
        generator=[torch.Generator().manual_seed(derived_seed(seed, "churn")) for seed in prompts.seeds],
        output_type="pt",
    ).images
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm"])
def test_gradient_is_that_of_a_walk_by_hand(tiny_sdxl, sampler, k):
    """K up to N, the fresh noise constant; without guidance only the half with the prompt is asked."""
    sampling = {"sampler": sampler, "scale": 1.0, "timesteps": [999, 759, 499, 259], "steps": 4}
    draftp_settings = {"truncation_steps": k, "kl_coeff": 0.0, "log_kl": False}
    model = tiny_model(tiny_sdxl, 0.1, sampling=sampling, draftp=draftp_settings)
    rows = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    loss, _ = model.get_loss_and_metrics(batch(2))
    hook.remove()
    assert sum(rows) == 2 * 4
    found = torch.cat([p.grad.flatten() for p in model.trainable_parameters])
    model.unet.zero_grad()
    cond, x = model.encode(batch(2)), model.networks.start(batch(2))
    tuned, noise, levels = model.networks.tuned(cond), churn_noise(batch(2)), model.sampler.levels()
    sigmas = model.schedule.sigmas.double().tolist()
    for i, sigma in enumerate(sigmas[:-1]):
        with torch.set_grad_enabled(i >= 4 - k):
            x_0 = x - sigma * tuned(x, levels[i])
            after = sigmas[i + 1]
            fresh = noise(tuple(x.shape)).double() if after else 0.0
            if sampler == "lcm":
                x = x_0 + after * fresh
            else:
                down = after**2 / sigma
                x = x_0 + down * (x - x_0) / sigma + (after**2 - down**2) ** 0.5 * fresh
    by_hand = -prefers_red(model.decode(x), batch(2).prompts).mean()
    by_hand.backward()
    expected = torch.cat([p.grad.flatten() for p in model.trainable_parameters])
    assert loss == pytest.approx(by_hand.item(), abs=1e-9)
    assert expected.norm() > 1e-5
    assert (found - expected).norm() <= 1e-9 * expected.norm()


def test_one_step_with_gradient_through_all_of_it_is_all_of_it(tiny_sdxl):
    """A model for one step: K = N = 1."""
    cfg = {"sampling": {"steps": 1, "scale": 1.0, "sampler": "lcm"}, "draftp": {"truncation_steps": 1}}
    model = tiny_model(tiny_sdxl, 0.1, **cfg)
    assert model.get_loss_and_metrics(batch(2))[0] == pytest.approx(
        tiny_model(tiny_sdxl, 0.1, **{**cfg, "sampling": {"steps": 1, "scale": 1.0}}).get_loss_and_metrics(batch(2))[0],
        abs=1e-9,
    )


# --------------------------------------------------------------------------------------------------------- settings


def test_steps_follow_timesteps(tiny_sdxl):
    cfg = tiny_config(tiny_sdxl, sampling={"timesteps": [999, 499], "steps": 2})
    assert (cfg.sampling.steps, cfg.sampling.grid) == (2, "timesteps 999 499")
    assert type(cfg.sampling)(timesteps=[999, 759, 499, 259]).steps == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sampling.timesteps=[999,499,499]"], "each is smaller than the one before"),
        (["sampling.timesteps=[1000]"], "less than 1000"),
        (["sampling.timesteps=[999,499]"], "sampling.steps is 3, and sampling.timesteps names 2 of them: make them"),
        (["sampling.sampler=lcm", "sampling.s_churn=1"], "lcm adds noise of its own: set it to 0"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_in_one_line(tiny_sdxl, settings, words):
    result = draftp("train", "--preset", recipe(tiny_sdxl), *(f"--set={text}" for text in settings))
    assert result.code == 2
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_single_file_cannot_say_that_its_model_predicts_the_picture(folders, tiny_sdxl):
    """One that diffusers writes can; so the run's LoRA merges into a folder."""
    folder = folders("sample")
    once = {"trainer": {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 1}}
    preset = recipe(folder, **once, sampling={"steps": 1, "scale": 1.0}, draftp={"truncation_steps": 1})
    result = draftp("train", "--preset", preset, "--output", "runs/one")
    assert result.code == 0, result.err
    result = draftp("merge-lora", "runs/one", "--format", "single-file")
    assert result.code == 2
    assert "has no mark" in result.err
    assert draftp("merge-lora", "runs/one", "--verify", "keys").code == 0

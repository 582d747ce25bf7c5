"""`draftcli.annealed` makes plain diffusers draw the pictures of `annealed_guidance`, to test_diffusers' tolerance."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLPipeline,
)

import draftcli
from draftcli.core.lora.adapters import LORA_FILE, lora_layers, save_lora
from draftcli.core.weighings import weighing
from draftcli.errors import InputError
from tests.core.test_diffusers import SCALE, STEPS, differs, model_for, same, theirs
from tests.tiny import batch


@pytest.fixture(scope="module")
def tuned(tiny_sdxl, tmp_path_factory):
    """A model, and a pipeline with its LoRA."""
    model = model_for(tiny_sdxl, 0.1)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(model.unet, folder)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder, weight_name=LORA_FILE)
    return model, pipe


@pytest.mark.parametrize("kind", ["base", "tuned", "linear", "power_2", "reverse_step_0.5"])
def test_diffusers_draws_our_annealed_pictures(tuned, kind):
    model, pipe = tuned
    noise = model.initial_noise(batch(2))
    with draftcli.annealed(pipe, kind) as inside:
        pictures = theirs(inside, batch(2), noise)
        again = theirs(inside, batch(2), noise)
    assert torch.equal(pictures, again), "the steps are counted anew for each picture"
    same(model.annealed_guidance(batch(2), noise, weighing(kind)) / 255, pictures)
    assert "forward" not in vars(pipe.unet)
    assert not any(layer.disable_adapters for layer in lora_layers(pipe.unet))


def test_tuned_inside_is_the_pipeline_outside_bit_for_bit(tuned):
    model, pipe = tuned
    noise = model.initial_noise(batch(2))
    outside = theirs(pipe, batch(2), noise)
    with draftcli.annealed(pipe, "tuned"):
        assert torch.equal(theirs(pipe, batch(2), noise), outside)
    with draftcli.annealed(pipe):
        assert differs(theirs(pipe, batch(2), noise), outside)
    assert torch.equal(theirs(pipe, batch(2), noise), outside)


def test_a_seed_is_enough_to_repeat_a_picture_of_the_command(tuned):
    model, pipe = tuned
    with draftcli.annealed(pipe, "linear"):
        generators = [torch.Generator().manual_seed(seed) for seed in batch(2).seeds]
        pictures = theirs(pipe, batch(2), None, generator=generators)
    same(model.annealed_guidance(batch(2), model.initial_noise(batch(2))) / 255, pictures)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("heun", HeunDiscreteScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler), ("ddim", DDIMScheduler)],
)
def test_with_schedulers_of_second_order_too(tiny_sdxl, tuned, sampler, scheduler):
    """Heun's two calls of a step get the same weight, in diffusers as in ours. Leading grids, where all start alike."""
    _, pipe = tuned
    grid = {"schedule": "leading", "sampler": sampler} if sampler == "ddim" else {"sampler": sampler}
    model = model_for(tiny_sdxl, 0.1, sampling=grid)
    before = pipe.scheduler
    options = {"set_alpha_to_one": True, "clip_sample": False} if sampler == "ddim" else {}
    pipe.scheduler = scheduler.from_config(before.config, **options)
    noise = model.initial_noise(batch(2))
    settings = {"timesteps": None, "num_inference_steps": STEPS} if sampler == "ddim" else {}
    try:
        with draftcli.annealed(pipe, "power_2"):
            pictures = theirs(pipe, batch(2), noise, guidance_scale=SCALE, **settings)
    finally:
        pipe.scheduler = before
    same(model.annealed_guidance(batch(2), noise, weighing("power_2")) / 255, pictures, 5e-5)


def test_what_cannot_be_annealed_is_said(tiny_sdxl, tuned):
    _, pipe = tuned
    plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    with pytest.raises(InputError, match="load_lora_weights"), draftcli.annealed(plain, "linear"):
        pass
    with pytest.raises(InputError, match="unknown annealing weight"), draftcli.annealed(pipe, "cubic"):
        pass
    with pytest.raises(InputError, match="must be in"), draftcli.annealed(pipe, lambda *_: 2.0):
        theirs(pipe, batch(1), None)
    pipe.fuse_lora()
    try:
        with pytest.raises(InputError, match="unfuse_lora"), draftcli.annealed(pipe, "linear"):
            pass
    finally:
        pipe.unfuse_lora()
    assert "forward" not in vars(pipe.unet)

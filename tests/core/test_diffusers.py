"""Plain diffusers draws our pictures: its own pipeline of each family, the folder's own noise levels, our step grid.

Tolerance: diffusers keeps its sigmas from a float32 cumulative product, off by up to 1.3e-5 of themselves, and
networks run in float32; measured, a picture in [0, 1] moves by 1e-6. With zero terminal SNR the walk starts at sigma
4096, where a float32 latent has three digits less: 4e-5. We allow ten and five times that. The smallest real mistake
tried here (another grid, no negative prompt, transposed size) moves a picture by more than 1e-2.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

import draftcli
from draftcli.core.batch import Batch
from draftcli.core.lora.adapters import LORA_FILE, save_lora
from tests.tiny import batch, make_sdxl, tiny_model, tiny_sd1

TOLERANCE = 1e-5
TOLERANCE_ZERO_SNR = 2e-4
STEPS = 6
SCALE = 3.0


def load(folder):
    """SD 1.x comes with PNDM, which is a solver of its own, and takes no timesteps."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


pipeline = functools.cache(load)


@pytest.fixture(scope="module")
def folders(tiny_sdxl, tiny_sd, tmp_path_factory):
    """Tiny models as an eps network, a v network, and a v network with zero terminal SNR."""
    root = tmp_path_factory.mktemp("predictions")
    return {
        "eps": tiny_sdxl,
        "v": make_sdxl(root / "v", "v_prediction"),
        "v-zero-snr": make_sdxl(root / "zero", "v_prediction", rescale_betas_zero_snr=True),
        "sd1": tiny_sd,
        "sd1-v-zero-snr": tiny_sd1(root / "sd1-zero", "v_prediction", rescale_betas_zero_snr=True),
        "sd2": tiny_sd1(root / "sd2", "v_prediction", version=2),
    }


def theirs(pipe, prompts: Batch, noise, **settings):
    """The pipeline multiplies latents by init_noise_sigma itself."""
    negatives = None if prompts.negatives[0] is None else list(prompts.negatives)
    height, width = prompts.size
    options = {"timesteps": draftcli.timesteps(STEPS), "guidance_scale": SCALE, **settings}
    return pipe(
        list(prompts.prompts),
        height=height,
        width=width,
        negative_prompt=negatives,
        latents=noise,
        output_type="pt",
        **options,
    ).images


def ours(model, prompts: Batch, noise):
    with torch.no_grad():
        return model.generate(prompts, noise)[0] / 255


def model_for(folder, moved=0.0, **sections):
    sampling = {"steps": STEPS, "scale": SCALE, **sections.pop("sampling", {})}
    return tiny_model(folder, moved, model={"precision": "fp32"}, sampling=sampling, **sections)


def same(a, b, tolerance=TOLERANCE):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def differs(a, b):
    return (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["eps", "v", "v-zero-snr", "sd1", "sd1-v-zero-snr", "sd2"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128)], ids=["square", "wide"])
@pytest.mark.parametrize("negative", [None, "a dull blur"], ids=["no-negative", "negative"])
def test_diffusers_draws_our_picture(folders, kind, size, negative):
    model, pipe = model_for(folders[kind]), pipeline(folders[kind])
    prompts = batch(2, size, [negative] * 2)
    noise = model.initial_noise(prompts)
    picture = ours(model, prompts, noise)
    assert picture.std() > 0.05
    same(picture, theirs(pipe, prompts, noise), TOLERANCE_ZERO_SNR if kind.endswith("zero-snr") else TOLERANCE)


def test_the_comparison_would_see_a_mistake(folders):
    model, pipe = model_for(folders["eps"]), pipeline(folders["eps"])
    wide, noise = batch(1, (64, 128)), model.initial_noise(batch(1, (64, 128)))
    picture = ours(model, wide, noise)
    assert differs(picture, theirs(pipe, wide, noise, original_size=(128, 64), target_size=(128, 64)))
    assert differs(picture, theirs(pipe, wide, noise, guidance_scale=SCALE + 0.5))
    assert differs(picture, theirs(pipe, wide, noise, timesteps=None, num_inference_steps=STEPS))
    assert differs(picture, theirs(pipe, batch(1, (64, 128), ["red"]), noise))
    assert differs(ours(model_for(folders["v"]), wide, noise), ours(model_for(folders["v-zero-snr"]), wide, noise))


@pytest.mark.parametrize(("kind", "steps"), [("eps", 1), ("eps", 4), ("eps", 6), ("eps", 7), ("sd1", 7)])
def test_our_leading_schedule_is_the_pipelines_own_grid(folders, kind, steps):
    """7 does not divide 1000."""
    model = model_for(folders[kind], sampling={"schedule": "leading", "steps": steps}, draftp={"truncation_steps": 1})
    noise = model.initial_noise(batch(2))
    expected = theirs(pipeline(folders[kind]), batch(2), noise, timesteps=None, num_inference_steps=steps)
    same(ours(model, batch(2), noise), expected)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_ddim_with_eta_0_is_our_sampler(folders, kind, spacing):
    """8 divides 1000: there DDIM's trailing grid is ours. Where set_alpha_to_one is false, as SD's own files have it,
    DDIM ends at the lowest noise level, sigma 0.029, instead of at the picture.
    """
    pipe = load(folders[kind])
    pipe.scheduler = DDIMScheduler.from_config(
        {**pipe.scheduler.config, "timestep_spacing": spacing, "set_alpha_to_one": True, "clip_sample": False}
    )
    sampling, steps = {"schedule": spacing, "steps": 8}, {"timesteps": None, "num_inference_steps": 8}
    for sampler in ("euler", "ddim"):
        model = model_for(folders[kind], sampling={**sampling, "sampler": sampler})
        noise = model.initial_noise(batch(2))
        same(ours(model, batch(2), noise), theirs(pipe, batch(2), noise, **steps))
    pipe.scheduler = DDIMScheduler.from_config({**pipe.scheduler.config, "set_alpha_to_one": False})
    apart = (ours(model, batch(2), noise) - theirs(pipe, batch(2), noise, **steps)).abs().max()
    assert 1e-4 < apart < 0.1


def test_our_leading_schedule_with_a_v_network(folders):
    model = model_for(folders["v"], sampling={"schedule": "leading"})
    noise = model.initial_noise(batch(2))
    expected = theirs(pipeline(folders["v"]), batch(2), noise, timesteps=None, num_inference_steps=STEPS)
    same(ours(model, batch(2), noise), expected)


def test_guidance_scale_1_is_the_pipeline_without_guidance(folders):
    model = model_for(folders["eps"], sampling={"scale": 1.0})
    noise = model.initial_noise(batch(2))
    same(ours(model, batch(2), noise), theirs(pipeline(folders["eps"]), batch(2), noise, guidance_scale=1.0))


@pytest.mark.parametrize(("kind", "alpha"), [("eps", None), ("eps", 1.0), ("eps", 6.0), ("sd1", 6.0)])
@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
        ["to_q", "conv1", "conv_shortcut", "time_emb_proj"],
    ],
    ids=["linear", "convolutions"],
)
def test_a_saved_lora_gives_our_picture_in_diffusers(folders, tmp_path, targets, kind, alpha):
    model = model_for(folders[kind], 0.1, peft={"rank": 2, "alpha": alpha, "target_modules": targets})
    noise = model.initial_noise(batch(2))
    assert save_lora(model.unet, tmp_path / "final") == tmp_path / "final" / "pytorch_lora_weights.safetensors"
    pipe = load(folders[kind])
    untuned = theirs(pipe, batch(2), noise)
    pipe.load_lora_weights(tmp_path / "final", weight_name=LORA_FILE)
    tuned = theirs(pipe, batch(2), noise)
    assert differs(tuned, untuned)
    same(ours(model, batch(2), noise), tuned)


LATENTS = {"latents_mean": [-0.8, 0.3, 1.2, -0.1], "latents_std": [1.5, 0.7, 2.0, 1.1]}


@pytest.mark.parametrize("fields", [LATENTS, {"scaling_factor": 0.5}, {**LATENTS, "scaling_factor": 0.5}], ids=str)
def test_a_vae_says_how_its_latents_are_scaled_and_shifted(tiny_sdxl, tmp_path, fields):
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    model, noise = model_for(folder), tiny_model(tiny_sdxl).initial_noise(batch(2))
    picture = ours(model, batch(2), noise)
    same(picture, theirs(pipeline(folder), batch(2), noise))
    assert differs(picture, theirs(pipeline(tiny_sdxl), batch(2), noise))

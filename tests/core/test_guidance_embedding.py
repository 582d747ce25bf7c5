"""A UNet that is told the guidance scale (`time_cond_proj_dim`), as LCM's own: drawn and trained as diffusers' pipeline
does it, and refused where the setting and the UNet do not go together.
"""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from draftcli.core.batch import derived_seed
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.models.guidance_embedding import guidance_embedding
from draftcli.sampling.embedded import read
from tests.command import draftp, recipe
from tests.tiny import batch, prefers_red, tiny_config, told_guidance

LCM = {"timesteps": [999, 759, 499, 259], "steps": 4, "sampler": "lcm", "scale": 1.0}
ONE_STEP = {"trainer": {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "save_interval": 1}}


@pytest.fixture(scope="module")
def told(tiny_sdxl, tmp_path_factory) -> Path:
    return told_guidance(tiny_sdxl, tmp_path_factory.mktemp("told") / "sdxl")


def told_model(folder, scale, **sections):
    cfg = tiny_config(folder, sampling={**LCM, "guidance_embedding": scale}, **sections)
    model = SDXLDRaFTPModel(cfg)
    model.reward_model = prefers_red
    return model


@pytest.mark.parametrize("width", [8, 9, 256])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_embedding_is_that_of_diffusers(width, scale):
    theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), width)[0]
    assert torch.equal(guidance_embedding(scale, width), theirs)


def test_diffusers_own_pipeline(told):
    model, prompts = told_model(told, 8.0, model={"precision": "fp32"}), batch(2)
    noise = model.initial_noise(prompts)
    pipe = StableDiffusionXLPipeline.from_pretrained(told, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)

    def theirs(scale):
        return pipe(
            list(prompts.prompts),
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=scale,
            latents=noise,
            generator=[torch.Generator().manual_seed(derived_seed(seed, "churn")) for seed in prompts.seeds],
            output_type="pt",
        ).images

    ours = model.annealed_images(prompts, noise, lambda *_: 0.0)
    torch.testing.assert_close(ours, theirs(8.0), atol=5e-5, rtol=0)
    assert (ours - theirs(2.0)).abs().max() > 1e-3, "the scale counts"


def test_training_asks_tuned_and_base_with_it_in_one_evaluation(told):
    """The loss against one written by hand with diffusers' UNet; KL included, which is 0 where both are one."""
    model, asked = told_model(told, 8.0, draftp={"truncation_steps": 4, "kl_coeff": 1.0}), []
    model.unet.register_forward_pre_hook(
        lambda module, inputs, named: asked.append((len(inputs[0]), named["timestep_cond"])), with_kwargs=True
    )
    loss, metrics = model.get_loss_and_metrics(batch(2))
    assert {rows for rows, _ in asked} == {2}
    assert all(torch.equal(given, guidance_embedding(8.0, 10).double().expand(2, -1)) for _, given in asked)
    with torch.no_grad():
        by_hand = -prefers_red(model.annealed_images(batch(2), model.initial_noise(batch(2))), batch(2).prompts).mean()
    assert loss == pytest.approx(by_hand.item(), abs=1e-9)
    assert metrics["kl_penalty"] == pytest.approx(0, abs=1e-12)
    assert loss != pytest.approx(told_model(told, 2.0).get_loss_and_metrics(batch(2))[0], abs=1e-6)


def test_train_plan_sample_and_the_card(told):
    """diffusers' word for it is guidance_scale, also where the UNet does it itself; of the LCM scheduler in the model's
    files, which is what is drawn with, no warning comes.
    """
    preset = recipe(told, **ONE_STEP, sampling={**LCM, "guidance_embedding": 8.0}, draftp={"truncation_steps": 4})
    result = draftp("train", "--preset", preset, "--dry-run")
    assert (result.code, result.err) == (0, "")
    result = draftp("train", "--preset", preset, "--output", "run")
    assert (result.code, result.err) == (0, "")
    assert "guidance_scale=8)" in Path("run/final/README.md").read_text()
    result = draftp("sample", "run", "--prompt", "a dog")
    assert (result.code, result.err) == (0, "")
    (picture,) = Path("run/sample").glob("0000*.png")
    assert "CFG scale: 8," in read(picture)
    result = draftp("merge-lora", "run", "--output", "merged", "--verify", "keys")
    assert result.code == 0, result.err
    assert UNet2DConditionModel.load_config("merged", subfolder="unet")["time_cond_proj_dim"] == 10


def test_scale_follows_where_it_is_given_alone(told):
    cfg = tiny_config(told)
    assert type(cfg.sampling)(guidance_embedding=8.0).scale == 1
    assert type(cfg.sampling)(guidance_embedding=8.0).guidance == 8
    assert type(cfg.sampling)().guidance == type(cfg.sampling)().scale


TOLD_BUT_NOT_SET = "time_cond_proj_dim 10), as in LCM; set sampling.guidance_embedding to the scale to generate with"
SET_BUT_NOT_TOLD = "sampling.guidance_embedding is 8, and the UNet of model.pretrained"


@pytest.mark.parametrize(
    ("takes_one", "settings", "words"),
    [
        (True, ["sampling.scale=1"], TOLD_BUT_NOT_SET),
        (False, ["sampling.scale=1", "sampling.guidance_embedding=8"], SET_BUT_NOT_TOLD),
        (True, ["sampling.guidance_embedding=8"], "sampling.scale is 3, and sampling.guidance_embedding has the UNet"),
        (True, ["sampling.guidance_embedding=0.5"], "greater than or equal to 1"),
    ],
    ids=["not set", "not told", "guided twice", "below 1"],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["train", "plan"])
def test_what_does_not_go_together_is_refused_in_one_line(told, tiny_sdxl, takes_one, settings, words, options):
    preset = recipe(told if takes_one else tiny_sdxl, sampling={"sampler": "lcm"})
    result = draftp("train", "--preset", preset, "--quiet", *options, *(f"--set={text}" for text in settings))
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert words in result.err


def test_drawing_with_such_a_model_asks_for_the_setting_too(told):
    result = draftp("sample", "--model", told, "--prompt", "x", "--set", "sampling.sampler=lcm")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert TOLD_BUT_NOT_SET in result.err

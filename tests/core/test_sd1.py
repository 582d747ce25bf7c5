"""Stable Diffusion 1.x and 2.x: the gradient, the text, and how the family is told. Pictures: test_diffusers.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import draftcli
from draftcli.config import ModelConfig, SamplingConfig
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.models.loading import check_unloaded, load_parts
from draftcli.core.models.recognition import family_of
from draftcli.core.models.sd1 import SD1_BASE
from draftcli.core.models.sdxl import SDXL_BASE
from draftcli.errors import InputError
from draftcli.planning.plan import make_plan
from tests.tiny import batch, prefers_red, tiny_config, tiny_model, tiny_sd1, write_single_file

LORA = {"peft": {"rank": 2, "target_modules": ["to_q", "to_v", "ff.net.2", "conv1", "proj_in"]}}
FULL = {"peft": {"peft_scheme": "none"}}


@pytest.fixture(scope="module")
def tiny_sd2(tmp_path_factory):
    return tiny_sd1(tmp_path_factory.mktemp("tiny") / "sd2", "v_prediction", version=2)


def loss_by_hand(model, folder, prompts, k):
    """DRaFT+'s loss on a plain loop of DDIM with eta 0 (Song et al. 2021, equation 12) in its own coordinates, where x
    has unit variance, on noise levels computed here; gradient through the last k steps, against a base of its own.
    """
    cfg, cond, n = model.cfg, model.encode(prompts), model.cfg.sampling.steps
    base = UNet2DConditionModel.from_pretrained(folder / "unet").double()
    alphas_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    steps = draftcli.timesteps(n)
    predicts_v = model.parts.prediction == "v_prediction"

    def eps(unet, x, t):
        out = unet(torch.cat([x, x]), t, encoder_hidden_states=cond.prompt_embeds).sample
        if predicts_v:
            a = alphas_bar[t]
            out = a**0.5 * out + (1 - a) ** 0.5 * torch.cat([x, x])
        without_prompt, with_prompt = out.chunk(2)
        return without_prompt + cfg.sampling.scale * (with_prompt - without_prompt)

    x, penalties = model.initial_noise(prompts).double(), []
    for i, t in enumerate(steps):
        if i == n - k:
            x = x.detach()
        tuned = eps(model.unet, x, t)
        if i >= n - k:
            penalties.append((tuned - eps(base, x, t).detach()).pow(2).mean())
        a, after = alphas_bar[t], alphas_bar[steps[i + 1]] if i + 1 < n else 1.0
        x_0 = (x - (1 - a) ** 0.5 * tuned) / a**0.5
        x = after**0.5 * x_0 + (1 - after) ** 0.5 * tuned
    image = (model.vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    return -prefers_red(image, prompts.prompts).mean() + cfg.draftp.kl_coeff * sum(penalties) / k


@pytest.mark.parametrize(
    ("name", "scheme", "k"),
    [("tiny_sd", LORA, 1), ("tiny_sd", LORA, 4), ("tiny_sd", FULL, 2), ("tiny_sd2", LORA, 2), ("tiny_sd2", FULL, 1)],
    ids=["lora-1", "lora-all", "full-2", "sd2-lora-2", "sd2-full-1"],
)
def test_gradient_is_that_of_a_plain_loop_of_ddim(name, scheme, k, request):
    """Our noise levels are rounded to float32, as the reference's are: 6e-8 of themselves."""
    folder = request.getfixturevalue(name)
    model, prompts = tiny_model(folder, 0.02, **scheme, draftp={"truncation_steps": k}), batch(2)
    loss, _ = model.get_loss_and_metrics(prompts)
    found = torch.cat([p.grad.flatten() for p in model.trainable_parameters])
    model.unet.zero_grad()
    expected = loss_by_hand(model, folder, prompts, k)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.trainable_parameters])
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    assert gradient.norm() > 1e-5
    assert (found - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2"])
def test_text_is_the_pipelines_own_and_no_negative_prompt_is_the_empty_one(name, request):
    folder = request.getfixturevalue(name)
    pipe, fp32 = StableDiffusionPipeline.from_pretrained(folder), {"precision": "fp32"}
    prompts = batch(3, negatives=[None, "dull", ""])
    cond = tiny_model(folder, model=fp32).encode(prompts)
    for row, (prompt, negative) in enumerate(zip(prompts.prompts, [None, "dull", ""], strict=True)):
        sequence, uncond = pipe.encode_prompt(prompt, torch.device("cpu"), 1, True, negative)
        assert torch.equal(cond.conditional.prompt_embeds[row], sequence[0])
        assert torch.equal(cond.unconditional.prompt_embeds[row], uncond[0])
    assert cond.text_embeds is None
    assert cond.time_ids is None
    told = tiny_model(folder, model=fp32, sampling={"negative_prompt": "dull"}).encode(batch(1))
    assert torch.equal(told.unconditional.prompt_embeds[0], cond.unconditional.prompt_embeds[1])


def test_what_is_loaded(tiny_sd, tiny_sd2):
    parts = load_parts(ModelConfig(pretrained=str(tiny_sd)))
    assert list(parts.modules) == ["unet", "vae", "text_encoder"]
    assert (parts.prediction, parts.zeros_for_empty, parts.family.name) == ("epsilon", False, "sd1")
    assert load_parts(ModelConfig(pretrained=str(tiny_sd2))).prediction == "v_prediction"


# ------------------------------------------------------------------------------------------- which family a model is of


def test_the_family_is_told_by_the_models_own_files(tiny_sdxl, tiny_sd, tmp_path):
    """By model_index.json, by the UNet's configuration where there is none, by the keys of a single file."""

    def family(pretrained, **settings):
        return family_of(ModelConfig(pretrained=str(pretrained), **settings)).name

    assert (family(tiny_sdxl), family(tiny_sd), family("toy")) == ("sdxl", "sd1", "sdxl")
    assert (family(SDXL_BASE), family(SD1_BASE), family("somebody/unknown")) == ("sdxl", "sd1", "sdxl")
    for name, folder in (("sdxl", tiny_sdxl), ("sd1", tiny_sd)):
        shutil.copytree(folder / "unet", tmp_path / name / "unet")
        assert family(tmp_path / name) == name
    assert family(write_single_file(tiny_sdxl, tmp_path / "xl.safetensors")) == "sdxl"
    assert family(tiny_sd, family="sdxl") == "sdxl", "what somebody says counts"


def test_the_hubs_cache_tells_the_family(tmp_path, monkeypatch):
    commit = tmp_path / "models--me--mine" / "snapshots" / "1"
    commit.mkdir(parents=True)
    (commit / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    refs = tmp_path / "models--me--mine" / "refs"
    refs.mkdir()
    (refs / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for fetch in (False, True):
        assert family_of(ModelConfig(pretrained="me/mine"), fetch).name == "sd1"


@pytest.mark.parametrize(
    ("file", "fields", "settings", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, {}, ("1 text encoder", "4 channels")),
        ("model_index.json", {"_class_name": "KolorsPipeline"}, {}, ("is a KolorsPipeline", "Stable Diffusion 1")),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, {}, ("so it is Stable Diffusion 3",)),
        ("model_index.json", {}, {"family": "sdxl"}, ("is a StableDiffusionPipeline, not Stable Diffusion XL",)),
        ("unet/config.json", {"in_channels": 9}, {}, ("an inpainting model",)),
        ("unet/config.json", {"time_cond_proj_dim": 8}, {}, ("time_cond_proj_dim", "sampling.guidance_embedding")),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, {}, ("beta_end", "SD 1.x's noise levels")),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, {}, ("'flow'",)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_is_refused(tiny_sd, tmp_path, file, fields, settings, words):
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "copy"))
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    # diffusers stops first at weights that are not those of such a UNet
    looks = [lambda cfg: check_unloaded(cfg, SamplingConfig())]
    for look in looks if file.startswith("unet") else [*looks, load_parts]:
        with pytest.raises(InputError) as error:
            look(ModelConfig(pretrained=str(folder), **settings))
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words), error.value


def test_an_sdxl_that_calls_itself_sd1_is_refused(tiny_sdxl, tmp_path):
    folder = Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline has 'text_time', StableDiffusionPipeline"):
        load_parts(ModelConfig(pretrained=str(folder)))


def test_each_class_takes_its_own_family(tiny_sdxl, tiny_sd):
    for own, folder, other in (
        (draftcli.SDXLDRaFTPModel, tiny_sdxl, tiny_sd),
        (draftcli.SDDRaFTPModel, tiny_sd, tiny_sdxl),
    ):
        model = own(tiny_config(folder))
        image, *_ = model.generate(batch(1), model.initial_noise(batch(1)))
        assert image.shape == (1, 3, 64, 64)
        with pytest.raises(InputError, match=f"{own.__name__} is for the family {own.kind}"):
            own(tiny_config(other))
    assert hasattr(draftcli.SDXLDRaFTPModel, "append_sdxl_size_keys")
    assert not hasattr(draftcli.SDDRaFTPModel, "append_sdxl_size_keys")
    assert issubclass(draftcli.SDDRaFTPModel, DRaFTPModel)


def test_a_plan_counts_it_as_it_is():
    """Weights of the UNet, the text encoder and the decoder of Stable Diffusion 1.5."""
    plan = make_plan(draftcli.load_config("sd15-lora"))
    assert plan.source == "SD 1.x's configuration"
    assert plan.frozen == {"unet": 859_520_964, "vae decoder": 49_490_199, "text encoder": 123_060_480}
    assert make_plan(draftcli.load_config("sd15-full")).trainable == 859_520_964

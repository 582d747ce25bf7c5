"""An SDXL from a diffusers folder, from a single file, or handed over; and what is said where there is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.models.loading import load_parts
from draftcli.core.models.sdxl import SDXL
from draftcli.errors import InputError
from tests.tiny import batch, make_sdxl, tiny_config, tiny_model, write_single_file


@pytest.fixture(scope="module")
def single_file(tiny_sdxl, tmp_path_factory):
    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def copy_of_it(tiny_sdxl, tmp_path):
    return Path(shutil.copytree(tiny_sdxl, tmp_path / "copy"))


def load(pretrained, **settings):
    return load_parts(ModelConfig(pretrained=str(pretrained), **settings))


def refused(pretrained, **settings):
    """The one line that is said."""
    with pytest.raises(InputError) as error:
        load(pretrained, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 900
    return message


def dtypes(module):
    return {p.dtype for p in module.parameters()}


# --------------------------------------------------------------------------------------------------------- what works


def test_a_diffusers_folder(tiny_sdxl):
    parts = load(tiny_sdxl)
    assert list(parts.modules) == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert (parts.prediction, parts.zero_terminal_snr, parts.zeros_for_empty) == ("epsilon", False, True)
    for module in parts.modules.values():
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_a_single_file_is_the_same_model(tiny_sdxl, single_file):
    folder, file = load(tiny_sdxl), load(single_file, config=str(tiny_sdxl))
    for name, module in folder.modules.items():
        expected, found = module.state_dict(), file.modules[name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for ours, theirs in zip(
        SDXL().encode_prompts(file, ["red!", ""]), SDXL().encode_prompts(folder, ["red!", ""]), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_single_file_in_half_precision_is_loaded_in_the_precision_asked_for(tiny_sdxl, single_file, tmp_path):
    save_file({k: v.half() for k, v in load_file(single_file).items()}, tmp_path / "half.safetensors")
    parts = load(tmp_path / "half.safetensors", config=str(tiny_sdxl))
    assert [dtypes(module) for module in parts.modules.values()] == [{torch.float32}] * 4


def test_the_second_tokenizer_pads_with_exclamation_marks(tiny_sdxl):
    first, second = load(tiny_sdxl).tokenizers
    assert second("red", padding="max_length", max_length=77).input_ids[-1] == 0
    assert first("red", padding="max_length", max_length=77).input_ids[-1] == first.eos_token_id


@pytest.mark.parametrize(
    ("settings", "networks", "vae"),
    [
        ({"precision": "fp64"}, torch.float64, torch.float64),
        ({"precision": "fp32"}, torch.float32, torch.float32),
        ({"precision": "bf16"}, torch.bfloat16, torch.float32),
        ({"precision": "fp16"}, torch.float16, torch.float32),
        ({"precision": "fp16", "vae_precision": "bf16"}, torch.float16, torch.bfloat16),
        ({"precision": "bf16", "vae_precision": "bf16"}, torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions_and_the_vae_stays_in_float32_unless_told(tiny_sdxl, single_file, settings, networks, vae):
    expected = {"unet": {networks}, "vae": {vae}, "text_encoder": {networks}, "text_encoder_2": {networks}}
    parts = load(tiny_sdxl, **settings)
    assert {name: dtypes(module) for name, module in parts.modules.items()} == expected
    parts = load(single_file, config=str(tiny_sdxl), **settings)
    assert {name: dtypes(module) for name, module in parts.modules.items()} == expected


@pytest.mark.parametrize(
    ("precision", "unet"), [("fp64", torch.float64), ("bf16", torch.float32), ("fp16", torch.float32)]
)
def test_a_unet_trained_in_full_is_kept_in_float32(tiny_sdxl, precision, unet):
    parts = load_parts(ModelConfig(pretrained=str(tiny_sdxl), precision=precision), trained_in_full=True)
    assert dtypes(parts.unet) == {unet}


def test_a_hollow_unet_has_everything_but_weights(tiny_sdxl, single_file):
    for settings in ({"pretrained": str(tiny_sdxl)}, {"pretrained": str(single_file), "config": str(tiny_sdxl)}):
        cfg = ModelConfig(precision="bf16", **settings)
        parts, hollow = load_parts(cfg), load_parts(cfg, hollow_unet=True)
        assert all(p.is_meta for p in hollow.unet.parameters())
        assert not any(p.is_meta for name in ("vae", "text_encoder") for p in hollow.modules[name].parameters())
        looks = [{k: (t.shape, t.dtype) for k, t in some.unet.state_dict().items()} for some in (parts, hollow)]
        assert looks[0] == looks[1]


def test_the_vae_encoder_is_dropped_and_decoding_still_works(tiny_sdxl):
    model = tiny_model(tiny_sdxl)
    names = {name.split(".")[0] for name, _ in model.vae.named_parameters()}
    assert names == {"decoder", "post_quant_conv"}
    assert model.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float64)).shape == (1, 3, 64, 64)


def test_another_vae(tiny_sdxl, tmp_path):
    other = make_sdxl(tmp_path / "other", seed=1)
    found = load(tiny_sdxl, vae=str(other / "vae")).vae.decoder.conv_in.weight
    assert torch.equal(found, load(other).vae.decoder.conv_in.weight)
    assert not torch.equal(found, load(tiny_sdxl).vae.decoder.conv_in.weight)


def test_another_vae_in_a_single_file_keeps_sdxls_scale(tiny_sdxl, single_file, tmp_path):
    """The layout of sdxl_vae.safetensors: the VAE of a checkpoint, without its prefix."""
    prefix = "first_stage_model."
    tensors = {k.removeprefix(prefix): v for k, v in load_file(single_file).items() if k.startswith(prefix)}
    save_file(tensors, tmp_path / "sdxl_vae.safetensors")
    other = make_sdxl(tmp_path / "other", seed=1)
    for source, settings in [(other, {}), (single_file, {"config": str(tiny_sdxl)})]:
        vae = load(source, vae=str(tmp_path / "sdxl_vae.safetensors"), **settings).vae
        assert vae.config.scaling_factor == 0.13025
        assert torch.equal(vae.decoder.conv_in.weight, load(tiny_sdxl).vae.decoder.conv_in.weight)


def test_prediction_type_comes_from_the_scheduler_unless_told(tiny_sdxl, tmp_path):
    v = make_sdxl(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True)
    assert (load(v).prediction, load(v).zero_terminal_snr) == ("v_prediction", True)
    told = load(v, prediction_type="epsilon", zero_terminal_snr=False)
    assert (told.prediction, told.zero_terminal_snr) == ("epsilon", False)
    assert load(tiny_sdxl, prediction_type="v_prediction").prediction == "v_prediction"
    model = tiny_model(tiny_sdxl, model={"zero_terminal_snr": True})
    assert model.schedule.sigmas[0] == pytest.approx(4096, rel=1e-4)


def test_parts_handed_over_are_used_and_nothing_is_loaded(tiny_sdxl):
    parts = load(tiny_sdxl, precision="fp64")
    model = SDXLDRaFTPModel(tiny_config(Path("/no/such/folder")), parts)
    assert model.unet is parts.unet
    assert model.vae is parts.vae
    image, *_ = model.generate(batch(1), model.initial_noise(batch(1)))
    assert image.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("offload", [True, False])
def test_text_encoders_can_leave_the_device_once_prompts_are_encoded(tiny_sdxl, offload, monkeypatch):
    model = tiny_model(tiny_sdxl, model={"offload_text_encoders": offload})
    moves = []
    for encoder in model.parts.text_encoders:
        monkeypatch.setattr(encoder, "to", moves.append)
    model.encode(batch(1))
    there = [torch.device("cpu")] * 2  # the run's device, here a CPU too; and away from it
    assert moves == there + there * offload


# ------------------------------------------------------------------------------------------------- what is refused


def test_a_single_file_without_configuration_offline(single_file):
    message = refused(single_file)
    assert "set model.config" in message
    assert "stable-diffusion-xl-base-1.0" in message


def test_a_single_file_with_a_configuration_that_is_not_here(single_file, tmp_path):
    assert "model.config" in refused(single_file, config=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "stabilityai/stable-diffusion-xl-base-1.0", "tooy"])
def test_nothing_of_this_name(name):
    message = refused(name)
    assert repr(name) in message
    assert "toy" in message


def test_a_folder_that_is_no_diffusers_folder(tmp_path):
    assert "model_index.json" in refused(tmp_path)


def test_another_kind_of_pipeline(copy_of_it):
    index = copy_of_it / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusionPipeline"))
    message = refused(copy_of_it)
    assert "StableDiffusionPipeline" in message
    assert "StableDiffusionXLPipeline" in message


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"text"', "\x00"])
def test_a_damaged_model_index(copy_of_it, text):
    (copy_of_it / "model_index.json").write_text(text)
    assert str(copy_of_it) in refused(copy_of_it)


@pytest.mark.parametrize("module", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "tensor missing"])
def test_damaged_weights(copy_of_it, module, damage):
    path = next((copy_of_it / module).glob("*.safetensors"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "gone":
        path.unlink()
    else:
        tensors = load_file(path)
        del tensors[sorted(tensors)[3]]
        save_file(tensors, path, {"format": "pt"})
    assert str(copy_of_it) in refused(copy_of_it)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
)
def test_a_damaged_configuration(copy_of_it, file):
    if file == "tokenizer/vocab.json":
        (copy_of_it / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # transformers 4 writes none
    (copy_of_it / file).write_text('{"a": ')
    assert str(copy_of_it) in refused(copy_of_it)


def test_a_damaged_single_file(tiny_sdxl, single_file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single_file.read_bytes()[:5000])
    assert "damaged" in refused(cut, config=str(tiny_sdxl))


@pytest.mark.parametrize(
    "left_out", ["first_stage_model", "conditioner.embedders.0", "conditioner.embedders.1", "model."]
)
def test_a_single_file_without_some_part(tiny_sdxl, single_file, tmp_path, left_out):
    tensors = {k: v for k, v in load_file(single_file).items() if not k.startswith(left_out)}
    save_file(tensors, tmp_path / "part.safetensors")
    assert "part.safetensors" in refused(tmp_path / "part.safetensors", config=str(tiny_sdxl))


@pytest.mark.parametrize(
    "part", ["model.diffusion_model", "first_stage_model.decoder", "conditioner.embedders.0", "conditioner.embedders.1"]
)
def test_a_single_file_with_a_hole(tiny_sdxl, single_file, tmp_path, part):
    tensors = load_file(single_file)
    del tensors[next(k for k in sorted(tensors) if k.startswith(part) and ("norm" in k or "ln_" in k))]
    save_file(tensors, tmp_path / "hole.safetensors")
    assert "hole.safetensors" in refused(tmp_path / "hole.safetensors", config=str(tiny_sdxl))


def test_a_file_of_something_else(tiny_sdxl, tmp_path):
    save_file({"lora_unet.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in refused(tmp_path / "lora.safetensors", config=str(tiny_sdxl))


def test_pickled_checkpoints_are_refused_unread(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert ".safetensors" in refused(tmp_path / "model.ckpt")
    assert not (tmp_path / "hacked").exists()


def test_pickled_weights_in_a_folder_are_refused_unread(copy_of_it):
    path = copy_of_it / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert str(copy_of_it) in refused(copy_of_it)


def test_a_single_file_that_is_not_there(tmp_path):
    assert "no such file" in refused(tmp_path / "gone.safetensors")


def test_a_vae_that_is_not_there(tiny_sdxl, tmp_path):
    assert "model.vae" in refused(tiny_sdxl, vae=str(tmp_path / "gone"))
    assert "model.vae" in refused(tiny_sdxl, vae=str(tmp_path / "gone.safetensors"))


def test_a_prediction_type_that_we_do_not_know(copy_of_it):
    config = copy_of_it / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "flow"}))
    assert "'flow'" in refused(copy_of_it)

"""model.vae: a decoder from elsewhere is taken where it fits, and refused in one line where it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.models.loading import load_parts
from draftcli.errors import InputError
from tests.command import draftp
from tests.tiny import make_sdxl, vae_forms, write_single_file

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model of the same shapes."""
    return make_sdxl(tmp_path_factory.mktemp("other") / "sdxl", seed=1)


def load(pretrained, vae):
    return load_parts(ModelConfig(pretrained=str(pretrained), vae=str(vae)))


def refused(pretrained, vae, *words):
    with pytest.raises(InputError) as error:
        load(pretrained, vae)
    message = str(error.value)
    for word in ("model.vae", *words):
        assert word in message, message
    assert "\n" not in message
    return message


def vae(**settings):
    """A VAE of the tiny model's kind, `settings` apart."""
    blocks = settings.pop("blocks", 4)
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "block_out_channels": (8,) * blocks,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
            "scaling_factor": 0.13025,
            **settings,
        }
    )


def asymmetric():
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    channels = {"down_block_out_channels": (8,), "up_block_out_channels": (8,)}
    return AsymmetricAutoencoderKL(**kinds, **channels, norm_num_groups=4)


def vq():
    return VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159), ["16 latent channels", "has 4"]),
        (lambda: vae(latent_channels=8), ["8 latent channels", "has 4"]),
        (lambda: vae(blocks=3), ["4 pixels of each latent", "own makes 8"]),
        (lambda: vae(blocks=5), ["16 pixels of each latent", "own makes 8"]),
        (lambda: vae(scaling_factor=0.18215), ["scaling_factor is 0.18215", "own is 0.13025"]),
        (AutoencoderTiny, ["AutoencoderTiny", "AutoencoderKL"]),
        (asymmetric, ["AsymmetricAutoencoderKL"]),
        (vq, ["VQModel"]),
    ],
)
def test_vaes_of_other_families_are_refused_by_name(tiny_sdxl, make, words):
    make().save_pretrained("vae")
    refused(tiny_sdxl, "vae", *words)


def test_a_command_says_it_in_one_line(tiny_sdxl):
    AutoencoderTiny().save_pretrained("taesdxl")
    result = draftp("sample", "--model", tiny_sdxl, "--prompt", "x", "--set", "model.vae=./taesdxl", "--output", "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert "model.vae ./taesdxl: its class is AutoencoderTiny" in result.err


@pytest.mark.parametrize("lost", ["decoder.up_blocks.3", "decoder.conv_in", "post_quant_conv"])
def test_tensors_that_are_missing_are_counted(tiny_sdxl, other, lost):
    folder = Path(shutil.copytree(other / "vae", "vae"))
    tensors = load_file(folder / FILE)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}
    save_file(kept, folder / FILE, {"format": "pt"})
    missing = len(tensors) - len(kept)
    refused(tiny_sdxl, folder, f"{missing} tensors of vae are missing")
    refused(tiny_sdxl, folder / FILE, f"{missing} of its tensors are missing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffusion_pytorch_model.fp16.safetensors", ["variant fp16", "model.vae=", "fp16.safetensors"]),
        ("diffusion_pytorch_model.bin", ["can run code", "convert"]),
        ("vae.safetensors", ["only vae.safetensors"]),
    ],
)
def test_weights_under_another_name(tiny_sdxl, other, name, words):
    folder = Path(shutil.copytree(other / "vae", "vae"))
    (folder / FILE).rename(folder / name)
    refused(tiny_sdxl, folder, *words)


def test_what_is_said_of_a_variant_works(tiny_sdxl, other):
    folder = Path(shutil.copytree(other / "vae", "vae"))
    (folder / FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    said = refused(tiny_sdxl, folder).partition("set model.vae=")[2]
    assert same_decoder(load(tiny_sdxl, said), other)


def same_decoder(parts, model):
    meant, found = load_file(model / "vae" / FILE), parts.vae.state_dict()
    return found.keys() <= meant.keys() and all(torch.equal(tensor, meant[key]) for key, tensor in found.items())


@pytest.mark.parametrize("form", ["folder", "model", "diffusers' file", "original file", "in a checkpoint"])
def test_every_form_of_the_same_vae(tiny_sdxl, other, form):
    checkpoint = write_single_file(other, Path("whole.safetensors"))
    source = vae_forms(other, checkpoint, Path("sdxl_vae.safetensors"))[form]
    assert same_decoder(load(tiny_sdxl, source), other)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"1.weight": torch.zeros(64, 4, 3, 3)}, ["not an AutoencoderKL", "TAESD"]),
        ({"decoder.layers.0.weight": torch.zeros(64, 4, 3, 3)}, ["not an AutoencoderKL", "TAESD"]),
        ({"lora_unet.alpha": torch.zeros(1)}, ["not an AutoencoderKL"]),
    ],
)
def test_files_of_something_else(tiny_sdxl, tensors, words):
    save_file(tensors, "file.safetensors")
    refused(tiny_sdxl, "file.safetensors", *words)


def test_a_file_of_a_vae_with_other_latents(tiny_sdxl):
    vae(latent_channels=16).save_pretrained("flux")
    refused(tiny_sdxl, f"flux/{FILE}", "16 latent channels", "has 4")
    vae(block_out_channels=(8, 8, 8, 16)).save_pretrained("wide")
    refused(tiny_sdxl, f"wide/{FILE}", "the model's own VAE has")


def test_files_that_cannot_be_read(tiny_sdxl):
    Path("cut.safetensors").write_bytes(b"\x10\x00")
    refused(tiny_sdxl, "cut.safetensors", "cannot be read")
    refused(tiny_sdxl, "./nowhere", "no such folder")
    refused(tiny_sdxl, "nobody/nothing", "cannot be loaded")


def test_a_models_own_vae_must_fit_too(tiny_sdxl):
    model = Path(shutil.copytree(tiny_sdxl, "model"))
    shutil.rmtree(model / "vae")
    AutoencoderTiny().save_pretrained(model / "vae")
    index = json.loads((model / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="the VAE of model: its class is AutoencoderTiny"):
        load_parts(ModelConfig(pretrained="model"))
    assert same_decoder(load(model, tiny_sdxl / "vae"), tiny_sdxl)
    vae(latent_channels=16).save_pretrained(model / "vae")
    (model / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(InputError, match="the VAE of model: it has 16 latent channels where the UNet has 4"):
        load_parts(ModelConfig(pretrained="model"))

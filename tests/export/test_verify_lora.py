"""A LoRA's file is checked against what was meant to the last bit, or to the rounding of the dtype it is written in."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import find_family
from draftcli.errors import DraftpError
from draftcli.export.base import open_base
from draftcli.export.kohya import kohya_tensors
from draftcli.export.verify import check_lora
from draftcli.export.write import diffusers_tensors, write_lora, written_as
from tests.core.test_lora_files import ask
from tests.core.test_lora_reading import ALPHAS, tensors_in, with_adapter
from tests.export.merging import merge, pipeline, refused

DTYPES = {"its own": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def shapes(tiny_sdxl):
    return open_base(str(tiny_sdxl)).shapes()


@pytest.fixture
def lora(shapes, tmp_path):
    save_file(tensors_in("kohya", ALPHAS["several"], shapes), tmp_path / "in.safetensors")
    return read_lora(tmp_path / "in.safetensors", shapes).scaled(0.7)


@pytest.fixture(params=["lora", "kohya"])
def written(request, lora, shapes, tmp_path):
    def write(dtype):
        tensors = (
            diffusers_tensors(lora) if request.param == "lora" else kohya_tensors(lora, shapes["unet"], find_family())
        )
        write_lora(tensors, tmp_path / "out.safetensors", dtype, {"format": "pt"})
        return tmp_path / "out.safetensors"

    return write


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_was_written_is_what_was_meant(written, lora, shapes, dtype):
    assert f"{sum(1 for _ in lora.updates())} layers" in check_lora(written(dtype), written_as(lora, dtype), shapes)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("side", ["A or down", "B or up", "missing", "dtype"])
def test_the_smallest_damage_is_noticed(written, lora, shapes, dtype, side):
    path = written(dtype)
    tensors = load_file(path)
    key = min(k for k in tensors if ("lora_A" in k or "lora_down" in k) == (side != "B or up") and "alpha" not in k)
    steps = 1 if side == "A or down" else 4  # a rounding of B is allowed where the scale is in an alpha
    if side == "missing":
        del tensors[key], tensors[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")]
        tensors.pop(key.replace("lora_down.weight", "alpha"), None)
    elif side == "dtype":
        tensors[key] = tensors[key].double()
    else:
        size = tensors[key].abs().argmax()
        tensors[key].view(-1)[size] *= 1 + steps * torch.finfo(tensors[key].dtype).eps
    save_file(tensors, path)
    with pytest.raises(DraftpError, match="not as meant"):
        check_lora(path, written_as(lora, dtype), shapes)


def test_another_alpha_is_noticed(lora, shapes, tmp_path):
    path = tmp_path / "out.safetensors"
    for factor in (1.01, 0.999, -1.0):
        tensors = kohya_tensors(lora, shapes["unet"], find_family())
        key = min(k for k in tensors if k.endswith(".alpha"))
        write_lora(tensors | {key: tensors[key] * factor}, path, torch.float32, {"format": "pt"})
        with safe_open(path, "pt") as file:
            assert key in file.keys()  # noqa: SIM118
        with pytest.raises(DraftpError, match="not as meant"):
            check_lora(path, written_as(lora, torch.float32), shapes)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # peft's guess when it meets a bias
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["to_out.0"]}])
def test_dora_and_biases_are_merged_into_models_and_not_written_as_loras(tiny_sdxl, settings):
    pipe = pipeline(tiny_sdxl)
    with_adapter(pipe.unet, **settings).save_lora_adapter("in")
    changed = sum(".lora_B." in key for key in load_file("in/pytorch_lora_weights.safetensors"))  # weights and biases
    out = merge("in", "--base", tiny_sdxl, "--output", "merged").out
    assert f"{changed} of them changed" in out
    theirs = pipeline(tiny_sdxl).unet
    theirs.load_lora_adapter("in", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    torch.testing.assert_close(ask(pipeline(Path("merged")).unet), ask(theirs), rtol=0, atol=1e-5)
    refused(
        "in", "--base", tiny_sdxl, "--format", "lora", "--output", "x", words=["bias or a DoRA magnitude", "--format"]
    )


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")
def test_biases_and_magnitudes_of_some_layers_only(tiny_sdxl):
    """peft gives every layer one then; those that the file lacks count for nothing."""
    for settings, what in (
        ({"lora_bias": True, "target_modules": ["to_out.0"]}, ".bias"),
        ({"use_dora": True}, "itude"),
    ):
        with_adapter(pipeline(tiny_sdxl).unet, **settings).save_lora_adapter("in")
        tensors = load_file("in/pytorch_lora_weights.safetensors")
        some = {key: t for key, t in tensors.items() if what not in key or "mid_block" in key}
        save_file({f"unet.{key}": t for key, t in some.items()}, "in.safetensors")
        out = merge("in.safetensors", "--base", tiny_sdxl, "--output", "merged", "--verify", "keys", "--overwrite").out
        layers = sum(".lora_A." in key for key in some)
        assert f"reading: {layers} of {layers} layers" in out


def test_a_bias_for_a_layer_without_one_is_refused_before_anything_is_written(tiny_sdxl):
    with_adapter(pipeline(tiny_sdxl).unet, target_modules=["to_q"]).save_lora_adapter("in")
    tensors = load_file("in/pytorch_lora_weights.safetensors")
    extra = {k.replace("lora_B.weight", "lora_B.bias"): t[:, 0].clone() for k, t in tensors.items() if "lora_B" in k}
    save_file(tensors | extra, "in.safetensors")
    refused("in.safetensors", "--base", tiny_sdxl, "--output", "x", words=["have none", "draftp sample --lora"])
    assert not Path("x").exists()

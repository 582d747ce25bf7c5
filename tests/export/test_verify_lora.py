"""A LoRA's file is checked against what was meant to the last bit, or to the rounding of the dtype it is written in."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.lora.reading import read_lora
from draftcli.errors import DraftpError
from draftcli.export.base import open_base
from draftcli.export.verify import check_lora
from draftcli.export.write import diffusers_tensors, kohya_tensors, write_lora, written_as
from tests.core.test_lora_reading import ALPHAS, tensors_in

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
        tensors = diffusers_tensors(lora) if request.param == "lora" else kohya_tensors(lora, shapes["unet"])
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
        tensors = kohya_tensors(lora, shapes["unet"])
        key = min(k for k in tensors if k.endswith(".alpha"))
        write_lora(tensors | {key: tensors[key] * factor}, path, torch.float32, {"format": "pt"})
        with safe_open(path, "pt") as file:
            assert key in file.keys()  # noqa: SIM118
        with pytest.raises(DraftpError, match="not as meant"):
            check_lora(path, written_as(lora, torch.float32), shapes)

"""SSD-1B and Vega are SDXL with layers left out: other depths in each block, and no attention in the middle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from draftcli.config import ModelConfig
from draftcli.core.models.loading import load_parts
from draftcli.export.arguments import FORMAT_NAMES
from tests.command import draftp, recipe

# Layers of the transformers going down, and going up, as their configurations have them.
DEPTHS = {
    "SSD-1B": ([1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]),
    "Vega": ([1, [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1], 1]),
}


def with_depths(folder: Path, down: list, up: list) -> Path:
    """A copy of a tiny SDXL with a UNet of three blocks of these depths."""
    copy = Path(shutil.copytree(folder, "model"))
    config = json.loads((copy / "unet" / "config.json").read_text())
    config |= {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "block_out_channels": [16, 16, 16],
        "attention_head_dim": [2, 2, 2],
        "layers_per_block": 2,
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": up,
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    return copy


@pytest.mark.parametrize("name", DEPTHS)
def test_it_is_trained_merged_in_every_format_and_read_as_a_single_file(tiny_sdxl, name):
    model = with_depths(tiny_sdxl, *DEPTHS[name])
    preset = recipe(model, trainer={"max_steps": 1, "save_interval": 1}, sampling={"steps": 2})
    result = draftp("train", "--preset", preset, "--output", "run", "--quiet")
    assert result.code == 0, result.err
    for kind in FORMAT_NAMES:
        output = "folder" if kind == "diffusers" else f"{kind}.safetensors"
        merged = draftp("merge-lora", "run", "--format", kind, "--output", output)
        assert merged.code == 0, merged.err
        assert "unet: loaded again it differs" in merged.out
    names = {key.removesuffix(".lora_up.weight") for key in load_file("kohya.safetensors")}
    deepest = len(DEPTHS[name][1][0]) - 1, DEPTHS[name][1][0][-1] - 1
    assert "lora_unet_output_blocks_{}_1_transformer_blocks_{}_attn1_to_q".format(*deepest) in names
    assert not any("middle_block_1" in name for name in names), "there is no attention in the middle"
    file = load_parts(ModelConfig(pretrained="single-file.safetensors", config=str(model)))
    folder = load_parts(ModelConfig(pretrained="folder"))
    expected, found = folder.unet.state_dict(), file.unet.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)

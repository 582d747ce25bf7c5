"""`draftp merge-lora` by its command line, and what plain diffusers makes of its results."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.models.weight_files import clean_key
from tests.command import draftp

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def merge(*arguments, code=0):
    result = draftp("merge-lora", *arguments)
    assert result.code == code, result.out + result.err
    if code:
        assert code == 130 or result.err.count("\n") == 1, "one line"
        assert not list(Path.cwd().rglob("*.partial")), "nothing half done is left"
    return result


def refused(*arguments, words, code=2):
    message = merge(*arguments, code=code).err
    for word in words:
        assert word in message
    return message


def pipeline(path, config=None):
    if path.is_dir():
        return StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False)
    return StableDiffusionXLPipeline.from_single_file(str(path), config=str(config), add_watermarker=False)


def tuned_unet(base, lora_folder, scale=1.0):
    """As plain diffusers has it."""
    pipe = pipeline(base)
    pipe.load_lora_weights(lora_folder, weight_name=LORA_FILE)
    pipe.unet.set_adapters(pipe.unet.active_adapters(), scale)
    return pipe.unet


def weights(path):
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    tensors = [(file.parent.name, key, tensor) for file in files for key, tensor in load_file(file).items()]
    return {f"{part}/{clean_key(part, key)}": tensor for part, key, tensor in tensors}


def equal(one, two):
    return one.dtype == two.dtype and torch.equal(one, two)


def report(path):
    return json.loads((path / "draftp-merge.json" if path.is_dir() else path.with_suffix(".merge.json")).read_text())

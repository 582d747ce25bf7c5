"""How many tokens of a text are read: what the tokenizer says, but no more than its text encoder has places for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.models.family import tokenize
from draftcli.core.models.loading import load_parts
from draftcli.core.models.sdxl import SDXL
from draftcli.errors import InputError
from tests.command import draftp

TEXTS = ["a red circle", "", "two blue squares " * 40]


def with_settings(model, changes, tokenizers=("tokenizer", "tokenizer_2")):
    """A copy of a model whose tokenizers' settings are changed; None takes one out."""
    copy = Path(shutil.copytree(model, "copy"))
    for name in tokenizers:
        path = copy / name / "tokenizer_config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value != "out"}))
    return copy


def load(model):
    return load_parts(ModelConfig(pretrained=str(model), device="cpu"))


@pytest.mark.parametrize("length", ["out", None, 10**30, 248, 512, 77])
def test_no_text_is_longer_than_its_encoder_reads(tiny_sdxl, length):
    model = with_settings(tiny_sdxl, {"model_max_length": length})
    found, meant = load(model), load(tiny_sdxl)
    assert [ids.shape for ids in tokenize(found, TEXTS)] == [(3, 77)] * 2
    for ours, theirs in zip(SDXL().encode_prompts(found, TEXTS), SDXL().encode_prompts(meant, TEXTS), strict=True):
        assert torch.equal(ours, theirs)


def test_one_tokenizer_alone_may_lack_it(tiny_sdxl):
    found = load(with_settings(tiny_sdxl, {"model_max_length": "out"}, ["tokenizer_2"]))
    assert [ids.shape for ids in tokenize(found, TEXTS)] == [(3, 77)] * 2


def test_a_shorter_length_counts(tiny_sdxl):
    found = load(with_settings(tiny_sdxl, {"model_max_length": 20}))
    assert [ids.shape for ids in tokenize(found, TEXTS)] == [(3, 20)] * 2


def test_pictures_are_the_same_without_the_setting(tiny_sdxl):
    model = with_settings(tiny_sdxl, {"model_max_length": "out"})
    for name, source in [("ours", model), ("theirs", tiny_sdxl)]:
        size = ("--set", "sampling.height=64", "--set", "sampling.width=64")
        result = draftp("sample", "--model", source, "--prompt", TEXTS[2], "--steps", 1, *size, "--output", name)
        assert result.code == 0, result.err
    ours, theirs = (Image.open(next(Path(name).glob("0000-*.png"))) for name in ("ours", "theirs"))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    ("changes", "tokenizers", "words"),
    [
        ({"model_max_length": 20}, ["tokenizer"], ["20 and 77 tokens", "model_max_length"]),
        ({"model_max_length": 50}, ["tokenizer_2"], ["77 and 50 tokens", "model_max_length"]),
        ({"pad_token": None}, ["tokenizer"], ["tokenizer 1", "pad_token"]),
        ({"pad_token": None}, ["tokenizer_2"], ["tokenizer 2", "pad_token"]),
    ],
)
def test_tokenizers_that_cannot_be_used(tiny_sdxl, changes, tokenizers, words):
    model = with_settings(tiny_sdxl, changes, tokenizers)
    with pytest.raises(InputError) as error:
        load(model)
    assert all(word in str(error.value) for word in (*words, "copy"))
    assert "\n" not in str(error.value)


def test_another_models_tokenizer_is_refused(tiny_sdxl):
    model = Path(shutil.copytree(tiny_sdxl, "copy"))
    path, weights = model / "text_encoder" / "config.json", model / "text_encoder" / "model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    embedding = next(key for key in tensors if key.endswith("token_embedding.weight"))
    save_file({**tensors, embedding: tensors[embedding][:-1].clone()}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"tokenizer 1 of copy .*do not belong together"):
        load(model)

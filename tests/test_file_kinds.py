"""What failed downloads and copies leave is called what it is, wherever a file is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from draftcli.config import ModelConfig
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.loading import load_parts
from draftcli.errors import InputError
from draftcli.export.base import open_base
from draftcli.file_kinds import what_it_is
from draftcli.prompts import read_prompts
from draftcli.rewards.checkpoints import read_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 10265688\n"
WHOLE = save({"a": torch.zeros(100)})
INSTEAD = {
    "pointer": (POINTER, "git-lfs pointer"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Sign in</title></html>", "web page"),
    "answer": (b'{"error": "Unauthorized"}', "answer in JSON"),
    "empty": (b"", "it is empty"),
    "zeros": (bytes(5000), "begins with zeros"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(99), "GGUF"),
    "pickle": (b"PK\3\4" + bytes(99), "pickled or zipped"),
    "cut in its header": (WHOLE[:20], "cut short at 20 bytes"),
    "cut in its tensors": (WHOLE[:-1], f"cut short at {len(WHOLE) - 1} bytes"),
}


def read_model(content: bytes, model: Path) -> None:
    shutil.copytree(model, "model")
    Path("model/unet/diffusion_pytorch_model.safetensors").write_bytes(content)
    load_parts(ModelConfig(pretrained="model"))


def read_single_file(content: bytes, model: Path) -> None:
    Path("x.safetensors").write_bytes(content)
    load_parts(ModelConfig(pretrained="x.safetensors", config=str(model)))


def read_vae(content: bytes, model: Path) -> None:
    Path("x.safetensors").write_bytes(content)
    load_parts(ModelConfig(pretrained=str(model), vae="x.safetensors"))


def read_base(content: bytes, model: Path) -> None:
    Path("x.safetensors").write_bytes(content)
    open_base("x.safetensors", str(model))


def read_one_lora(content: bytes, model: Path) -> None:
    Path("x.safetensors").write_bytes(content)
    read_lora(Path("x.safetensors"), {})


def read_reward(content: bytes, model: Path) -> None:
    Path("x.safetensors").write_bytes(content)
    read_checkpoint("aesthetic", Path("x.safetensors"))


@pytest.mark.parametrize(("content", "words"), INSTEAD.values(), ids=INSTEAD)
@pytest.mark.parametrize("read", [read_model, read_single_file, read_vae, read_base, read_one_lora, read_reward])
def test_what_came_in_place_of_weights(tiny_sdxl, read, content, words):
    with pytest.raises(InputError) as error:
        read(content, tiny_sdxl)
    message = str(error.value)
    assert words in message
    assert ".safetensors" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "file", ["tokenizer/tokenizer_config.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("instead", ["pointer", "page", "zeros"])
def test_what_came_in_place_of_configuration(tiny_sdxl, file, instead):
    shutil.copytree(tiny_sdxl, "model")
    content, words = INSTEAD[instead]
    Path("model", file).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load_parts(ModelConfig(pretrained="model"))
    assert file in str(error.value)


@pytest.mark.parametrize("instead", ["pointer", "page"])
@pytest.mark.parametrize("source", ["x.txt", "folder", "x.jsonl"])
def test_what_came_in_place_of_prompts(source, instead):
    content, words = INSTEAD[instead]
    file = Path(source, "x.txt") if source == "folder" else Path(source)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    with pytest.raises(InputError, match="not valid JSON" if source == "x.jsonl" else words):
        read_prompts(source)


def test_whole_files_and_prompts_are_nothing_else():
    for name, content in {
        "x.safetensors": WHOLE,
        "x.json": b"{}",
        "none.safetensors": save({}),
        "odd.safetensors": (20).to_bytes(8, "little") + json.dumps({"a": 1}).encode().ljust(20),
    }.items():
        Path(name).write_bytes(content)
        assert what_it_is(Path(name)) is None
    Path("x.txt").write_text("{a|b} fox\nversion of a fox\n<3\n")
    assert [prompt.text for prompt in read_prompts("x.txt")] == ["{a|b} fox", "version of a fox", "<3"]

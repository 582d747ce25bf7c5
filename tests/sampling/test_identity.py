"""The one hash of a picture: every setting of `model` and `sampling` moves it, or cannot change a picture."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig, SamplingConfig
from draftcli.prompts import Prompt
from draftcli.sampling.draw import Column, plan
from draftcli.sampling.identity import HARMLESS, RESOLVED, Provenance
from draftcli.sampling.load import load_source
from draftcli.sampling.source import find_source
from tests.command import WITH_VALIDATION, draftp, recipe
from tests.tiny import make_sdxl, one_layer_lora, tiny_sd1, told_guidance, write_single_file

SECTIONS = {"model": ModelConfig, "sampling": SamplingConfig}
FIELDS = [f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields]
BASE = {
    "model.device": "cpu",
    "sampling.height": 64,
    "sampling.width": 64,
    "sampling.steps": 3,
    "sampling.scale": 3.0,
}


Files = tuple[dict[str, Any], dict[str, Any]]  # settings before and after, by dotted key


def copied(model: Path) -> Path:
    return Path(shutil.copytree(model, "copy"))


def with_variant(model: Path) -> Path:
    """A folder in which the files of the variant `other` hold other weights."""
    folder = copied(model)
    for file in folder.rglob("*.safetensors"):
        tensors = {name: 1.01 * t if t.is_floating_point() else t for name, t in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.other.safetensors"), {"format": "pt"})
    return folder


def reconfigured(model: Path, file: str, **changes: object) -> Path:
    """A copy whose configuration `file` says something else of the same weights."""
    folder = copied(model)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))
    return folder


def single_file(model: Path) -> Files:
    """A single file, with the folder's configuration and with another."""
    single = {"model.pretrained": str(write_single_file(model, Path("one.safetensors"))), "model.config": str(model)}
    return single, {**single, "model.config": str(reconfigured(model, "vae/config.json", scaling_factor=0.2))}


def variant(model: Path) -> Files:
    """A folder, and its variant."""
    folder = {"model.pretrained": str(with_variant(model))}
    return folder, {**folder, "model.variant": "other"}


def with_lora(model: Path) -> Files:
    """A folder, and the same with a LoRA merged into it."""
    return {}, {"model.loras": [f"{one_layer_lora(Path('lora.safetensors'))}=0.5"]}


def with_guidance_embedding(model: Path) -> Files:
    """A UNet that is told one guidance scale, and another."""
    told = {"model.pretrained": str(told_guidance(model, Path("told"))), "sampling.scale": 1.0}
    told |= {"sampling.sampler": "lcm", "sampling.guidance_embedding": 2.0}
    return told, {**told, "sampling.guidance_embedding": 8.0}


# By field, another value than the default's.
OTHER: dict[str, Any] = {
    "model.precision": "fp64",
    "model.quantize": "8bit",
    "model.vae_precision": "fp64",
    "model.vae_tile": 64,
    "model.prediction_type": "v_prediction",
    "model.zero_terminal_snr": True,
    "model.device": "auto",
    "model.offload_text_encoders": True,
    "sampling.height": 128,
    "sampling.width": 128,
    "sampling.steps": 4,
    "sampling.scale": 2.0,
    "sampling.sampler": "heun",
    "sampling.schedule": "leading",
    "sampling.timesteps": [999, 400, 20],
    "sampling.s_churn": 0.5,
    "sampling.guidance_interval": (0.2, 0.8),
    "sampling.negative_prompt": "dull",
    "sampling.sizes": [(64, 64), (128, 64)],
}


# By field that names files: what it takes to have other ones.
OTHER_FILES: dict[str, Callable[[Path], Files]] = {
    "model.pretrained": lambda model: ({}, {"model.pretrained": str(make_sdxl(Path("other"), seed=1))}),
    "model.config": single_file,
    "model.family": lambda model: ({}, {"model.pretrained": str(tiny_sd1(Path("other"))), "model.family": "sd1"}),
    "model.vae": lambda model: ({}, {"model.vae": str(make_sdxl(Path("other"), seed=1) / "vae")}),
    "model.variant": variant,
    "model.loras": with_lora,
    "sampling.guidance_embedding": with_guidance_embedding,
}


def key(model: Path, settings: dict[str, Any]) -> str:
    """The hash of a picture of the base, as the commands work it out."""
    values = {"model.precision": "fp32", **BASE, **settings}
    loaded = load_source(find_source(None, str(values.pop("model.pretrained", model)), (), (), values))
    sampling = loaded.cfg.sampling
    (picture,) = plan([Prompt("a red dog")], 1, 7, (sampling.height, sampling.width))
    return Provenance(loaded).key(picture, Column.of("base"))


@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_moves_the_hash_or_cannot_change_a_picture(tiny_sdxl, monkeypatch, field):
    if field == "model.quantize":
        pytest.importorskip("bitsandbytes", reason="an optional extra")
    assert field in {**OTHER, **OTHER_FILES}, f"{field} is new: give it another value in OTHER"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # model.device auto: another device rounds otherwise
    before, after = OTHER_FILES[field](tiny_sdxl) if field in OTHER_FILES else ({}, {field: OTHER[field]})
    moves = key(tiny_sdxl, before) != key(tiny_sdxl, after)
    assert moves is (field not in HARMLESS), f"{field}: HARMLESS is for what cannot change a picture, and only for that"


def test_what_is_left_out_is_a_setting_with_a_reason():
    assert {*HARMLESS, *RESOLVED} <= {*FIELDS}
    assert not {*HARMLESS} & {*RESOLVED}
    assert all({**HARMLESS, **RESOLVED}.values())


@pytest.mark.parametrize(
    "same",
    [
        {"model.prediction_type": "epsilon"},
        {"model.zero_terminal_snr": False},
        {"model.family": "sdxl"},
        {"model.vae_precision": "fp32"},
        {"model.pretrained": "copy"},
        {"model.vae": "copy/vae"},
    ],
    ids=lambda same: next(iter(same)),
)
def test_the_same_said_in_other_words_has_the_same_hash(tiny_sdxl, same):
    copied(tiny_sdxl)
    assert key(tiny_sdxl, same) == key(tiny_sdxl, {})


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("vae/config.json", {"scaling_factor": 0.2}),
        ("unet/config.json", {"attention_head_dim": [4, 4]}),
        ("text_encoder/config.json", {"num_attention_heads": 2}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
        ("model_index.json", {"force_zeros_for_empty_prompt": False}),
    ],
)
def test_the_same_weights_with_another_configuration_are_another_model(tiny_sdxl, file, changes):
    assert key(reconfigured(tiny_sdxl, file, **changes), {}) != key(tiny_sdxl, {})


def test_another_tokenizer_is_another_model(tiny_sdxl):
    folder = copied(tiny_sdxl)
    for name in ("tokenizer", "tokenizer_2"):  # no merge of "r" and "e" any more
        for file in (folder / name).glob("tokenizer.json"):
            words = json.loads(file.read_text())
            words["model"]["merges"] = words["model"]["merges"][2:]
            file.write_text(json.dumps(words))
        for file in (folder / name).glob("merges.txt"):
            lines = file.read_text().splitlines()
            file.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    assert key(folder, {}) != key(tiny_sdxl, {})


def test_prompt_seed_size_and_column_move_the_hash(lora_run):
    model = load_source(find_source(str(lora_run), None, ()))
    provenance = Provenance(model)
    (picture,) = plan([Prompt("a red dog")], 1, 7, (64, 64))
    pictures = [
        picture,
        dataclasses.replace(picture, seed=8),
        dataclasses.replace(picture, size=(64, 72)),
        dataclasses.replace(picture, prompt=Prompt("a red cat")),
        dataclasses.replace(picture, prompt=Prompt("a red dog", negative="dull")),
    ]
    columns = [Column.of(kind) for kind in ("base", "linear", "tuned")]
    columns += [Column.of("linear", stochastic=True), Column.scaled(0.5)]
    keys = {provenance.key(p, c) for p in pictures for c in columns}
    assert len(keys) == len(pictures) * len(columns)
    assert provenance.key(picture, Column.of("constant_0")) == provenance.key(picture, Column.of("base"))
    assert provenance.key(picture, Column.of("tuned", stochastic=True)) == provenance.key(picture, Column.of("tuned"))


def run(*arguments: object) -> None:
    result = draftp(*arguments)
    assert result.code == 0, result.err


def drawn(folder: str) -> np.ndarray:
    """The picture drawn last."""
    path = max(Path(folder).glob("*-tuned*.png"), key=lambda file: file.stat().st_mtime_ns)
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("setting", ["sampling.guidance_interval=[0.4,1]", "model.vae_tile=64"])
def test_a_picture_of_other_settings_is_not_handed_over(lora_run, setting):
    """The first version kept the old picture in the folder."""
    size = ("--height", 128, "--width", 128)
    command = ("sample", lora_run, "--prompt", "a red dog", *size)
    run(*command, "--output", "out")
    before = drawn("out")
    run(*command, "--set", setting, "--output", "out")
    run(*command, "--set", setting, "--output", "fresh")
    assert not np.array_equal(drawn("out"), before)
    assert np.array_equal(drawn("out"), drawn("fresh"))


def test_validation_keeps_the_base_by_the_same_hash(tiny_sdxl):
    """A resumed run keeps the base's pictures, and does not go on with other weights under the same name."""
    model = copied(tiny_sdxl)
    preset = recipe(model, data=WITH_VALIDATION, trainer={"max_steps": 1, "val_check_interval": 1})
    base = Path("run/samples/base.safetensors")

    def go_on(steps: int) -> float:
        run("train", "--preset", preset, "--output", "run", "--set", f"trainer.max_steps={steps}")
        return base.stat().st_mtime_ns

    first = go_on(1)
    assert go_on(2) == first
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 0.1
    save_file(tensors, file, {"format": "pt"})
    refused = draftp("train", "--preset", preset, "--output", "run", "--set", "trainer.max_steps=3")
    assert refused.code == 2
    assert "vae/diffusion_pytorch_model.safetensors is another" in refused.err

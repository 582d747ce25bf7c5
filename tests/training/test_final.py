"""final/: what most people use next lies in it, and opens in the programs that it is for."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import draftcli
from draftcli.core.lora.reading import find_lora
from tests.command import draftp, recipe
from tests.core.test_lora_files import TAKES_ALL_OF_KOHYA, ask

LORA = "pytorch_lora_weights.safetensors"
# What peft 0.17 knows; each later release knows more, and refuses none of these.
KNOWN_TO_ALL = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"} | {
    "bias",
    "use_rslora",
    "use_dora",
}


def train(model: Path, output: str = "runs/mine", **sections):
    sections = {"trainer": {"max_steps": 2, "save_interval": 1, "val_check_interval": 0}, **sections}
    result = draftp("train", "--preset", recipe(model, **sections), "--output", output)
    assert result.code == 0, result.err
    return result


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def unet_with(model: Path, folder: Path, weight_name: str | None = None):
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    # Told to be offline, older ones don't look for a LoRA's file, even in a folder here.
    with mock.patch("diffusers.loaders.lora_base.HF_HUB_OFFLINE", new=False, create=True):
        pipe.load_lora_weights(folder, weight_name=weight_name)
    return pipe.unet


@pytest.mark.parametrize(
    ("peft", "scale"),
    [
        ({"rank": 2}, 1.0),
        ({"rank": 2, "alpha": 1.0}, 0.5),
        ({"rank": 3, "alpha": 6.0, "target_modules": ["to_q", "conv1", "time_emb_proj", "conv_in"]}, 2.0),
    ],
    ids=["linear", "half", "convolutions"],
)
def test_both_files_of_final_are_the_same_lora_in_diffusers_and_in_kohyas_naming(tiny_sdxl, peft, scale):
    result = train(tiny_sdxl, peft=peft)
    final = Path("runs/mine/final")
    assert {path.name for path in final.iterdir()} == {LORA, "mine-kohya.safetensors", "README.md", "step.txt"}
    untuned = ask(StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False).unet)
    wanted = ask(unet_with(tiny_sdxl, final))  # diffusers takes its own file, though two are there
    assert (wanted - untuned).abs().max() > 1e-3
    if TAKES_ALL_OF_KOHYA or "conv_in" not in peft.get("target_modules", []):
        other = ask(unet_with(tiny_sdxl, final, "mine-kohya.safetensors"))
        torch.testing.assert_close(other, wanted, rtol=0, atol=1e-5)
    assert find_lora(final) == final / LORA
    ours = load_file(final / LORA)
    downs = {key: tensor for key, tensor in load_file(final / "mine-kohya.safetensors").items() if "lora_down" in key}
    assert len(downs) == len(ours) / 2
    stored = json.loads(metadata(final / LORA)["lora_adapter_metadata"])
    assert stored["unet.lora_alpha"] / stored["unet.r"] == scale
    assert "for ComfyUI, A1111 and Forge runs/mine/final/mine-kohya.safetensors" in result.out
    card = (final / "README.md").read_text()
    for program in ("ComfyUI", "A1111, Forge"):
        assert f"| {program} | `mine-kohya.safetensors` |" in card
    assert f"| diffusers, draftp | `{LORA}` |" in card


def test_the_settings_stored_beside_a_lora_are_those_that_every_peft_knows(tiny_sdxl):
    """In final/, in checkpoints, and in what merge-lora makes of runs and of layers with several ranks."""
    train(tiny_sdxl)
    train(tiny_sdxl, "runs/wide", peft={"rank": 3, "target_modules": ["to_k", "proj_in"]})
    merged = draftp("merge-lora", "runs/mine", "runs/wide=0.5", "--format", "lora", "--output", "both")
    assert merged.code == 0, merged.err
    for folder in ("runs/mine/final", "runs/mine/step-000001", "runs/wide/step-000002", "both"):
        stored = json.loads(metadata(Path(folder, LORA))["lora_adapter_metadata"])
        assert {key.removeprefix("unet.") for key in stored} == KNOWN_TO_ALL, folder
        config = LoraConfig(**{key.removeprefix("unet."): value for key, value in stored.items()})
        assert config.lora_alpha == config.r
        assert config.alpha_pattern == config.rank_pattern, "the scale is 1 in every layer"
    assert set(config.rank_pattern.values()) | {config.r} == {2, 3, 5}
    tuned = unet_with(tiny_sdxl, Path("runs/mine/final"))
    wanted = {name: p.detach().clone() for name, p in tuned.named_parameters() if "lora_" in name}
    assert {f"unet.{name.replace('.default_0', '')}" for name in wanted} == load_file(
        Path("runs/mine/final", LORA)
    ).keys()


def test_the_kohya_file_says_what_the_run_was(tiny_sdxl):
    train(tiny_sdxl, sampling={"height": 64, "width": 96}, peft={"rank": 4, "alpha": 2.0})
    file = Path("runs/mine/final/mine-kohya.safetensors")
    said = metadata(file)
    expected = {
        "modelspec.title": "mine",
        "modelspec.description": "fine-tuned with DRaFT+ on tests.example_rewards:red, 2 steps; "
        f"made by draftp {draftcli.__version__}",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "96x64",
        "modelspec.prediction_type": "epsilon",
        "ss_output_name": "mine",
        "ss_sd_model_name": tiny_sdxl.name,
        "ss_resolution": "(96, 64)",
        "ss_steps": "2",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4.0",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_zero_terminal_snr": "False",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert "modelspec.merged_from" not in said, "it was trained"
    written = datetime.fromtimestamp(file.with_name(LORA).stat().st_mtime, UTC)
    assert said["modelspec.date"] == written.strftime("%Y-%m-%dT%H:%M:%SZ")
    alphas = {float(tensor) for key, tensor in load_file(file).items() if key.endswith(".alpha")}
    assert alphas == {4.0}, "as the metadata says"


def test_a_whole_unet_has_no_such_file_and_its_card_says_what_to_do(tiny_sdxl):
    result = train(tiny_sdxl, peft={"peft_scheme": "none"}, optim={"lr": 1e-4})
    assert not list(Path("runs/mine/final").glob("*.safetensors"))
    assert "ComfyUI" not in result.out
    assert "merge-lora RUN --format single-file" in Path("runs/mine/final/README.md").read_text()


def test_a_lora_that_changes_nothing_is_left_as_it_is_with_a_warning(tiny_sdxl):
    result = train(tiny_sdxl, optim={"lr": 1e-50})
    final = Path("runs/mine/final")
    assert [path.name for path in final.glob("*.safetensors")] == [LORA]
    assert "mine-kohya.safetensors is not written: " in result.err
    assert "change nothing" in result.err
    assert "merge-lora RUN --format kohya" in (final / "README.md").read_text()


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["to_q", "conv_in"], "conv_in"),
        (["to_q", "conv_out", "linear_1"], "add_embedding.linear_1, conv_out, time_embedding.linear_1"),
        (["to_q", "conv1", "time_emb_proj", "proj_in", "downsamplers.0.conv"], None),
    ],
)
def test_targets_that_kohya_has_no_place_for_are_named_when_training_starts(tiny_sdxl, targets, named):
    err = train(tiny_sdxl, peft={"target_modules": targets}).err
    said = [line for line in err.splitlines() if "sd-scripts" in line and "target_modules" in line]
    if named is None:
        assert "sd-scripts" not in err
    else:
        (line,) = said
        assert f"warning: peft.target_modules has {named}: " in line


def test_a_long_name_of_a_run_fits_into_the_name_of_its_file(tiny_sdxl):
    name = "ä" * 120  # 240 bytes, and a file's name has 255
    train(tiny_sdxl, f"runs/{name}")
    (file,) = Path("runs", name, "final").glob("*-kohya.safetensors")
    assert len(file.name.encode()) < 255


def test_a_moved_run_still_names_its_files(tiny_sdxl):
    train(tiny_sdxl)
    shutil.move("runs/mine", "runs/yours")
    again = train(tiny_sdxl, "runs/yours")
    assert "runs/yours/final/mine-kohya.safetensors" in again.out

"""The weights that ship, and the script that makes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from draftcli.toy.reward import WEIGHTS_FOLDER
from draftcli.toy.world import RESOLUTION


@pytest.fixture(scope="module")
def provenance() -> dict:
    return json.loads((WEIGHTS_FOLDER / "provenance.json").read_text())


def test_measured_figures_are_within_what_was_promised(provenance: dict) -> None:
    assert provenance["vae"]["l1"] < 0.03
    assert 0.3 <= provenance["base"]["all_right"] <= 0.75
    assert provenance["command"]
    assert provenance["date"]
    assert provenance["versions"]


def test_the_lora_draws_in_four_evaluations_as_the_base_in_twenty(provenance: dict) -> None:
    measured, base = provenance["in_four_steps"], provenance["base"]
    for figure in ("oracle_score", "all_right"):
        assert measured["lora"][figure] > base[figure] - 0.02
        assert all(measured["lora"][figure] > measured[name][figure] + 0.05 for name in measured if "base" in name)


def test_the_reward_agrees_with_the_oracle(provenance: dict) -> None:
    """On held-out pairs, ties left out: pairs closer than the doubt that its labels were drawn with."""
    figures = provenance["reward"]
    assert figures["tie"] == figures["doubt"]
    assert figures["agreement"] >= 0.80
    assert figures["agreement_by_tie"]["beyond_0.05"]["pairs"] >= 100


def test_weights_are_small_fp16_safetensors_and_nothing_else() -> None:
    files = [path for path in WEIGHTS_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 17e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    assert not any("fp16" in path.name for path in files)
    settings = [json.loads(path.read_text()) for path in files if path.name == "config.json"]
    assert not any(config.get("_name_or_path") for config in settings), "where it was made is nobody's business"


def test_diffusers_opens_the_model_and_draws() -> None:
    from diffusers import StableDiffusionXLPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers and transformers say of each other is not ours
        pipe = StableDiffusionXLPipeline.from_pretrained(WEIGHTS_FOLDER / "model").to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        images = pipe("a large red star in the centre of a white background", num_inference_steps=4,
                      guidance_scale=3.0, output_type="np").images  # fmt: skip
    assert images.shape == (1, RESOLUTION, RESOLUTION, 3)
    assert images.std() > 0.05
    first, second = pipe.text_encoder.config, pipe.text_encoder_2.config
    assert first.hidden_size != second.hidden_size
    assert second.projection_dim == second.hidden_size
    assert pipe.unet.config.addition_embed_type == "text_time"
    assert pipe.scheduler.config.timestep_spacing == "leading"
    assert pipe.scheduler.config.steps_offset == 1
    assert pipe.tokenizer.pad_token_id == first.eos_token_id
    assert pipe.tokenizer_2.pad_token == "!"
    assert pipe.tokenizer_2.pad_token_id == 0
    ids = pipe.tokenizer("any text at all: 猫", padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    assert ids.max() < first.vocab_size


def test_script_runs_end_to_end_and_skips_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from draftcli.toy.make_weights import make_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_weights(tmp_path, quick=True)
        capsys.readouterr()
        make_weights(tmp_path, quick=True)
    assert capsys.readouterr().out.count("already there") == 7
    record = json.loads((tmp_path / "provenance.json").read_text())
    stages = {"vae", "sdxl", "base", "reward", "judge", "four_steps", "in_four_steps"}
    assert {*stages, "megabytes", "seed", "hardware"} <= set(record)
    assert (tmp_path / "model" / "model_index.json").exists()
    assert (tmp_path / "reward" / "vocab.json").exists()
    assert (tmp_path / "toy-4step" / "pytorch_lora_weights.safetensors").exists()
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "provenance.json").stat().st_mode}, "weights are as readable as the rest"

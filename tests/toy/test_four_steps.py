"""The LoRA that ships, with which the toy draws in 4 steps without guidance, and its preset."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from draftcli.config import load_config
from draftcli.contents import base_loras_contents
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.models.places import base_lora, lora_path, model_path
from draftcli.toy import oracle
from draftcli.toy.train_sdxl import draw_pictures, open_pipeline
from draftcli.toy.world import caption, held_out_scenes
from tests.command import draftp

PROMPTS = [caption(scene) for scene in held_out_scenes(24)]


def test_diffusers_draws_the_same_and_the_captions_are_followed() -> None:
    model = SDXLDRaFTPModel(load_config("toy-4step"), loras=[])
    batch = Batch(PROMPTS, list(range(len(PROMPTS))), (64, 64))
    ours = model.annealed_images(batch, model.initial_noise(batch), lambda *_: 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers and transformers say of each other is not ours
        pipe = open_pipeline(Path(model_path("toy")))
        without = draw_pictures(pipe, PROMPTS, seed=0, steps=4)
        pipe.load_lora_weights(lora_path("toy-4step"))
        theirs = draw_pictures(pipe, PROMPTS, seed=0, steps=4, scale=1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    scores = [oracle.oracle_score(pictures, PROMPTS).mean().item() for pictures in (ours, without)]
    assert scores[0] > 0.65, "it was 0.71 on 480 pictures"
    assert scores[0] > scores[1] + 0.1, "the base with guidance, in twice the evaluations"


def test_it_is_known_by_name_and_by_its_contents() -> None:
    Path("toy-4step").mkdir()  # in the working directory, and no LoRA
    assert base_lora("toy-4step=0.5") == (Path(lora_path("toy-4step")), 0.5)
    (name, digest), *more = base_loras_contents(["toy-4step=0.5"]).items()
    assert name == "LoRA 1 of 1 x 0.5 pytorch_lora_weights.safetensors"
    assert (len(digest), more) == (64, [])


def test_the_preset_trains_and_the_card_says_what_it_goes_with() -> None:
    trainer = {"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 2, "save_interval": 1}
    small = [f"trainer.{name}={value}" for name, value in trainer.items()]
    small += [
        "data.validation_prompts=[]",
        "held_out_rewards=[]",
        "trainer.val_check_interval=0",
        "optim.sched={name: constant}",
    ]
    result = draftp("train", "--preset", "toy-4step", "--quiet", *(f"--set={text}" for text in small))
    assert (result.code, result.err) == (0, "")
    card = Path("runs/toy-4step/final/README.md").read_text()
    assert 'pipe.load_lora_weights(lora_path("toy-4step"))' in card
    assert "with `toy-4step` at scale 1 (sha256 " in card
    assert "timesteps=[999, 749, 499, 249], guidance_scale=1)" in card
    assert str(Path(lora_path("toy-4step")).parent) not in card


@pytest.mark.slow  # the whole training of the preset
def test_the_preset_raises_the_learned_reward_and_the_truth_with_it() -> None:
    result = draftp("train", "--preset", "toy-4step")
    assert result.code == 0, result.err
    last = json.loads(Path("runs/toy-4step/validation.jsonl").read_text().splitlines()[-1])
    assert last["rewards"]["toy"]["low"] > 0, "the interval of tuned minus base excludes 0"
    assert last["rewards"]["toy_oracle"]["low"] > 0, "and for the oracle too, which it never saw"

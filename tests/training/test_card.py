"""The model card of a run: its head is what the Hub reads, and what it says was measured."""

import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import draftcli
from draftcli.training.card import model_card
from draftcli.training.card_head import card_head
from tests.command import WITH_VALIDATION, draftp, recipe

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
VALIDATION = {
    "step": 20,
    "images": 8,
    "rewards": {
        "toy": {"base": 7.5, "tuned": 9.25, "difference": 1.75, "low": 1.5, "high": 2.0, "n": 8},
        "toy_oracle": {"base": 0.5, "tuned": 0.75, "difference": 0.25, "low": math.nan, "high": math.nan, "n": 8},
        "silent": {"base": math.nan, "tuned": math.nan, "difference": math.nan, "low": math.nan, "high": math.nan},
    },
    "diversity": {"base": 0.06, "tuned": 0.03, "kept": 0.5, "kept_low": 0.4, "kept_high": 0.6},
}


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(
    ("pretrained", "scheme", "expected"),
    [
        (SDXL, "lora", {"base_model": SDXL, "base_model_relation": "adapter", "license": "openrail++"}),
        (SDXL, "none", {"base_model": SDXL, "base_model_relation": "finetune", "license": "openrail++"}),
        (SD1, "lora", {"base_model": SD1, "base_model_relation": "adapter", "license": "creativeml-openrail-m"}),
        (
            "somebody/sdxl-of.theirs",
            "lora",
            {
                "base_model": "somebody/sdxl-of.theirs",
                "base_model_relation": "adapter",
                "license": "other",
                "license_name": "that-of-the-base-model",
                "license_link": "https://huggingface.co/somebody/sdxl-of.theirs",
            },
        ),
        ("toy", "lora", {"license": "apache-2.0"}),
        ("models/mine.safetensors", "lora", {"license": "unknown"}),
        ("/home/me/sdxl", "lora", {"license": "unknown"}),
    ],
)
def test_what_the_hub_files_it_under(pretrained, scheme, expected):
    """Only a model of the Hub is a `base_model` to it; the path of a folder here is nobody else's business."""
    cfg = draftcli.load_config("toy", [f"model.pretrained={pretrained}", f"peft.peft_scheme={scheme}"])
    head = yaml.safe_load(card_head(cfg, "mine", None, None))
    names = ("base_model", "base_model_relation", "license", "license_name", "license_link")
    assert {name: head[name] for name in names if name in head} == expected
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert ("lora" in head["tags"]) == (scheme == "lora")
    assert not head.keys() & {"model-index", "widget"}, "nothing was measured"


def test_the_model_index_has_what_was_measured():
    cfg = draftcli.load_config("toy", ["data.validation_prompts=some/folder/held-out.txt"])
    head = yaml.safe_load(card_head(cfg, "mine", VALIDATION, "sheet.png"))
    (model,) = head["model-index"]
    (result,) = model["results"]
    assert model["name"] == "mine"
    assert result["task"] == {"type": "text-to-image"}
    assert result["dataset"]["name"] == "8 images of held-out prompts (held-out.txt)"
    assert result["metrics"] == [
        {
            "type": "toy",
            "name": "toy, trained on",
            "value": 9.25,
            "args": {"base": 7.5, "change": 1.75, "change_95_percent_low": 1.5, "change_95_percent_high": 2.0},
        },
        {"type": "toy_oracle", "name": "toy_oracle, held out", "value": 0.75, "args": {"base": 0.5, "change": 0.25}},
        {
            "type": "diversity-kept",
            "name": "diversity in pixels, as a share of the base's",
            "value": 0.5,
            "args": {"low": 0.4, "high": 0.6},
        },
    ]
    assert head["widget"] == [
        {
            "text": "Held-out prompts after step 20: the base, and beside it the fine-tuned model",
            "output": {"url": "sheet.png"},
        }
    ]


def test_the_card_of_a_run_is_one_that_the_hub_reads(tiny_sdxl):
    preset = recipe(
        tiny_sdxl, data=WITH_VALIDATION, trainer={"max_steps": 2, "val_check_interval": 2}, optim={"lr": 0.1}
    )
    result = draftp("train", "--preset", preset, "--output", "runs/mine")
    assert result.code == 0, result.err
    card = ModelCard.load(Path("runs/mine/final/README.md"))
    (line,) = [line for line in draftcli.load_run("mine").validations() if line["step"] == 2]
    figures = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert card.data.model_name == "mine"
    assert figures.pop("diversity-kept") == pytest.approx(line["diversity"]["kept"])
    assert figures == {name: pytest.approx(found["tuned"]) for name, found in line["rewards"].items()}
    (shown,) = card.data.to_dict()["widget"]
    sheet = Path("runs/mine/final", shown["output"]["url"])
    assert sheet.read_bytes() == Path("runs/mine/samples/step-000002-sheet.png").read_bytes()
    assert "<Gallery />" in card.text
    assert str(tiny_sdxl.parent) not in str(head_of(card.content))


def test_the_card_says_what_was_trained_on_which_way_and_what_decoded():
    cfg = draftcli.load_config("toy", ["rewards.toy.weight=-1", "rewards.toy_oracle.weight=0", "model.vae=my/vae"])
    data = {"count": 3, "sha256": 64 * "0"}
    lines = model_card(cfg, "mine", 20, VALIDATION, data, None).splitlines()
    assert "# toy tuned on toy with DRaFT+" in lines
    roles = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines if line.startswith("| toy")}
    assert roles == {"| toy": "yes, lower is better |", "| toy_oracle": "no |"}
    assert "Its images were decoded with the VAE my/vae (model.vae), not with the base model's." in lines

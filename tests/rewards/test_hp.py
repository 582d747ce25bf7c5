"""HP: a small checkpoint in the official layout, two files in two folders, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.tokenization_auto import AutoTokenizer

from draftcli.errors import InputError
from draftcli.rewards import load_reward
from draftcli.rewards.registry import blank_reward
from tests.command import draftp
from tests.rewards.references import (
    MEAN,
    STD,
    OpenClip,
    as_transformers,
    clip_backbone,
    head,
    pictures,
    score_by,
    seeded,
    slope_and_differences,
)

PROMPTS = ["a red circle", "two blue squares", ""]
CLIP_FILE, HEAD_FILE = "hp_backbone/pytorch_model.bin", "hp_scorer/mlp_pytorch_model.bin"


@dataclass
class Official:
    folder: Path
    backbone: Path
    score: Callable[[Tensor], Tensor]

    def load(self) -> Any:
        return load_reward("hp", str(self.folder), str(self.backbone))


@pytest.fixture
def official(tmp_path: Path, tiny_sdxl: Path) -> Official:
    tokenizer = AutoTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    clip = seeded(lambda: OpenClip(len(tokenizer)), seed=5)
    clip.visual.proj.data /= 20  # shorter embeddings, or the sigmoid is flat
    layers = seeded(lambda: head(24, (0, 2, 4, 6, 7)), seed=6)
    for file, tensors in [
        (CLIP_FILE, as_transformers(clip)),
        (HEAD_FILE, {f"layers.{key}": tensor for key, tensor in layers.state_dict().items()}),
    ]:
        (tmp_path / "HP" / file).parent.mkdir(parents=True)
        torch.save(tensors, tmp_path / "HP" / file)

    def score(images: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-score_by(layers, clip.visual((images - MEAN) / STD))))

    return Official(tmp_path / "HP", clip_backbone(tmp_path / "clip_h", tokenizer), score)


def test_the_score_is_the_official_one(official: Official) -> None:
    reward, images = official.load(), pictures(32, 32)
    with torch.no_grad():
        expected, ours = official.score(images), reward(images, PROMPTS)
        assert torch.equal(ours, reward(images, PROMPTS[::-1])), "the prompt does not matter"
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-4
    assert 0 < expected.min() < expected.max() < 1
    assert {p.dtype for p in reward.parameters()} == {torch.float32}


def test_the_gradient_is_that_of_finite_differences(official: Official) -> None:
    slope, differences = slope_and_differences(official.load(), pictures(40, 48, count=2), PROMPTS[:2])
    assert abs(differences) > 1e-7
    assert slope == pytest.approx(differences, rel=1e-5)


def test_without_weights_it_is_built_as_it_is_loaded(official: Official) -> None:
    loaded, blank = official.load(), blank_reward("hp")
    assert blank is not None
    assert {key for key in blank.state_dict() if ".layers." not in key} == {
        key for key in loaded.state_dict() if ".layers." not in key
    }
    assert (type(blank), blank.preprocess.fit) == (type(loaded), loaded.preprocess.fit)


@pytest.mark.parametrize(
    ("file", "key"), [(CLIP_FILE, "vision_model.post_layernorm.bias"), (HEAD_FILE, "layers.6.weight")]
)
def test_a_missing_an_unknown_and_a_misshapen_name_are_errors_that_say_which(
    official: Official, file: str, key: str
) -> None:
    whole = torch.load(official.folder / file, weights_only=True)
    for tensors, words in [
        ({k: t for k, t in whole.items() if k != key}, f"lacks {key}"),
        ({**whole, "surprise": torch.ones(2)}, "has an unknown surprise"),
        ({**whole, key: torch.ones(7, 7, 7)}, f"{key} gives (7, 7, 7)"),
    ]:
        torch.save(tensors, official.folder / file)
        with pytest.raises(InputError) as caught:
            official.load()
        assert words in str(caught.value)
        assert str(official.folder / file) in str(caught.value)


def test_what_is_elsewhere_is_said_in_one_line(official: Official) -> None:
    (official.folder / HEAD_FILE).rename(official.folder / "head.bin")
    for pretrained, backbone, words in [
        (official.folder / "head.bin", official.backbone, "set rewards.hp.pretrained to the folder that holds"),
        (official.folder, official.backbone, f"has no file {HEAD_FILE}"),
        (official.folder / "nowhere" / "at all", official.backbone, "is neither a file, a folder nor a hub id"),
    ]:
        result = draftp("rewards", "check", "hp", "--pretrained", str(pretrained), "--backbone", str(backbone))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert words in result.err
    with pytest.raises(InputError, match=r"mlp_pytorch_model\.bin cannot be fetched from 8y/HP"):
        load_reward("hp")


def test_check_finds_it_usable_for_training(official: Official) -> None:
    places = ["--pretrained", str(official.folder), "--backbone", str(official.backbone)]
    result = draftp("rewards", "check", "hp", *places, "--size", "48x40")
    assert (result.code, result.err) == (0, "")
    assert "hp: usable for training" in result.out

"""HPSv3: a small checkpoint in the official layout, against Qwen2-VL and its head again in plain torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftcli.config import RewardSource
from draftcli.errors import InputError
from draftcli.planning.blank_networks import BlankRewards
from draftcli.planning.repeated_layers import size_of, tensors
from draftcli.rewards import load_reward
from draftcli.rewards.hpsv3 import HPSV3_INSTRUCTION
from draftcli.rewards.qwen_vl import Patches, fitted_sides
from draftcli.rewards.registry import blank_reward
from tests.command import draftp
from tests.rewards.qwen_vl import OfficialHPSv3, qwen2_vl_config, qwen_tokenizer
from tests.rewards.references import as_pil, pictures, seeded, slope_and_differences

PROMPTS = ["a red circle", "two blue squares on a lawn, {far away}", ""]

INSTRUCTION_CHECKSUM = "15e1621b28713545598ab36adf302c509d363605cde96f0d9a54bdeb15632f32"
# Works without torchvision: a class of its own in release 5 of transformers, the only one in release 4.
ImageProcessor = getattr(transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor)


@dataclass
class Official:
    file: Path
    backbone: Path
    judge: Callable[[Tensor, list[str]], Tensor]

    def load(self, file: Path | None = None) -> Any:
        return load_reward("hpsv3", str(file or self.file), str(self.backbone))


def official_text(prompt: str) -> str:
    """All of it: Qwen2-VL's chat template around the picture and the authors' question, and what stands after that."""
    asked = f"{HPSV3_INSTRUCTION}{prompt}\n\n\n\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"{system}<|im_start|>user\n{picture}{asked}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    backbone = tmp_path_factory.mktemp("qwen")
    tokenizer = qwen_tokenizer(backbone, [official_text(prompt) for prompt in PROMPTS])
    qwen2_vl_config(backbone, tokenizer)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)  # the last of the network's, which has no padding
    network = seeded(lambda: OfficialHPSv3(len(tokenizer)), seed=3)
    # As the authors compute and save it: the head alone keeps 32 bits.
    tensors = {
        key: tensor if key.startswith("rm_head.") else tensor.bfloat16() for key, tensor in network.state_dict().items()
    }
    network.load_state_dict(tensors)
    file = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    save_file(tensors, file)
    pad, reward = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|Reward|>"])

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        texts = [torch.tensor(tokenizer(official_text(prompt)).input_ids) for prompt in prompts]
        return torch.stack([network(image, text, pad, reward) for image, text in zip(images, texts, strict=True)])

    return Official(file, backbone, judge)


def test_the_score_is_the_official_one(official: Official) -> None:
    """On pictures that have the size that they are brought to: 448 x 448, and 224 x 896, as large."""
    reward = official.load()
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    reward.float()  # the same weights, so that nothing but the computation is compared
    for size in ((448, 448), (224, 896)):
        images = pictures(*size)
        with torch.no_grad():
            expected, ours = official.judge(images, PROMPTS), reward.judge(images, PROMPTS)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(reward(images, PROMPTS), expected[:, 0], rtol=1e-3, atol=1e-4)
        assert expected[:, 0].std() > 1e-2
        assert ((expected[1:] - official.judge(images[:1].expand(2, -1, -1, -1), PROMPTS[1:])).abs() > 1e-3).all()


def test_a_prompt_cannot_end_the_question(official: Official) -> None:
    """Its words count, and the score is still that at the last token."""
    images, reward = pictures(448, 448, 1), official.load().float()
    scores = [reward(images, [prompt]) for prompt in ("a <|Reward|> for all", "a < |Reward|> for all", "a")]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_it_computes_in_bfloat16_as_its_authors_do(official: Official) -> None:
    images = pictures(448, 448)
    with torch.no_grad():
        ours, expected = official.load()(images, PROMPTS), official.judge(images, PROMPTS)[:, 0]
    assert ours.dtype == torch.float32
    assert 0 < (ours - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_gradient_is_that_of_finite_differences(official: Official) -> None:
    """Through resizing, too. transformers computes norms and rotations in 32 bits: a longer step, and less exact."""
    slope, differences = slope_and_differences(official.load(), pictures(90, 60, count=2), PROMPTS[:2], step=3e-3)
    assert abs(differences) > 1e-3
    assert slope == pytest.approx(differences, rel=0.02)


def test_the_instruction_is_the_official_one() -> None:
    """The checksum of the authors' words: the network was trained with just these."""
    assert sha256(HPSV3_INSTRUCTION.encode()).hexdigest() == INSTRUCTION_CHECKSUM


def test_newer_names_are_read_as_well(official: Official, tmp_path: Path) -> None:
    """Since 4.52, transformers calls the two halves model.visual and model.language_model."""
    renamed = {}
    for key, tensor in load_file(official.file).items():
        newer = f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)
        renamed[newer] = tensor
    save_file(renamed, tmp_path / "renamed.safetensors")
    images = pictures(448, 448, 1)
    ours = official.load(tmp_path / "renamed.safetensors")(images, PROMPTS[:1])
    assert torch.equal(ours, official.load()(images, PROMPTS[:1]))


def test_a_missing_an_unknown_and_a_misshapen_name_are_errors_that_say_which(
    official: Official, tmp_path: Path
) -> None:
    whole, file = load_file(official.file), tmp_path / "changed.safetensors"
    changes = [
        ({key: tensor}, (f"lacks {key}", f"{key} gives (7, 7, 7)"))
        for key, tensor in whole.items()
        if key in ("rm_head.3.weight", "visual.blocks.1.mlp.fc2.bias", "model.layers.0.self_attn.k_proj.bias")
    ]
    assert len(changes) == 3
    for change, (missing, misshapen) in changes:
        (key,) = change
        for changed, words in [
            ({k: t for k, t in whole.items() if k != key}, missing),
            ({**whole, key: torch.ones(7, 7, 7)}, misshapen),
        ]:
            save_file(changed, file)
            with pytest.raises(InputError) as caught:
                official.load(file)
            assert words in str(caught.value)
            assert str(file) in str(caught.value)
    save_file({**whole, "surprise": torch.ones(2)}, file)
    with pytest.raises(InputError, match="has an unknown surprise"):
        official.load(file)


def test_what_is_elsewhere_or_of_another_network_is_said_in_one_line(official: Official, tmp_path: Path) -> None:
    tokens = qwen_tokenizer(tmp_path / "more", [official_text("")], [f"word{i}" for i in range(3)])
    qwen2_vl_config(tmp_path / "more", tokens)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for pretrained, backbone, words in [
        (tmp_path, official.backbone, "has no file HPSv3.safetensors"),
        (official.file, tmp_path / "bert", "is a bert model, not a qwen2_vl one"),
        (official.file, tmp_path / "nowhere", "is neither a file, a folder nor a hub id"),
        (official.file, "nobody/nowhere", "set rewards.hpsv3.backbone to its folder"),
        (official.file, tmp_path / "more", "do not belong together"),
    ]:
        result = draftp("rewards", "check", "hpsv3", "--pretrained", str(pretrained), "--backbone", str(backbone))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert words in result.err
    with pytest.raises(InputError, match=r"HPSv3\.safetensors cannot be fetched from MizzenAI/HPSv3"):
        load_reward("hpsv3")
    with pytest.raises(InputError, match="one side is more than 200 times the other"):
        official.load()(torch.rand(1, 3, 2, 402), PROMPTS[:1])


def test_check_finds_it_usable_for_training(official: Official) -> None:
    places = ["--pretrained", str(official.file), "--backbone", str(official.backbone)]
    result = draftp("rewards", "check", "hpsv3", *places, "--size", "64x48")
    assert result.err == ""
    assert "hpsv3: usable for training" in result.out
    assert result.code == 0


def test_without_weights_it_is_built_as_it_is_loaded_and_plans_count_it(official: Official) -> None:
    loaded, blank = official.load(), blank_reward("hpsv3")
    assert blank is not None
    kinds = [{re.sub(r"\.\d+\.", ".N.", key) for key in network.state_dict()} for network in (loaded, blank)]
    assert kinds[0] == kinds[1]
    assert [blank.network.dtype, blank.head[0].weight.dtype] == [torch.bfloat16, torch.float32]
    rewards = BlankRewards({"hpsv3": RewardSource()})
    assert rewards.uncounted == []
    weights = sum(p.nbytes for p in blank.parameters())
    assert size_of(tensors(rewards, buffers=False)) == weights


LIMITS = {"HPSv3": (14, 256 * 28 * 28, 256 * 28 * 28), "Qwen2-VL": (14, 56 * 56, 28 * 28 * 1280)}
LIMITS["Qwen3-VL"] = (16, 256 * 256, 4096 * 4096)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("size", [(96, 96), (96, 145), (448, 448), (900, 610), (20, 31)])
def test_patches_are_those_of_transformers(name: str, size: tuple[int, int]) -> None:
    """Values of 8-bit pictures within 0.04 normalised units, of which Pillow's rounding is the cause; order exact."""
    patch, least, most = LIMITS[name]
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.5)
    official = ImageProcessor(min_pixels=least, max_pixels=most, patch_size=patch, image_mean=mean, image_std=std)
    vision = SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    images = pictures(*size, count=2)
    theirs = official(as_pil(images), return_tensors="np")
    ours, grid = Patches(vision, least, most, mean, std)(images)
    assert theirs["image_grid_thw"].tolist() == [[1, *grid]] * 2
    expected = torch.as_tensor(np.asarray(theirs["pixel_values"])).view_as(ours)
    assert (ours - expected).abs().max() < 0.04


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1024, 1024), (448, 448)), ((512, 512), (448, 448)), ((832, 1216), (364, 532)), ((64, 64), (448, 448))],
)
def test_sides_become_multiples_and_the_area_what_hpsv3_saw(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """By hand: 832 x 1216 shrinks by sqrt(832 * 1216 / 200704) = 2.2451 to 370.6 x 541.6, rounded down to 28ths."""
    assert fitted_sides(*size, 28, 256 * 28 * 28, 256 * 28 * 28) == expected

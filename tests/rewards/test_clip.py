"""CLIP rewards against transformers' own computation, on a small random CLIP made on the spot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import draftcli
from draftcli.errors import InputError
from draftcli.rewards import WeightedSum, load_reward
from draftcli.rewards.check import double_by_default
from draftcli.rewards.clip import load_clip_reward

# Works without torchvision: a class of its own in release 5 of transformers, the only one in release 4.
ImageProcessor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)

PROMPTS = ["a red circle", "two blue squares on a lawn, far away", ""]
EDGE = 32


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tiny_sdxl) -> Path:
    """PickScore's files in small: CLIPModel, tokenizer, preprocessor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shared, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 77,
        },
        vision_config={**shared, "image_size": EDGE, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}).save_pretrained(folder)
    return folder


def pictures(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Smooth random pictures in eighths of a byte, so that the 8-bit route loses nothing at the start."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    return (large * 255).round() / 255


def test_score_is_exp_logit_scale_times_cosine(clip_folder):
    reward = load_clip_reward("pickscore", str(clip_folder))
    images = pictures(EDGE, EDGE)
    tokens = reward.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        theirs = reward.clip(**tokens, pixel_values=reward.preprocess(images)).logits_per_image.diagonal()
        torch.testing.assert_close(reward(images, PROMPTS), theirs, atol=1e-5, rtol=0)
        bare = load_clip_reward("clip", str(clip_folder), bare_cosine=True)(images, PROMPTS)
    torch.testing.assert_close(bare * np.exp(3.0), theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.01


@pytest.mark.parametrize("size", [(96, 96), (96, 144), (150, 96), (32, 32), (20, 20)])
def test_preprocessing_is_the_official_one(clip_folder, size):
    """Within 0.04 normalised units, 2.7 of 255: the PIL route rounds to 8 bits twice and filters in integers."""
    reward = load_clip_reward("pickscore", str(clip_folder))
    images = pictures(*size)
    official = ImageProcessor.from_pretrained(clip_folder)
    pil = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    theirs = torch.as_tensor(np.asarray(official(pil, return_tensors="np")["pixel_values"]))
    ours = reward.preprocess(images)
    assert ours.shape == theirs.shape == (3, 3, EDGE, EDGE)
    assert (ours - theirs).abs().max() < 0.04


def test_gradient_is_that_of_finite_differences(clip_folder):
    reward = load_clip_reward("pickscore", str(clip_folder)).double()
    # Away from 0 and 1, where the preprocessing saturates as the official one does.
    images = (0.3 + 0.4 * pictures(40, 48, count=2).double()).requires_grad_()
    with double_by_default():
        reward(images, PROMPTS[:2]).sum().backward()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-5
    with torch.no_grad(), double_by_default():
        ahead, behind = (reward(images + s * step * direction, PROMPTS[:2]).sum() for s in (1, -1))
    assert images.grad is not None
    expected = ((ahead - behind) / (2 * step)).item()
    assert (images.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6)


def test_an_image_is_scored_against_its_own_caption_whatever_the_batch(clip_folder):
    reward = load_clip_reward("pickscore", str(clip_folder))
    images = pictures(EDGE, EDGE)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(reward(images, PROMPTS), alone, atol=1e-5, rtol=0)
    assert not torch.allclose(reward(images, PROMPTS[::-1]), alone)


def test_long_prompts_are_cut_and_not_refused(clip_folder):
    reward = load_clip_reward("pickscore", str(clip_folder))
    assert reward(pictures(EDGE, EDGE, 1), ["word " * 500]).isfinite().all()


def test_pickscore_loads_from_a_local_folder_by_setting(clip_folder):
    cfg = draftcli.config.check_config({"rewards": {"pickscore": {"weight": 2.0, "pretrained": str(clip_folder)}}})
    reward = draftcli.get_reward_model(cfg)
    images = pictures(EDGE, EDGE)
    single = load_reward("pickscore", str(clip_folder))(images, PROMPTS)
    torch.testing.assert_close(reward(images, PROMPTS), 2 * single)
    assert not any(p.requires_grad for p in load_reward("pickscore", str(clip_folder)).parameters())


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="not a CLIP"):
        load_clip_reward("pickscore", str(tmp_path))


def test_the_sum_weighs_caps_and_remembers_each_part():
    class Constant:
        def __init__(self, value):
            self.name, self.value = str(value), value

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)) * 0 + self.value

    cfg = draftcli.config.check_config({"rewards": {"a": 0.5, "b": {"weight": 2, "target": 3.0}}})
    total = WeightedSum({"a": Constant(4.0), "b": Constant(10.0)}, cfg.rewards)
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert total(images, ["x", "y"]).tolist() == [0.5 * 4 + 2 * 3] * 2
    scores = total.pop_scores()
    assert {name: s.tolist() for name, s in scores.items()} == {"a": [4, 4], "b": [10, 10]}
    assert total.pop_scores() == {}


def with_settings(folder: Path, changes: dict[str, object]) -> Path:
    """A copy of a CLIP whose tokenizer's settings are changed."""
    copy = Path(shutil.copytree(folder, "copy"))
    path = copy / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "out"}))
    return copy


@pytest.mark.parametrize("length", ["out", None, 10**30, 248, 512])
def test_a_tokenizer_may_say_nothing_of_a_length_or_too_much(clip_folder, length):
    images, prompts = pictures(EDGE, EDGE), [*PROMPTS[:2], "word " * 300]
    found = load_reward("pickscore", str(with_settings(clip_folder, {"model_max_length": length})))
    assert torch.equal(found(images, prompts), load_reward("pickscore", str(clip_folder))(images, prompts))


def test_a_tokenizer_without_a_token_to_fill_with_is_refused(clip_folder):
    with pytest.raises(InputError, match=r"reward pickscore: the tokenizer of copy .*pad_token"):
        load_reward("pickscore", str(with_settings(clip_folder, {"pad_token": None})))


def test_a_tokenizer_of_another_network_is_refused(clip_folder):
    copy = Path(shutil.copytree(clip_folder, "copy"))
    config = json.loads((copy / "config.json").read_text())
    weights = load_file(copy / "model.safetensors")
    embedding = "text_model.embeddings.token_embedding.weight"
    config["text_config"]["vocab_size"] -= 1
    (copy / "config.json").write_text(json.dumps(config))
    save_file({**weights, embedding: weights[embedding][:-1].clone()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="do not belong together"):
        load_reward("pickscore", str(copy))

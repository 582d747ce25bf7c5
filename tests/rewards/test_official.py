"""Official checkpoints in small: made in the official layout, loaded by our path, compared with the definition."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.models.auto.tokenization_auto import AutoTokenizer

from draftcli.errors import InputError
from draftcli.rewards import load_reward
from draftcli.rewards.catalogue import BUILT_IN_REWARDS
from draftcli.rewards.pixels import Preprocess
from draftcli.rewards.registry import blank_reward
from tests.rewards.references import (
    MEAN,
    STD,
    OfficialImageReward,
    OpenClip,
    as_pil,
    as_transformers,
    bert_tokenizer,
    clip_backbone,
    head,
    open_clip_tokens,
    pictures,
    score_by,
    seeded,
    sharp_pictures,
    slope_and_differences,
)

# Works without torchvision: a class of its own in release 5 of transformers, the only one in release 4.
ImageProcessor = getattr(transformers, "SiglipImageProcessorPil", transformers.SiglipImageProcessor)

PROMPTS = ["a red circle", "two blue squares on a lawn, far away", ""]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass
class Case:
    """A small checkpoint: its official tensors, the file they are in, and what its scores should be."""

    name: str
    tensors: dict[str, Tensor]
    file: Path
    backbone: Path
    edge: int
    official: Callable[[Tensor, list[str]], Tensor]

    def load(self, file: Path | None = None) -> Any:
        return load_reward(self.name, str(file or self.file), str(self.backbone))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("official")


@pytest.fixture(scope="module")
def cases(folder: Path, tiny_sdxl: Path) -> dict[str, Case]:
    made = [hps(folder, tiny_sdxl, "hpsv2"), hps(folder, tiny_sdxl, "hpsv2_1"), image_reward(folder)]
    made += [ict(folder, tiny_sdxl)]
    made += [aesthetic_on_clip(folder, "aesthetic"), aesthetic_on_clip(folder, "aesthetic_v1"), aesthetic_v2_5(folder)]
    return {case.name: case for case in made}


NAMES = ["hpsv2", "hpsv2_1", "imagereward", "ict", "aesthetic", "aesthetic_v1", "aesthetic_v2_5"]


def hps(folder: Path, tiny_sdxl: Path, name: str) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    network = seeded(lambda: OpenClip(len(tokenizer)), seed=len(name))
    file = folder / {"hpsv2": "HPS_v2_compressed.pt", "hpsv2_1": "HPS_v2.1_compressed.pt"}[name]
    # The published files hold half precision, beside other things.
    tensors = {key: tensor.half() for key, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": tensors}, file)
    network.load_state_dict(tensors)

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        return network.cosine(images, open_clip_tokens(tokenizer, prompts))

    return Case(name, tensors, file, tiny_sdxl / "tokenizer", 32, official)


def ict(folder: Path, tiny_sdxl: Path) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(tiny_sdxl / "tokenizer")
    network = seeded(lambda: OpenClip(len(tokenizer)), seed=9)
    tensors, file = as_transformers(network), folder / "pytorch_model.bin"
    torch.save(tensors, file)

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        return network.cosine(images, open_clip_tokens(tokenizer, prompts))

    return Case("ict", tensors, file, clip_backbone(folder / "clip_h", tokenizer), 32, official)


def image_reward(folder: Path) -> Case:
    vocabulary = bert_tokenizer(folder / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    network = seeded(lambda: OfficialImageReward(vocabulary + 2))
    file = folder / "ImageReward.pt"
    tensors = dict(network.state_dict())
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors, file)

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        tokens = torch.tensor([i + [0] * (35 - len(i)) for i in ids])
        mask = torch.tensor([[1] * len(i) + [0] * (35 - len(i)) for i in ids])
        return network(images, tokens, mask)

    return Case("imagereward", tensors, file, folder / "bert", 32, official)


def aesthetic_on_clip(folder: Path, name: str) -> Case:
    place = folder / "clip"
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 99}, vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    clip = seeded(lambda: CLIPModel(config))
    clip.save_pretrained(place)  # all of a CLIP, as on the hub; only the vision half is read
    layers = seeded(lambda: head(24, (0, 2, 4, 6, 7)) if name == "aesthetic" else torch.nn.Linear(24, 1), seed=3)
    prefix, file = {
        "aesthetic": ("layers.", "sac+logos+ava1-l14-linearMSE.pth"),
        "aesthetic_v1": ("", "sa_0_4_vit_l_14_linear.pth"),
    }[name]
    tensors = {f"{prefix}{key}": tensor for key, tensor in layers.state_dict().items()}
    torch.save(tensors, folder / file)

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        embedding = clip.visual_projection(clip.vision_model(pixel_values=(images - MEAN) / STD).pooler_output)
        embedding = embedding / embedding.square().sum(-1, keepdim=True).sqrt()
        return score_by(layers, embedding) if name == "aesthetic" else layers(embedding)[:, 0]

    return Case(name, tensors, folder / file, place, 32, official)


def aesthetic_v2_5(folder: Path) -> Case:
    place = folder / "siglip"
    config = SiglipConfig(
        text_config={**SMALL, "vocab_size": 99}, vision_config={**SMALL, "image_size": 28, "patch_size": 14}
    )
    siglip = seeded(lambda: SiglipModel(config))
    siglip.save_pretrained(place)
    layers = seeded(lambda: head(32, (0, 2, 4, 6, 8)), seed=4)
    tensors = {f"scoring_head.{key}": tensor.bfloat16() for key, tensor in layers.state_dict().items()}
    layers.load_state_dict({key.removeprefix("scoring_head."): tensor for key, tensor in tensors.items()})
    torch.save(tensors, folder / "aesthetic_predictor_v2_5.pth")

    def official(images: Tensor, prompts: list[str]) -> Tensor:
        embedding = siglip.vision_model(pixel_values=images * 2 - 1).pooler_output
        return score_by(layers, embedding / embedding.norm(dim=-1, keepdim=True))

    return Case("aesthetic_v2_5", tensors, folder / "aesthetic_predictor_v2_5.pth", place, 28, official)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_official_one(cases: dict[str, Case], name: str) -> None:
    case, reward = cases[name], cases[name].load()
    images = pictures(case.edge, case.edge)
    with torch.no_grad():
        official, ours = case.official(images, PROMPTS), reward(images, PROMPTS)
    assert reward.name == name
    torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-5)
    assert official.std() > 1e-4, "pictures and prompts differ, and so must their scores"
    assert not any(p.requires_grad for p in reward.parameters())
    assert {p.dtype for p in reward.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["hpsv2", "ict"])
def test_curly_quotation_marks_are_read_as_straight_ones(cases: dict[str, Case], name: str) -> None:
    """As open_clip's tokenizer does."""
    curly, straight, bare = (
        cases[name].load().embed_texts([text]) for text in ("it’s a “fox”", 'it\'s a "fox"', "its a fox")
    )
    assert torch.equal(curly, straight)
    assert not torch.equal(straight, bare)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(cases: dict[str, Case], name: str) -> None:
    """In float64, through resizing, cropping or padding of a picture that is not square."""
    slope, differences = slope_and_differences(cases[name].load(), pictures(40, 48, count=2), PROMPTS[:2])
    assert abs(differences) > 1e-7
    assert slope == pytest.approx(differences, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_an_unknown_and_a_misshapen_name_are_errors_that_say_which(
    cases: dict[str, Case], tmp_path: Path, name: str
) -> None:
    case, file = cases[name], tmp_path / "changed.safetensors"
    key = sorted(case.tensors)[len(case.tensors) // 2]
    plain = {k: t.clone() for k, t in case.tensors.items()}
    changes = [
        ({k: t for k, t in plain.items() if k != key}, f"lacks {key}"),
        ({**plain, "visual.surprise": torch.ones(2)}, "has an unknown visual.surprise"),
        ({**plain, key: torch.ones(7, 7, 7)}, key),
    ]
    for tensors, words in changes:
        save_file(tensors, file)
        with pytest.raises(InputError, match=words.replace(".", r"\.")) as caught:
            case.load(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_the_official_file_will_do(cases: dict[str, Case], name: str) -> None:
    reward = load_reward(name, str(cases[name].file.parent), str(cases[name].backbone))
    images = pictures(cases[name].edge, cases[name].edge, 1)
    torch.testing.assert_close(reward(images, PROMPTS[:1]), cases[name].load()(images, PROMPTS[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_without_network_it_says_which_file_to_put_where(cases: dict[str, Case], name: str) -> None:
    with pytest.raises(InputError, match=f"{cases[name].file.name}.*cannot be fetched".replace("+", r"\+")) as caught:
        load_reward(name)
    assert f"set rewards.{name}.pretrained to that file" in str(caught.value)
    with pytest.raises(InputError, match=rf"download it and set rewards\.{name}\.backbone"):
        load_reward(name, str(cases[name].file))


class Payload:
    """A pickle of this would run code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="such a file is not opened"):
        load_reward("aesthetic_v1", str(tmp_path / "evil.pth"))
    assert not Path("ran").exists()


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    for place, words in [
        (tmp_path / "text.pth", "text.pth"),
        (tmp_path / "list.pth", "not a state dict"),
        (tmp_path / "nowhere.pth", "neither a file, a folder nor a hub id"),
        (tmp_path, "has no file HPS_v2_compressed.pt"),
    ]:
        with pytest.raises(InputError, match=words):
            load_reward("hpsv2", str(place))


def test_a_backbone_of_another_kind_or_not_whole_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="is a bert model, not a CLIP"):
        load_reward("aesthetic", str(cases["aesthetic"].file), str(tmp_path))
    whole = CLIPModel.from_pretrained(cases["aesthetic"].backbone)
    tensors = {k: t.contiguous() for k, t in whole.state_dict().items() if "post_layernorm.bias" not in k}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not whole: lacks vision_model\.post_layernorm\.bias"):
        load_reward("aesthetic", str(cases["aesthetic"].file), str(tmp_path))
    tensors["vision_model.post_layernorm.bias"] = torch.ones(3)
    (tmp_path / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    with pytest.raises(InputError, match=r"post_layernorm\.bias (is \(3,\) where|has another shape)"):
        load_reward("aesthetic", str(cases["aesthetic"].file), str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_reward("aesthetic", str(cases["aesthetic"].file), str(tmp_path))


SIZES = [(96, 96), (96, 145), (150, 97), (56, 32), (20, 31)]
KINDS = [pictures, sharp_pictures]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_crop_is_torchvisions(size: tuple[int, int], kind: Callable[..., Tensor]) -> None:
    """ImageReward and the aesthetic predictors. Within 0.02 normalised units: Pillow rounds to 8 bits twice."""
    images = kind(*size)
    edge, (height, width) = 32, size
    long = [int(edge * side / min(size)) for side in size]
    top, left = (round((side - edge) / 2) for side in long)
    theirs = [
        np.asarray(p.resize(long[::-1], Image.Resampling.BICUBIC).crop((left, top, left + edge, top + edge)))
        for p in as_pil(images)
    ]
    expected = (torch.tensor(np.stack(theirs)).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    ours = Preprocess(edge, "crop_even")(images)
    assert (ours - expected).abs().max() < 0.02  # 1.3 of 255
    shifted = Preprocess(edge, "crop")(images)
    if height != width and any((side - edge) % 4 == 3 for side in long):
        assert (shifted - expected).abs().max() > 0.04, "half a pixel the other way is another picture"


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_hpsv2s(size: tuple[int, int]) -> None:
    """Its resize is of a float tensor: Pillow's own float mode computes the same filter, without any rounding."""
    images = pictures(*size)
    edge, scale = 32, 32 / max(size)
    height, width = (round(side * scale) for side in size)
    canvas = torch.zeros(3, 3, edge, edge)
    top, left = (edge - height) // 2, (edge - width) // 2
    for i, channel in itertools.product(range(3), range(3)):
        plane = Image.fromarray(images[i, channel].numpy())
        resized = torch.tensor(np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)))
        canvas[i, channel, top : top + height, left : left + width] = resized
    torch.testing.assert_close(Preprocess(edge, "pad")(images), (canvas - MEAN) / STD, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_squashing_is_siglips(size: tuple[int, int], kind: Callable[..., Tensor]) -> None:
    """Across first: by itself, Pillow 13 resizes some shapes down first, which saturates elsewhere."""
    images = kind(*size)
    across = [picture.resize((28, size[0]), Image.Resampling.BICUBIC) for picture in as_pil(images)]
    official = ImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs = torch.as_tensor(np.asarray(official(across, return_tensors="np")["pixel_values"]))
    ours = Preprocess(28, "squash", (0.5,) * 3, (0.5,) * 3)(images)
    assert (ours - theirs).abs().max() < 0.01  # 1.3 of 255


@pytest.mark.parametrize("name", [name for name, entry in BUILT_IN_REWARDS.items() if entry.parameters])
def test_without_weights_a_reward_has_its_official_size(name: str) -> None:
    """The catalogue's counts are those of the official architectures, which a memory plan takes."""
    network = blank_reward(name)
    assert network is not None
    assert network.name == name
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == BUILT_IN_REWARDS[name].parameters


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_a_reward_is_built_as_it_is_loaded(cases: dict[str, Case], name: str) -> None:
    """The same tensors, numbers of layers and sizes apart, and the same way of making a picture a square."""
    loaded, blank = cases[name].load(), blank_reward(name)
    assert blank is not None
    kinds = [{re.sub(r"layers?\.\d+", "layer", key) for key in network.state_dict()} for network in (loaded, blank)]
    assert kinds[0] == kinds[1]
    assert (blank.preprocess.fit, type(blank)) == (loaded.preprocess.fit, type(loaded))

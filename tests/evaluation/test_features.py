"""Feature extractors against the libraries' own preprocessing, on tiny networks with random weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from draftcli.errors import InputError
from draftcli.evaluation.features import choose_features, load_features
from draftcli.rewards import load_reward


def test_dinov2_is_what_transformers_computes(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    network = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224)
    ).eval()
    network.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    scaled = picture.resize((341, 256), Image.Resampling.BICUBIC)
    cropped = scaled.crop((58, 16, 58 + 224, 16 + 224))
    pixels = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network(((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None]).last_hidden_state[:, 0]
    features = load_features(f"dinov2={tmp_path}")
    images = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    assert "CLS" in features.name
    assert torch.allclose(features(images), expected, atol=0.02), "PIL rounds to 8 bits between"
    assert features(images).shape == (1, 16)


def test_the_toys_clip_gives_the_embedding_its_reward_uses():
    reward, features = load_reward("toy"), load_features("toy")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embedding = torch.nn.functional.normalize(features(images), dim=-1)
    prompts = ["a red star", "a blue circle", "a green ring"]
    tokens = reward.tokenizer(prompts, padding="max_length", max_length=reward.tokenizer.model_max_length,
                              truncation=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        seen = reward.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        text = torch.nn.functional.normalize(reward.clip.text_projection(seen.pooler_output), dim=-1)
        expected = reward(images, prompts)
    assert torch.allclose(reward.clip.logit_scale.exp() * (embedding * text).sum(-1), expected, atol=1e-4)


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def hub(monkeypatch):
    """What there is of the default features: `hub(...)` names those that can be loaded; the others are as offline."""
    import draftcli.evaluation.features as module

    def there(*names):
        def load(name):
            if name in names:
                return replace(load_features("toy"), name=name)
            raise InputError(f"{name} cannot be loaded")

        monkeypatch.setattr(module, "load_features", load)

    return there


@pytest.mark.parametrize(
    ("at_hand", "trained", "taken"),
    [
        (("dinov2", "clip", "pickscore"), ["clip"], "dinov2"),
        (("clip", "pickscore"), ["brightness"], "clip"),
        (("clip", "pickscore"), ["aesthetic"], "pickscore"),  # stands on clip's ViT-L
        (("clip", "pickscore"), ["clip"], "pickscore"),
        (("clip", "pickscore"), ["hpsv2_1"], "clip"),
        (("clip", "pickscore"), ["package:mine"], "clip"),
    ],
)
def test_default_features_are_of_no_trained_reward(hub, at_hand, trained, taken):
    hub(*at_hand)
    features = choose_features(None, SDXL, {}, trained)
    assert (features.name, features.trained_on, features.caution) == (taken, (), "")


def test_where_nothing_else_is_at_hand_the_trained_rewards_own_are_taken_and_said(hub):
    hub("clip")
    judges = {"brightness": load_reward("brightness"), "toy": load_reward("toy")}
    got = choose_features(None, SDXL, judges, ["toy", "aesthetic"])
    assert got.trained_on == ("toy",)
    assert got.caution.startswith("Diversity is measured in features of toy, which was or may have been trained on")
    assert "dinov2 cannot be loaded" in got.caution
    assert choose_features(None, SDXL, judges, ["aesthetic"]).caution == "", "a held-out judge's features are fair"
    with pytest.raises(InputError, match="dinov2 cannot be loaded"):
        choose_features(None, SDXL, {"brightness": judges["brightness"]}, ["aesthetic"])


def test_the_toy_worlds_default_is_learned_from_nothing():
    judges = {"toy": load_reward("toy")}
    features = choose_features(None, "toy", judges, ["toy"])
    assert "no learning involved" in features.name
    assert features.caution == ""
    assert not list(features.network.parameters())
    assert choose_features("toy", "toy", judges, ["toy"]).caution, "asked for, and said"


def test_a_module_of_ones_own_and_the_oracles_reading():
    from draftcli.toy.world import Scene, render

    features = load_features("draftcli.toy.features:reading")
    scenes = [
        Scene(shape="circle", colour=c, size="large", place="centre", background="white") for c in ("red", "blue")
    ]
    pictures = [torch.from_numpy(render(scene, np.random.default_rng(0))) for scene in scenes]
    got = features(torch.stack(pictures))
    assert got.shape == (2, 16)
    assert (got[0, 3:6] - got[1, 3:6]).abs().max() > 0.4, "the shape's colour differs"
    assert torch.allclose(got[0, 6:], got[1, 6:], atol=0.05), "and nothing else"


@pytest.mark.parametrize("folder", ["nothing", "bert"])
def test_other_weights_are_refused_in_one_line(tmp_path, folder):
    (tmp_path / folder).mkdir()
    if folder == "bert":
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"cannot be loaded|not a DINOv2"):
        load_features(f"dinov2={tmp_path / folder}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"not whole: lacks layernorm\.weight; download"),
        ("several missing", r"not whole: lacks \S+ and 3 more; download"),
        (
            "another shape",
            r"not whole: layernorm\.weight (is \(3,\) where \(16,\)|has another shape)",
        ),
        ("cut off", "cannot be loaded"),
    ],
)
def test_weights_that_are_not_whole_are_refused_by_name(tmp_path, capfd, kind, words):
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load(file.read_bytes())
    if kind == "missing":
        del tensors["layernorm.weight"]
    if kind == "several missing":
        tensors = {key: t for key, t in tensors.items() if "norm1" not in key and "norm2" not in key}
    if kind == "another shape":
        tensors["layernorm.weight"] = torch.ones(3)
    file.write_bytes(b"{" if kind == "cut off" else save(tensors, {"format": "pt"}))
    capfd.readouterr()
    with pytest.raises(InputError, match=words):
        load_features(f"dinov2={tmp_path}")
    assert "layernorm" not in "".join(capfd.readouterr()), "the message alone says it"

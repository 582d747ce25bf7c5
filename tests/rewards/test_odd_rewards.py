"""Rewards of every form that people bring, for train, eval and check: taken where it is clear what is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import draftcli
from draftcli.errors import InputError
from draftcli.evaluation.features import load_features
from draftcli.evaluation.measure import Judges
from draftcli.rewards.registry import load_reward
from tests import odd_rewards
from tests.command import Result, draftp, recipe
from tests.tiny import PROMPTS, tiny_model

MODULE, FILE = "tests.odd_rewards", Path(odd_rewards.__file__)
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SCORES = odd_rewards.function(IMAGES, PROMPTS)
COMMANDS = ["train", "eval", "check"]


def ask(command: str, reward: str, model: Path) -> Result:
    """One of the three commands with this reward."""
    if command == "check":
        return draftp("rewards", "check", reward, "--size", "64x64")
    if command == "train":
        sections: dict[str, Any] = {"data": {"prompts": PROMPTS}, "trainer": {"max_steps": 1, "save_interval": 1}}
        preset = recipe(model, **sections)
        return draftp("train", "--preset", preset, "--reward", reward, "--output", "run")
    for folder, shift in (("a", 0), ("b", 40)):
        Path(folder).mkdir()
        entries = []
        for i, prompt in enumerate(PROMPTS):
            pixels = np.random.default_rng(i).integers(0, 200, (16, 16, 3), np.uint8)
            pixels[..., 0] += shift
            Image.fromarray(pixels).save(f"{folder}/{i}.png")
            entries.append(json.dumps({"file": f"{i}.png", "prompt": prompt, "seed": 0}) + "\n")
        Path(folder, "index.jsonl").write_text("".join(entries))
    return draftp("eval", "a", "b", "--reward", reward, "--features", "toy", "--output", "out")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["function", "instance", "Class", "factory"])
def test_a_function_an_object_a_class_and_a_factory_all_work(form: str, command: str, tiny_sdxl: Path) -> None:
    result = ask(command, f"{FILE if form == 'function' else MODULE}:{form}", tiny_sdxl)
    assert (result.code, [*filter(lambda line: "error" in line, result.err.splitlines())]) == (0, []), result.err


@pytest.mark.parametrize("form", ["function", "Class", "instance", "network", "Network", "factory", "partly"])
def test_in_python_too(form: str, tiny_sdxl: Path) -> None:
    model = tiny_model(tiny_sdxl)
    model.reward_model = draftcli.get_reward_model(getattr(odd_rewards, form))
    _, found = model.get_loss_and_metrics(PROMPTS)
    other = tiny_model(tiny_sdxl)
    other.reward_model = odd_rewards.function  # as it is
    assert other.get_loss_and_metrics(PROMPTS)[1] == found


@pytest.mark.parametrize(
    ("form", "close"),
    [
        ("column", 0), ("double", 0), ("half", 1e-3), ("brain", 1e-2), ("list_of_tensors", 0),
        ("list_of_small_tensors", 0), ("with_default", 0),
    ],
)  # fmt: skip
def test_what_is_as_good_is_taken_with_its_gradient(form: str, close: float) -> None:
    images = IMAGES.clone().requires_grad_()
    scores = draftcli.get_reward_model(f"{MODULE}:{form}")(images, PROMPTS)
    assert scores.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(scores.float(), SCORES, atol=close, rtol=close)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient[:, 0], torch.full((4, 16, 16), 1 / 256), atol=0, rtol=0.01)


@pytest.mark.parametrize("form", ["array", "list_of_numbers", "whole_numbers", "bools", "detached"])
def test_numbers_without_gradient_judge_and_do_not_train(form: str, tiny_sdxl: Path) -> None:
    scores = draftcli.get_reward_model(f"{MODULE}:{form}")(IMAGES, PROMPTS)
    expected = {"whole_numbers": SCORES.mul(100).trunc(), "bools": (SCORES > 0).float()}.get(form, SCORES)
    assert torch.equal(scores, expected)
    assert ask("eval", f"{MODULE}:{form}", tiny_sdxl).code == 0
    checked = ask("check", f"{MODULE}:{form}", tiny_sdxl)
    assert (checked.code, "gradient     BAD  blocked" in checked.out) == (1, True)
    trained = ask("train", f"{MODULE}:{form}", tiny_sdxl)
    refused(trained, f"reward {MODULE}:{form} cannot be trained on")


REFUSED = [
    ("scalar", "returned a tensor of shape (), float32 for 2 images; expected one score for each: a float tensor of"),
    ("two_columns", "a tensor of shape (2, 2), float32"),
    ("row", "a tensor of shape (1, 2), float32"),
    ("dictionary", "a dict of 1 (Tensor)"),
    ("pair", "a tuple of 2 (Tensor, dict)"),
    ("nothing", "returned None"),
    ("list_of_words", "a list of 2 (str)"),
    ("too_long", "a list of 4 (Tensor)"),
    ("array_of_objects", "a NumPy array of shape (2,), object"),
    ("complex_numbers", "a tensor of shape (2,), complex64"),
    ("of_bytes", "with values in [0, 1], and their prompts (ValueError: expected pixels in [0, 255])"),
    ("one_argument", "is called as one_argument(images: "),
    ("anything", "is called as anything(*arguments"),
    ("Needy", "cannot be made (TypeError: "),
    ("number", "is an int, which cannot be called"),
    ("makes_a_class", "its factory returned the class Class"),
    ("makes_nothing", "its factory returned a NoneType"),
]


def refused(result: Result, words: str) -> None:
    assert result.code == 2, result
    assert words in result.err
    assert len(result.err.splitlines()) == 1, result.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("form", "words"), REFUSED)
def test_the_rest_is_refused_in_one_line_before_anything_is_loaded(form: str, words: str, command: str) -> None:
    result = ask(command, f"{MODULE}:{form}", Path("nobody/no-such-model"))
    refused(result, words)
    assert f"{MODULE}:{form}" in result.err


@pytest.mark.parametrize("form", ["dictionary", "scalar", "column", "nothing"])
def test_a_reward_that_is_assigned_as_it_is_must_give_scores(form: str, tiny_sdxl: Path) -> None:
    for two_stage in (True, False):
        model = tiny_model(tiny_sdxl, sharding={"two_stage": two_stage})
        model.reward_model = getattr(odd_rewards, form)
        with pytest.raises(InputError, match=r"model\.reward_model returned a .* for 2 images"):
            model.get_loss_and_metrics(PROMPTS)


@pytest.mark.parametrize("value", [odd_rewards.Class, 7, "toy"])
def test_what_is_no_reward_cannot_be_assigned(value: Any, tiny_sdxl: Path) -> None:
    with pytest.raises(InputError, match=r"expected what is called as reward\(images, prompts\)"):
        tiny_model(tiny_sdxl).reward_model = value


def test_options_are_for_classes_and_factories() -> None:
    with pytest.raises(InputError, match="takes no pretrained: it is a reward already"):
        load_reward(f"{MODULE}:function", pretrained="weights.pt")


def test_settings_of_a_reward_in_a_file() -> None:
    cfg = draftcli.load_config(
        None, [f"rewards.{FILE}:function.weight=2", f"rewards.{FILE}:function.micro_batch_size=1"]
    )
    assert cfg.rewards[f"{FILE}:function"].weight == 2
    assert torch.equal(draftcli.get_reward_model(cfg)(IMAGES, PROMPTS), 2 * SCORES)


def test_a_function_that_was_edited_is_asked_anew() -> None:
    def fingerprint(factor: int) -> str:
        path = Path(f"{factor}.py")
        path.write_text(f"def red(images, prompts):\n    return images.mean((1, 2, 3)) * {factor}\n")
        reward = draftcli.get_reward_model(f"{path}:red")
        return Judges({"red": reward}, load_features("toy"), torch.device("cpu")).fingerprint

    assert fingerprint(1) != fingerprint(2)


def test_a_file_finds_its_neighbours_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/beside_it.py").write_text("SCALE = 3\n")
    (tmp_path / "mine/own.py").write_text(
        "from beside_it import SCALE\n\n\ndef red(images, prompts):\n    return SCALE * images.mean((1, 2, 3))\n"
    )
    assert draftcli.get_reward_model("mine/own.py:red")(IMAGES, PROMPTS) == pytest.approx(3 * IMAGES.mean((1, 2, 3)))
    for name, words in [("mine/none.py:red", "no file"), ("mine/own.py:blue", "has no 'blue'"), ("mine:red", "'red'")]:
        refused(draftp("rewards", "check", name), words)

"""`draftp rewards`: what it finds, and a plug-in that is installed as the documentation says."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from draftcli.rewards.check import PROMPTS, check_reward
from draftcli.rewards.protocol import Reward
from tests.command import draftp

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


class Mean:
    """Sound."""

    name = "mean"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Blocked(Mean):
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts).detach()


class Zero(Mean):
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts) * 0 + 1


class Nan(Mean):
    """Finite, and without a finite gradient."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts) + (images - images).square().sum((1, 2, 3)).sqrt()


class Wrong(Mean):
    """A straight-through trick: the gradient is not that of the score."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        score = super().__call__(images, prompts)
        return score.square().detach() + 3 * (score - score.detach())


class Centred(Mean):
    """What a picture is worth hangs on its neighbours."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        score = super().__call__(images, prompts)
        return score - score.mean()


class Restless(Mean):
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts) + 0.1 * torch.rand(len(prompts))


class Infinite(Mean):
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts) / 0


class Jury(Blocked):
    differentiable = False


class Network(nn.Module):
    name = "network"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.layer(images.to(self.layer.weight)).tanh().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("reward", "what", "words"),
    [
        (Blocked(), "gradient", "blocked"), (Zero(), "gradient", "zero"), (Nan(), "gradient", "not finite"),
        (Wrong(), "slope", "finite differences"), (Centred(), "batch", "alone and among others"),
        (Restless(), "determinism", "twice"), (Infinite(), "range", "inf"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_and_named(reward: Reward, what: str, words: str) -> None:
    verdict = check_reward(reward, (32, 24))
    bad = [finding for finding in verdict.findings if finding.good is False]
    assert [finding.what for finding in bad][:1] == [what]
    assert words in bad[0].words
    assert not verdict.trains


@pytest.mark.parametrize("reward", [Mean(), Network()])
def test_a_sound_reward_trains(reward: Reward) -> None:
    verdict = check_reward(reward, (32, 24))
    assert verdict.trains, verdict
    assert not [finding for finding in verdict.findings if finding.good is False]


class Million(Mean, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000, 1000))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images.to(self.weight).mean((1, 2, 3), keepdim=True) * self.weight).mean((1, 2, 3))

    __call__ = nn.Module.__call__


def test_the_memory_is_that_of_the_weights_as_they_are() -> None:
    """Not of the float64 that slopes are compared in; and weights are not kept for each image as well."""
    memory = next(finding.words for finding in check_reward(Million(), (8, 8)).findings if finding.what == "memory")
    assert memory.startswith("weights 4.0 MB, ")
    assert memory.endswith("0.0 MB an image while its gradient is held")


def test_a_reward_that_says_it_only_judges() -> None:
    verdict = check_reward(Jury(), (32, 24))
    assert (verdict.trains, verdict.judges) == (False, True)
    assert "evaluation only" in verdict.words


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("toy", 0, "toy: usable for training and for evaluation"),
        ("toy_oracle", 0, "toy_oracle: usable for evaluation only"),
        ("compressibility", 0, "usable for training"),
        ("tests.example_rewards:red", 0, "does not matter to the score"),
        ("tests.rewards.test_check:Blocked", 1, "gradient     BAD  blocked"),
        ("tests.example_rewards:broken", 1, "not usable as it is"),
    ],
)
def test_check_by_its_command_line(name: str, code: int, words: str) -> None:
    result = draftp("rewards", "check", name, "--size", "64x48")
    assert (result.code, result.err) == (code, "")
    assert words in result.out


def test_bad_input_is_one_line() -> None:
    for arguments, words in [(["pickscoer"], "did you mean pickscore"), (["toy", "--size", "big"], "HEIGHTxWIDTH")]:
        result = draftp("rewards", "check", *arguments)
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1


def test_list_names_all_and_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['draftp', 'rewards', 'list']\nfrom draftcli.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for words in ("hpsv2_1", "Apache-2.0", "3.9 GB in memory", "licence not stated", "AGPL-3.0", "toy_oracle"):
        assert words in result.stdout
    names = draftp("rewards", "list", "--quiet").out.split()
    assert {"pickscore", "imagereward", "aesthetic_v2_5", "brightness"} <= set(names)


def test_the_documented_plug_in_installs_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by pip from the two files in docs/rewards.md, found by its entry point, checked by the command."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for language, name in (("python", "sharpness.py"), ("toml", "pyproject.toml")):
        block = re.search(rf"```{language}\n# {name}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        assert block is not None
        (source / name).write_text(block[1])
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    install += ["--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    assert "sharpness       plug-in of sharpness" in draftp("rewards", "list").out
    result = draftp("rewards", "check", "sharpness", "--size", "40x32")
    assert result.code == 0, result.out
    assert "sharpness: usable for training" in result.out


class SilentOnTheFirst(Mean):
    """NaN, no opinion, on the first prompt: in training such an image counts 0."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        silent = torch.tensor([prompt == PROMPTS[0] for prompt in prompts])
        return super().__call__(images, prompts).masked_fill(silent, float("nan"))


def test_a_reward_that_is_silent_on_a_prompt_is_checked_on_another() -> None:
    assert check_reward(SilentOnTheFirst()).trains

"""The base's part of validation is kept by what its judges are, not by what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from draftcli.rewards.fingerprint import code_and_weights
from draftcli.rewards.wrappers import InMicroBatches, as_reward
from draftcli.runs import Run
from tests.command import Result, draftp, recipe

OWN = """
from pathlib import Path
import torch

def coded(images, prompts):
    return FACTOR * images[:, 0].mean((1, 2))

class Named:
    def __init__(self, pretrained):
        self.factor = float(Path(pretrained).read_text())
    def __call__(self, images, prompts):
        return self.factor * images[:, 0].mean((1, 2))

class Found(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(float(Path("factor.txt").read_text())))
    def forward(self, images, prompts):
        return self.factor * images[:, 0].mean((1, 2))
"""


def write(folder: str, factor: int, code: int = 1) -> Path:
    """A folder with rewards of one's own."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "own.py").write_text(OWN.replace("FACTOR", str(code)))
    Path(folder, "factor.txt").write_text(str(factor))
    return Path(folder)


def train(preset: Path, reward: str, output: str, *settings: str) -> Result:
    options = [text for setting in settings for text in ("--set", setting)]
    return draftp("train", "--preset", preset, "--reward", reward, "--output", output, *options)


@pytest.mark.parametrize("held_out", [False, True], ids=["trained", "held out"])
@pytest.mark.parametrize("what", ["coded", "Named", "Found"])
def test_another_judge_of_the_same_name_judges_the_base_anew(tiny_sdxl, monkeypatch, what, held_out):
    """Its code, in another working folder; a file that a setting names; weights that it finds by itself."""
    root, name = Path.cwd(), f"own.py:{what}"
    data = {"validation_prompts": ["a red dog"], "validation_cache": str(root / "shared")}
    preset = recipe(tiny_sdxl, root / "own.yaml", data=data, trainer={"max_steps": 1, "val_check_interval": 1})
    settings = ["held_out_rewards=[own.py:" + what + "]"] if held_out else []
    if what == "Named":
        settings += [f"{'held_out_rewards' if held_out else 'rewards'}.{name}.pretrained=factor.txt"]
    found: list[float] = []
    for i, factor in enumerate((1, 3, 3)):
        here = write("first" if factor == 1 else "second", 1, factor) if what == "coded" else write("first", factor)
        with monkeypatch.context() as patch:
            patch.chdir(here)
            result = train(preset, "brightness" if held_out else name, f"run-{i}", *settings)
            assert result.code == 0, result.err
            lines = Run(Path(f"run-{i}")).validations()
        assert len({line["rewards"][name]["base"] for line in lines}) == 1
        assert lines[0]["rewards"][name]["difference"] == 0, "before the first step tuned is the base"
        found.append(lines[0]["rewards"][name]["base"])
    assert found == pytest.approx([found[0], 3 * found[0], 3 * found[0]])
    assert found[0] != 0
    assert len(list(Path("shared").iterdir())) == 2, "the same judge finds what was kept"


def test_a_run_whose_rewards_file_was_edited_says_so(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={"max_steps": 1, "save_interval": 1, "val_check_interval": 0})
    write(".", 1)
    assert train(preset, "own.py:coded", "run").code == 0
    write(".", 1, code=2)
    result = train(preset, "own.py:coded", "run", "trainer.max_steps=2")
    assert result.code == 2
    assert "rewards.own.py:coded is as it was, but the file is another" in result.err
    assert result.err.count("\n") == 1


def test_weights_are_known_by_every_value_and_by_nothing_else():
    def network(weight: float = 0.0, buffer: float = 0.0) -> nn.Module:
        made = nn.Linear(300, 20_000, bias=False).to(torch.bfloat16)
        made.register_buffer("mean", torch.full((3,), buffer, dtype=torch.float64))
        with torch.no_grad():
            made.weight.fill_(0.5)
            made.weight[-1, -1] += weight
        return made

    plain = code_and_weights(network())
    assert plain == code_and_weights(network())
    assert plain == code_and_weights(InMicroBatches(as_reward(network(), "red"), 2)), "wrappers change no score"
    others = [network(weight=2**-8), network(buffer=1e-12), network().float(), nn.Bilinear(1, 1, 1)]
    assert len({plain, *map(code_and_weights, others)}) == 5
    assert code_and_weights(network(weight=float("nan"))) == code_and_weights(network(weight=float("nan")))

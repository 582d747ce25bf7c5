"""Runs of the first version go on, draw and are exported with the code of today (tests/first_version/README.md).

Tolerance: networks run in float32, and sums may be taken in another order. The code that wrote the runs gives every
figure to the last digit; a continuation that begins its moments, its moving average or the statistics of its rewards
anew is off by more than a percent.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.command import draftp
from tests.first_version.make import KINDS, LORA, PROMPT, base_digest, make_model

KEPT = Path(__file__).parents[1] / "first_version"
EXPECTED = KEPT / "expected"
TOLERANCE = 1e-4
FIGURES = {"step", "loss", "reward", "kl_penalty", "grad_norm", "lr"}
TEXT_ENCODER = "1cc902e14571"  # how the sha256 of the base's first text encoder begins
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(autouse=True)
def runs(working_directory):
    """Copies of the runs in the working directory, and the base that they name."""
    make_model()
    if not base_digest("text_encoder").startswith(TEXT_ENCODER):
        pytest.skip("transformers 4 draws other weights, so that this base has other text encoders")
    digest = json.loads((EXPECTED / "base.json").read_text())["sha256 of the UNet's weights"]
    assert base_digest() == digest, "this machine or torch makes another base: nothing here can be compared"
    for kind in KINDS:
        shutil.copytree(KEPT / kind, kind)


def done(*arguments):
    result = draftp(*arguments)
    assert result.code == 0, result.err
    return result


def go_on(kind):
    """Its own settings, as the first version wrote them, and two steps more."""
    return done("train", "--preset", Path(kind, "config.yaml"), "--output", kind, "--set", "trainer.max_steps=4")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@each_kind
def test_a_run_goes_on_as_it_would_have(kind):
    assert f"resuming {kind} after step 2" in go_on(kind).out
    found, expected = lines(Path(kind, "metrics.jsonl")), lines(EXPECTED / f"{kind}.jsonl")
    assert found[:2] == expected[:2], "what was logged stays"
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        compared = FIGURES | {name for name in theirs if name.startswith("reward/")}
        assert {name: ours[name] for name in compared} == pytest.approx(
            {name: theirs[name] for name in compared}, rel=TOLERANCE
        )


def test_the_moving_average_goes_on_too():
    go_on("lora")
    found, expected, before = (
        load_file(folder / LORA) for folder in (Path("lora/final"), EXPECTED, KEPT / "lora/final")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = (tensor - before[name]).norm()
        assert moved > 0
        assert (found[name] - tensor).norm() < 1e-2 * moved


@each_kind
def test_a_run_draws_its_picture(kind):
    """To a step of 8 bits; the base's own picture is another."""
    done("sample", kind, "--prompt", PROMPT, "--base", "--output", "pictures")
    tuned, base = (pixels(next(Path("pictures").glob(f"*-{network}.png"))) for network in ("tuned", "base"))
    expected = pixels(EXPECTED / f"{kind}.png")
    assert np.abs(tuned - expected).max() <= 1
    assert np.abs(base - expected).max() > 3


@each_kind
def test_a_checkpoint_draws(kind):
    done("sample", Path(kind, "step-000002"), "--prompt", PROMPT, "--output", "pictures")
    assert len(list(Path("pictures").glob("*-tuned.png"))) == 1


def test_the_lora_is_exported():
    """Every layer's update is as large as before; the command itself compares what it wrote with base + adapter."""
    done("merge-lora", "lora", "--format", "kohya", "--output", "out.safetensors")
    kohya, lora = load_file("out.safetensors"), load_file(KEPT / "lora" / "final" / LORA)
    found, expected = [], []
    for layer in {name.rpartition(".")[0] for name in kohya if name.endswith(".alpha")}:
        up, down = kohya[f"{layer}.lora_up.weight"], kohya[f"{layer}.lora_down.weight"]
        found.append(size(up, down, kohya[f"{layer}.alpha"] / len(down)))
    settings = KINDS["lora"]["peft"]
    for layer in {name.rpartition(".lora_")[0] for name in lora}:
        up, down = lora[f"{layer}.lora_B.weight"], lora[f"{layer}.lora_A.weight"]
        expected.append(size(up, down, settings["alpha"] / settings["rank"]))
    assert len(found) > 4
    assert sorted(found) == pytest.approx(sorted(expected), rel=TOLERANCE)


def size(up, down, scale):
    """The norm of a layer's update."""
    return float((scale * up.flatten(1) @ down.flatten(1)).norm())


def test_its_model_cards_and_scripts_find_what_they_import():
    """`model_path` is in the cards of runs of the toy; the folder by its name and the names of layers, in scripts."""
    import draftcli.core.original_names
    import draftcli.core.sdxl

    toy = draftcli.core.sdxl.model_path("toy")
    assert draftcli.core.sdxl.model_path("a/folder") == "a/folder"
    assert toy == f"{draftcli.core.sdxl.BUILT_IN['toy']}" == os.fspath(draftcli.core.sdxl.BUILT_IN["toy"])
    assert Path(toy, "model_index.json").is_file()
    modules = ["conv_in", "down_blocks.0.resnets.0.conv1"]
    names = draftcli.core.original_names.original_unet_names(modules)
    assert names == {"conv_in": "input_blocks.0.0", "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2"}

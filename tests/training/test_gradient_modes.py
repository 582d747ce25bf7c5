"""A whole run by each gradient mode: trained, stopped and resumed bit for bit, drawn from and exported."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from draftcli.core.gradient.mode import mode_names
from tests.command import draftp, recipe

OF_THE_QUICK_SUITE = {"sparse", "random_k"}
NAMES = [
    name if name in OF_THE_QUICK_SUITE else pytest.param(name, marks=pytest.mark.slow(reason="more of the same"))
    for name in mode_names()
]


def trained(preset: Path, run: str, *steps: int) -> tuple[dict, list[dict]]:
    """The weights, and the log without what the clock says, of a run in as many sessions as there are `steps`."""
    for last in steps:
        result = draftp("train", "--preset", preset, "--output", run, "--set", f"trainer.max_steps={last}")
        assert result.code == 0, result.err
    clock = {"seconds", "images_per_second", "memory_gib"}
    lines = map(json.loads, filter(None, (Path(run) / "metrics.jsonl").read_text().split("\n")))
    log = [{key: value for key, value in line.items() if key not in clock} for line in lines]
    return load_file(Path(run) / "final" / "pytorch_lora_weights.safetensors"), log


def test_a_run_with_a_prefix_of_its_own(tiny_sdxl):
    """Resumed bit for bit; the card and the plan tell it, and validation draws as without it."""
    data = {"prompts": ["a red cat", "a blue dog", "a green bird"], "validation_prompts": ["a red dog"]}
    sections = {"data": data, "trainer": {"val_check_interval": 4, "micro_batch_size": 2, "global_batch_size": 4}}
    plain = recipe(tiny_sdxl, Path("plain.yaml"), **sections)
    preset = recipe(tiny_sdxl, Path("prefix.yaml"), draftp={"truncation_steps": 1, "prefix_steps": 4}, **sections)
    whole, parts = trained(preset, "whole", 4), trained(preset, "parts", 2, 4)
    assert parts[1] == whole[1]
    assert all(parts[0][key].equal(whole[0][key]) for key in whole[0])
    assert "before them 4 steps of dpmpp_2m instead" in (Path("whole") / "final" / "README.md").read_text()
    rows = draftp("train", "--preset", preset, "--dry-run").out.splitlines()
    (before,) = (row for row in rows if row.startswith("tuned, without gradient"))
    assert before.split()[-2] == "8"
    trained(plain, "without", 1)
    base = [load_file(Path(run) / "samples" / "base.safetensors") for run in ("whole", "without")]
    assert all(base[0][key].equal(base[1][key]) for key in base[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_every_mode(tiny_sdxl, name):
    settings = yaml.safe_load(recipe(tiny_sdxl).read_text())
    settings["draftp"] = {"gradient": name, "kl_coeff": 0.1, "detach_uncond": name == "sparse"}
    settings["sampling"]["steps"] = 4
    preset = Path("mode.yaml")
    preset.write_text(yaml.safe_dump(settings))
    whole, parts = trained(preset, "whole", 4), trained(preset, "parts", 2, 4)
    assert parts[1] == whole[1]
    assert all(parts[0][key].equal(whole[0][key]) for key in whole[0])
    assert any(tensor.abs().max() > 0 for key, tensor in whole[0].items() if "lora_B" in key), "it learned something"
    assert "sampler steps" in (Path("whole") / "final" / "README.md").read_text()
    assert "tuned, with gradient" in draftp("train", "--preset", preset, "--dry-run").out
    assert draftp("sample", "whole", "--prompt", "a red circle", "--output", "drawn").code == 0
    merged = draftp("merge-lora", "whole", "--format", "kohya", "--output", "lora.safetensors", "--verify", "keys")
    assert merged.code == 0, merged.err


def test_the_k_of_a_recipe_does_not_stand_in_the_way_of_another_mode(tiny_sdxl):
    """Not even above N, where the mode does not use it; and one that is given beside that mode is warned about."""
    command = ["train", "--preset", recipe(tiny_sdxl), "--dry-run", "--set=draftp.gradient=refl"]
    command += ["--set=sampling.steps=1"]
    silent, said = draftp(*command), draftp(*command, "--set=draftp.truncation_steps=2")
    assert (silent.code, silent.err) == (0, "")
    assert said.code == 0
    assert said.err.startswith("warning: draftp.truncation_steps 2 has no effect with draftp.gradient refl")

"""Runs whose weights are split over processes (FSDP2) or copied (ddp) equal the run of one process: two and three
gloo processes on a CPU, the real command line, float64.

Everything is drawn once for the whole file: a run of one process of each case, and the same on several.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from draftcli.config import load_config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.ranks import open_ranks
from draftcli.rewards import get_reward_model
from draftcli.runs import Run
from draftcli.sampling.sheet import FOOTER
from draftcli.training.checkpoint import load_newest, load_tensors, save_checkpoint
from draftcli.training.step import Trainer
from tests.command import draftp, recipe
from tests.ranks import in_ranks, train_in_ranks
from tests.tiny import one_layer_lora

FULL = {"peft": {"peft_scheme": "none"}, "optim": {"lr": 1e-3}}
CASES = {
    "lora": {"draftp": {"truncation_steps": 2}},
    "full": {"draftp": {"truncation_steps": 1}, **FULL},
    "lora of one gradient step": {"draftp": {"truncation_steps": 1}},
    "full, two gradient steps": {"draftp": {"truncation_steps": 2}, **FULL},
    "few steps": {
        "sampling": {"sampler": "lcm", "timesteps": [999, 499, 259], "steps": 3, "scale": 1.0},
        "draftp": {"truncation_steps": 3},
    },
}
# How the processes share the work, and on how many.
WAYS = {"ddp": {"strategy": "ddp"}, "fsdp": {"strategy": "fsdp"}, "hybrid": {"strategy": "fsdp", "shard_size": 2}}
slow = pytest.mark.slow(reason="more of the same: another K, another sampler, another number of processes")
RUNS = [
    ("lora", "fsdp", 2),
    ("full", "fsdp", 3),
    ("full", "ddp", 2),
    pytest.param("lora", "ddp", 3, marks=slow),
    pytest.param("lora", "fsdp", 3, marks=slow),
    pytest.param("full", "fsdp", 2, marks=slow),
    pytest.param("lora of one gradient step", "fsdp", 2, marks=slow),
    pytest.param("full, two gradient steps", "fsdp", 2, marks=slow),
    pytest.param("full", "hybrid", 4, marks=slow),
    pytest.param("lora", "hybrid", 4, marks=slow),
    pytest.param("few steps", "fsdp", 2, marks=slow),
]


def case_recipe(folder: Path, tiny: Path, case: str, **sections) -> Path:
    """Two steps of twelve pictures, at every one a checkpoint, five pictures to validate: shares differ by one."""
    base = {
        "model": {"pretrained": str(tiny), "device": "cpu", "precision": "fp64"},
        "draftp": {"kl_coeff": 0.1},
        "data": {"prompts": ["a red cat", "a blue dog"], "validation_prompts": ["a", "b", "c", "d", "e"]},
        "trainer": {"max_steps": 2, "micro_batch_size": 1, "global_batch_size": 12, "save_interval": 1},
        "ema": {"decay": 0.9},
    }
    base["trainer"]["val_check_interval"] = 2
    if case == "few steps":  # of a model with a LoRA under it, as the LCM-LoRA
        base["model"]["loras"] = [f"{one_layer_lora(folder / 'under.safetensors')}=0.5"]
    for name, section in [*CASES[case].items(), *sections.items()]:
        base[name] = {**base.get(name, {}), **section}
    return recipe(tiny, folder / f"{case}.yaml", **base)


@pytest.fixture(scope="module")
def alone(tiny_sdxl, tmp_path_factory):
    """The run of one process, by case; made when asked for."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def run_of(case: str) -> Path:
        if case not in known:
            done = draftp(
                "train", "--preset", case_recipe(folder, tiny_sdxl, case), "--output", folder / case, "--quiet"
            )
            assert done.code == 0, done.err
            known[case] = folder / case
        return known[case]

    return run_of


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    lora = folder / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.is_file() else folder / "unet/diffusion_pytorch_model.safetensors")


def made_by(run: Path) -> str:
    """The hash of what the kept part of validation was made of."""
    with safe_open(run / "samples/base.safetensors", "pt") as file:
        return file.metadata()["made_by"]


def moments(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The optimizer's moments and the average in a checkpoint, whole."""
    folder = Run(run).step_folder(step) / "training"
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return load_tensors(folder, lambda name: torch.zeros(known[name].size))


def assert_close(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("case", "way", "processes"), RUNS)
def test_several_processes_equal_one(alone, tiny_sdxl, tmp_path, case, way, processes):
    one, preset = alone(case), case_recipe(tmp_path, tiny_sdxl, case, sharding=WAYS[way])
    ranks = train_in_ranks(processes, preset, "several")
    assert [code for code, _ in ranks] == [0] * processes, ranks
    several = Path("several")
    for a, b in zip(lines(several / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
        for name in ("loss", "reward", "kl_penalty", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=1e-9), name
    for a, b in zip(lines(several / "validation.jsonl"), lines(one / "validation.jsonl"), strict=True):
        assert a["rewards"]["tests.example_rewards:red"] == pytest.approx(
            b["rewards"]["tests.example_rewards:red"],
            abs=1e-7,  # pictures are judged in float32
        )
    for sheet in sorted(one.glob("samples/*.png")):
        pictures = [Image.open(run / "samples" / sheet.name) for run in (one, several)]
        pictures = [image.crop((0, 0, image.width, image.height - FOOTER)) for image in pictures]  # it names the run
        assert max(high for _, high in ImageChops.difference(*pictures).getextrema()) <= 1, "rounded to 8 bits"
    assert made_by(several) == made_by(one), "another number of processes goes on with the same base"
    for folder in ("final", "step-000001", "step-000002"):
        assert_close(weights(several / folder), weights(one / folder))
        names = [
            sorted(f.name.removeprefix(run.name) for f in (run / folder).rglob("*") if "shard" not in f.name)
            for run in (one, several)
        ]
        assert names[0] == names[1]
    for step in (1, 2):
        assert_close(moments(several, step), moments(one, step))
    if way != "ddp":
        assert "weights sharded over them" in ranks[0][1]
        parts = {file.name[: len("shard-00001")] for file in (several / "step-000002/training").iterdir()}
        assert len(parts) >= (processes if way == "fsdp" else 2), "every process wrote its part"


def resave(jobs: list[tuple[Path, Path]], preset: Path) -> None:
    """Load the newest checkpoint of one run and save it again in another, in any number of processes."""
    cfg = load_config(preset)
    with open_ranks() as ranks:
        model = SDXLDRaFTPModel(cfg)
        model.reward_model = rewards = get_reward_model(cfg)
        if ranks.size > 1:
            ranks.lockstep = True
            model.configure_sharded_model()
        for source, target in jobs:
            trainer = Trainer(model, rewards, [], ranks)
            state, damaged = load_newest(Run(source), trainer)
            assert state is not None
            assert not damaged
            if ranks.is_main:
                target.mkdir()
            save_checkpoint(Run(target), state["step"], trainer, {"prompts": state["prompts"]}, 1)


@pytest.mark.parametrize("case", ["lora", pytest.param("full", marks=slow)])
def test_saved_on_n_processes_and_read_on_m_is_the_same_bit_for_bit(alone, tiny_sdxl, tmp_path, case):
    """All pairs of 1, 2 and 3: each number of processes saves the checkpoint of one; each reads what each saved."""
    one, preset = alone(case), case_recipe(tmp_path, tiny_sdxl, case, sharding={"strategy": "fsdp"})
    expected = weights(one / "step-000002"), moments(one, 2)
    assert {name.rpartition("/")[2] for name in expected[1]} == {"exp_avg", "exp_avg_sq", "average"}

    def by(count: int, jobs: list[tuple[Path, Path]]) -> None:
        if count == 1:
            resave(jobs, preset)
        else:
            assert in_ranks(count, lambda rank: resave(jobs, preset)) == [0] * count

    for n in (1, 2, 3):
        by(n, [(one, Path(f"saved-{n}"))])
    for m in (1, 2, 3):
        by(m, [(Path(f"saved-{n}"), Path(f"saved-{n}-{m}")) for n in (1, 2, 3)])
    for run in sorted(Path().glob("saved-*")):
        assert_equal(weights(run / "step-000002"), expected[0])
        assert_equal(moments(run, 2), expected[1])
    # And everything else of it.
    states = [torch.load(run / "step-000002/state.pt", weights_only=True) for run in (one, Path("saved-3-2"))]
    assert json.dumps(states[0], default=repr) == json.dumps(states[1], default=repr)


def test_a_run_goes_on_with_another_number_of_processes(alone, tiny_sdxl, tmp_path):
    """Step 1 by one process, step 2 by two with split weights: the run of one."""
    one = alone("lora")
    shutil.copytree(one, "run", ignore=shutil.ignore_patterns("step-000002", "final"))
    preset = case_recipe(tmp_path, tiny_sdxl, "lora", sharding=WAYS["fsdp"])
    ranks = train_in_ranks(2, preset, "run")
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert "resuming run after step 1" in ranks[0][1]
    assert_close(weights(Path("run/final")), weights(one / "final"))
    assert [line["step"] for line in lines(Path("run/metrics.jsonl"))] == [1, 2]

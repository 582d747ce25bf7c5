"""AdamW with its moments in 8 bits: near AdamW, resumed bit for bit, and as large as the plan says; and schedules."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from draftcli.config import OptimConfig, SchedConfig, check_config
from draftcli.errors import InputError
from draftcli.training.optimizer import SMALLEST, learning_rates, make_optimizer, moment_bytes
from tests.command import draftp, recipe
from tests.ranks import train_in_ranks

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional extra, is not installed"
)
FULL = {"peft": {"peft_scheme": "none"}, "optim": {"name": "adamw8bit", "lr": 1e-3, "weight_decay": 0.01}}
SHAPES = [(64, 128), (70, 61), (32, 16, 3, 3), (8, 8), (5000,)]


def full_recipe(folder: Path, **sections) -> Path:
    preset = recipe(folder, **{**FULL, **sections})
    preset.write_text(preset.read_text().replace("  rank: 2\n", ""))
    return preset


def train(preset: Path, output: str, *options: str):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    return result


def steps(name: str, count: int) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Weights after `count` steps towards a point, and what took them."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    goals = [torch.randn(shape) for shape in SHAPES]
    optimizer = make_optimizer(weights, OptimConfig(name=name, lr=0.01, weight_decay=0.1))
    for _ in range(count):
        for weight, goal in zip(weights, goals, strict=True):
            weight.grad = 1e-4 * (weight.detach() - goal)
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer


@needs_it
def test_it_goes_where_adamw_goes():
    """Moments in float32 (small tensors) to float32's rounding, those in 8 bits within 3 % of the way gone."""
    start, _ = steps("adamw", 0)
    plain, _ = steps("adamw", 10)
    ours, optimizer = steps("adamw8bit", 10)
    kinds = [optimizer.state[w]["state1"].dtype for w in optimizer.param_groups[0]["params"]]
    assert kinds == [torch.float32 if w.numel() < SMALLEST else torch.uint8 for w in start]
    for before, theirs, own, kind in zip(start, plain, ours, kinds, strict=True):
        tolerance = 1e-5 if kind == torch.float32 else 0.03
        assert 0.05 < (theirs - before).abs().mean() < 0.2
        assert (own - theirs).norm() < tolerance * (theirs - before).norm()


@needs_it
def test_its_moments_take_what_the_plan_says():
    weights, optimizer = steps("adamw8bit", 1)
    large = [v for own in optimizer.state.values() for k, v in own.items() if k.startswith(("state", "absmax"))]
    assert sum(t.nbytes for t in large) == moment_bytes(weights, "adamw8bit")
    assert moment_bytes(weights, "adamw8bit") < 0.26 * moment_bytes(weights, "adamw")


@needs_it
@pytest.mark.parametrize("average", [{}, {"ema": {"decay": 0.9}}], ids=["plain", "with an average"])
def test_full_fine_tuning_resumes_bit_for_bit(tiny_sdxl, average):
    preset = full_recipe(tiny_sdxl, **average)
    train(preset, "whole")
    train(preset, "parts", "--set", "trainer.max_steps=2")
    train(preset, "parts")
    for part in ("final/unet", "step-000004/unet", "step-000004/training"):
        whole, parts = ({n: t for f in sorted(Path(run, part).iterdir()) if f.suffix == ".safetensors"
                         for n, t in load_file(f).items()} for run in ("whole", "parts"))  # fmt: skip
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    kinds = {name.rpartition("/")[2]: tensor.dtype for name, tensor in whole.items() if tensor.dtype == torch.uint8}
    assert kinds.keys() == {"state1", "state2"}
    assert any(name.endswith("/absmax2") for name in whole)


@needs_it
def test_two_processes_take_the_steps_of_one(tiny_sdxl):
    """Sums in another order; what AdamW makes of the smallest gradients differs."""
    batch = {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 2}
    preset = full_recipe(tiny_sdxl, trainer=batch)
    train(preset, "one")
    assert [code for code, _ in train_in_ranks(2, preset, "two")] == [0, 0]
    one, two = (load_file(Path(run, "final/unet/diffusion_pytorch_model.safetensors")) for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=0)


@needs_it
def test_a_lora_of_small_tensors_is_warned_about(tiny_sdxl):
    preset = recipe(tiny_sdxl, optim={"name": "adamw8bit"})
    result = train(preset, "run", "--set", "trainer.max_steps=1")
    assert "warning: optim.name adamw8bit has no effect: no trained tensor has 4,096 elements" in result.err
    large = train(preset, "large", "--set", "trainer.max_steps=1", "--set", "peft.rank=128")
    assert "adamw8bit" not in large.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sharding": {"strategy": "fsdp"}},
            "optim.name adamw8bit cannot be combined with sharding.strategy fsdp; use ddp",
        ),
        ({"model": {"precision": "fp64"}}, "optim.name adamw8bit cannot be combined with model.precision fp64"),
    ],
)
def test_what_does_not_go_with_it_is_said(settings, words):
    with pytest.raises(InputError) as error:
        check_config({"optim": {"name": "adamw8bit"}, **settings})
    assert words in str(error.value)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_diffusers_but_no_step_has_learning_rate_zero(name, warmup):
    def rates(make):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule, found = make(optimizer), []
        for _ in range(10):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    ours = rates(
        lambda optimizer: learning_rates(
            optimizer, SchedConfig.model_validate({"name": name, "warmup_steps": warmup}), 10
        )
    )
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10))
    assert ours[:warmup] == pytest.approx([0.5 * step / (warmup + 1) for step in range(1, warmup + 1)])
    assert ours[warmup:] == pytest.approx(theirs[warmup:])

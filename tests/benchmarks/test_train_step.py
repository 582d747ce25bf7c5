"""The benchmark compares like with like, and counts what it says."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.command import recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import train_step
from meter import LiveBytes, Meter, PeakMeter


@pytest.fixture
def sides(tiny_sdxl):
    """Ours and the plain loop in float64, K = 2, and a micro-batch that leaves a smaller last one."""
    settings = [
        "model.precision=fp64",
        "draftp.truncation_steps=2",
        "draftp.kl_coeff=0.5",
        "trainer.global_batch_size=6",
    ]
    cfg = train_step.draftcli.load_config(recipe(tiny_sdxl), [*settings, "trainer.micro_batch_size=3"])
    return train_step.make_sides(cfg, cfg, train_step.load_parts(cfg.model), red(), checkpointing=True)[1]


def red():
    from draftcli.rewards import WeightedSum, load_reward

    return WeightedSum({"red": load_reward("tests.example_rewards:red")})


def test_the_plain_loop_has_our_loss_and_gradient(sides):
    """1e-5: diffusers' own sigmas are rounded elsewhere than ours (SEMANTICS: up to 1.3e-5)."""
    ours, plain = (side.step(Meter(lambda: 0)) for side in sides.values())
    assert plain == pytest.approx(ours, rel=1e-5)
    expected = sides["ours"].gradient
    assert expected.norm() > 1e-4
    assert (sides["plain"].gradient - expected).norm() < 1e-4 * expected.norm()


def test_what_the_plain_loop_does_not_know_is_refused(tiny_sdxl):
    settings = ["--set", "draftp.low_variance_samples=1", "--set", "sampling.guidance_interval=[0,0.5]"]
    with pytest.raises(SystemExit, match=r"knows no sampling.guidance_interval, draftp.low_variance_samples"):
        train_step.main(["--preset", str(recipe(tiny_sdxl)), *settings])


def test_the_benchmark_ends_with_the_ratio(tiny_sdxl, capsys):
    ratio = train_step.main(["--preset", str(recipe(tiny_sdxl)), "--rounds", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"ratio: {ratio:.2f}"
    phases = ["text", "prefix", "gradient", "decode", "reward", "backward", "optimizer", "base"]
    assert all(any(line.startswith(f"│ {phase}") for line in lines) for phase in phases)


@pytest.mark.parametrize("side", ["ours", "plain"])
def test_one_side_alone_in_one_step_counts_the_same(tiny_sdxl, tmp_path, side):
    """For networks of which only one fits, and whose step takes minutes."""
    common = ["--preset", str(recipe(tiny_sdxl)), "--threads", "1", "--height", "64", "--width", "32"]
    both, alone = tmp_path / "both.json", tmp_path / "alone.json"
    train_step.main([*common, "--rounds", "1", "--json", str(both)])
    assert math.isnan(train_step.main([*common, "--side", side, "--once", "--json", str(alone)]))
    expected, found = (json.loads(path.read_text(encoding="utf-8"))[side] for path in (both, alone))
    # Ours encodes the prompts in the first step alone.
    flops, later = ({k: v for k, v in one["phase_flops"].items() if k != "text"} for one in (found, expected))
    assert flops == later
    assert found["evaluations"] == expected["evaluations"]
    assert found["phases"].keys() == expected["phases"].keys() == found["peaks"].keys()
    assert found["peak"] >= max(found["peaks"].values()) >= 0.9 * expected["peak"]
    # Counting FLOP beside it keeps nothing alive; in a first step the optimizer has no moments before its turn.
    assert all(found["peaks"][phase] <= expected["peaks"][phase] for phase in found["peaks"] if phase != "optimizer")


def test_meter_leaves_inner_phases_out():
    at = iter([0, 1, 4, 10])
    meter = Meter(lambda: next(at))
    with meter("outer"), meter("inner"):
        pass
    assert meter.totals == {"inner": 3, "outer": 7}


def test_live_bytes():
    """Views are not counted twice; what autograd keeps is; what is freed is not."""
    weight = nn.Parameter(torch.zeros(1000))
    live = LiveBytes([weight])
    meter = PeakMeter(live)
    with live:
        assert live.now == 4000
        with meter("forward"):
            kept = (weight.exp().view(10, 100) * 2).sin()
        # exp's and sin's arguments, and the result
        assert live.now == meter.peaks["forward"] == 4000 * 4
        with meter("backward"):
            kept.sum().backward()
        del kept
        assert live.now == 4000 * 2, "the weight and its gradient"
    assert live.peak >= 4000 * 5

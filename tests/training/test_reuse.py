"""draftp.reuse: a picture's walk to the first step with gradient serves several optimizer steps."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcli.config import check_batch_size, without_effect
from draftcli.core.batch import Walked
from draftcli.core.gradient.mode import make_mode
from draftcli.core.rollout import Rollout
from draftcli.errors import InputError
from draftcli.planning.plan import count_evaluations
from draftcli.prompts import Prompt
from draftcli.rewards import WeightedSum
from draftcli.training.step import Trainer
from tests.command import draftp, recipe
from tests.ranks import train_in_ranks
from tests.tiny import PROMPTS, prefers_red, tiny_config, tiny_model
from tests.training.test_gradient_modes import trained
from tests.training.test_ranks import lines, lora

# Modes that draw something of their own, in N = 4: another time with each use of a picture.
DRAWN: dict[str, Any] = {
    "low_variance": "low_variance",
    "random_k": {"mode": "random_k", "low": 1, "high": 3},
    "refl": {"mode": "refl", "window": 3},
    "drtune": {"mode": "drtune", "at": [1], "stop": 3},
    "sparse": {"mode": "sparse", "tail": 0.75, "steps": 1},
}
GROUPS = {"micro_batch_size": 1, "global_batch_size": 4}


def trainer(folder, rate=1e-30, **sections):
    sections = {"optim": {"lr": rate, "sched": {"name": "constant"}}, "trainer": GROUPS, **sections}
    model = tiny_model(folder, 0.1, **sections)
    model.reward_model = rewards = WeightedSum({"red": prefers_red})
    return Trainer(model, rewards, [Prompt(text) for text in PROMPTS])


@pytest.mark.parametrize("reuse", [1, 2, 4])
def test_the_order_of_the_pictures_is_that_of_any_run(tiny_sdxl, reuse):
    """The same prompts and seeds, one after the other; a step has four different ones, each picture `reuse` steps."""
    ours, plain = trainer(tiny_sdxl, draftp={"reuse": reuse}), trainer(tiny_sdxl)

    def pictures(of, numbers):
        return [picture for n in numbers for picture in zip(of.batch(n).prompts, of.batch(n).seeds, strict=True)]

    assert pictures(ours, range(1, 3 * reuse + 1)) == pictures(plain, range(1, 4))
    steps = [pictures(ours, ours.walks.groups(step)) for step in range(1, 9)]
    assert all(len(set(some)) == 4 for some in steps)
    uses = Counter(picture for some in steps for picture in some)
    assert {uses[picture] for picture in pictures(ours, range(reuse, 8))} == {reuse}


@pytest.mark.parametrize(
    ("gradient", "sharding"),
    [
        ("last_k", {}),
        ("last_k", {"recompute_steps": True, "offload": True}),
        (DRAWN["refl"], {}),
        *(pytest.param(mode, {}, marks=pytest.mark.slow(reason="more of the same")) for mode in DRAWN.values()),
    ],
    ids=["last_k", "offload", "refl, quick", *DRAWN],
)
def test_where_weights_stay_each_step_is_an_ordinary_one(tiny_sdxl, gradient, sharding):
    """To rounding; but what a mode draws is new in the second step of a picture."""
    ours = trainer(tiny_sdxl, draftp={"gradient": gradient, "reuse": 2}, sharding=sharding)

    def expected(step):
        model = tiny_model(tiny_sdxl, 0.1, draftp={"gradient": gradient}, trainer=GROUPS)
        loss, _ = model.get_loss_and_metrics([ours.batch(step), ours.batch(step + 1)])
        return loss, float(torch.cat([p.grad.flatten() for p in model.trainable_parameters]).norm())

    first, second = (ours.step(step) for step in (1, 2))
    assert (first["loss"], first["grad_norm"]) == pytest.approx(expected(1), rel=1e-9)
    same = (second["loss"], second["grad_norm"]) == pytest.approx(expected(2), rel=1e-9)
    assert same == (gradient == "last_k")


def test_a_walk_is_as_old_as_its_weights(tiny_sdxl):
    """In the second step the group before was walked with the weights before the first."""
    ours = trainer(tiny_sdxl, rate=0.05, draftp={"reuse": 2})
    model, old = ours.model, ours.batch(2)
    with torch.no_grad():
        x = Rollout(model.networks, model.sampler, old, model.encode(old)).to(2)
    ours.step(1)
    expected = model.get_loss_and_metrics([replace(old, walked=Walked(2, x, uses=1)), ours.batch(3)])[0]
    all_new = model.get_loss_and_metrics([old, ours.batch(3)])[0]
    model.unet.zero_grad()
    assert ours.step(2)["loss"] == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(all_new, rel=1e-6)


@pytest.mark.parametrize(
    "draftp",
    [{}, {"prefix_steps": 3}, {"gradient": "low_variance"}, {"gradient": {"mode": "sparse", "at": [2, 3]}}],
    ids=str,
)
def test_evaluations_are_those_that_are_made(tiny_sdxl, draftp):
    """In the long run: the first step walks all of its pictures."""
    ours, rows = trainer(tiny_sdxl, draftp={"reuse": 4, **draftp}, sharding={"fold_lora": False}), Counter()
    ours.step(1)
    ours.model.unet.register_forward_pre_hook(lambda module, seen: rows.update({torch.is_grad_enabled(): len(seen[0])}))
    ours.step(2)
    planned = count_evaluations(ours.model.cfg)
    assert rows[True] == 4 * planned["with_gradient"]
    assert rows[False] == 4 * (planned["forward"] - planned["with_gradient"] + planned["base"])


@pytest.mark.parametrize(
    "sections",
    [
        {"draftp": {"truncation_steps": 1, "reuse": 4}, "sampling": {"sizes": [[64, 64], [64, 32], [32, 64]]}},
        pytest.param(
            {"draftp": {"gradient": {"mode": "refl", "window": 2}, "prefix_steps": 2, "reuse": 2}},
            marks=pytest.mark.slow(reason="more of the same"),
        ),
    ],
    ids=["sizes", "refl"],
)
def test_a_run_is_resumed_bit_for_bit(tiny_sdxl, sections):
    """From checkpoints that hold the latents whose walks serve later steps too; its card tells it."""
    preset = recipe(tiny_sdxl, trainer=GROUPS, **sections)
    whole, parts = trained(preset, "whole", 6), trained(preset, "parts", 1, 3, 6)
    assert parts[1] == whole[1]
    assert all(parts[0][key].equal(whole[0][key]) for key in whole[0])
    reuse = sections["draftp"]["reuse"]
    assert f"each walk there shared by {reuse} optimizer steps" in (Path("whole") / "final" / "README.md").read_text()


@pytest.mark.parametrize(
    "strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow(reason="the same on split weights"))]
)
def test_two_processes_equal_one_and_one_goes_on_from_two(tiny_sdxl, strategy):
    settings = {"truncation_steps": 1, "reuse": 2}
    preset = recipe(tiny_sdxl, draftp=settings, trainer={**GROUPS, "max_steps": 4}, sharding={"strategy": strategy})
    assert draftp("train", "--preset", preset, "--output", "one").code == 0
    assert [code for code, _ in train_in_ranks(2, preset, "two", "--set", "trainer.max_steps=2")] == [0, 0]
    result = draftp("train", "--preset", preset, "--output", "two")
    assert result.code == 0, result.err
    for a, b in zip(lines("one/metrics.jsonl"), lines("two/metrics.jsonl"), strict=True):
        for name in ("loss", "reward", "kl_penalty"):
            assert a[name] == pytest.approx(b[name], abs=1e-4 if a["step"] > 1 else 1e-6), (a["step"], name)
    ours, theirs = lora("one"), lora("two")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"draftp": {"gradient": "matching"}}, r"reuse 2 has nothing to share between steps: draftp.gradient matching"),
        ({"draftp": {"gradient": "drtune"}}, "draftp.gradient drtune may train the first sampler step as well"),
        ({"draftp": {"truncation_steps": 4}}, "draftp.gradient last_k may train the first sampler step as well"),
        ({"sampling": {"s_churn": 1.0}}, r"draftp.reuse cannot be combined with sampling.s_churn"),
        ({"sampling": {"sampler": "lcm"}}, r"draftp.reuse cannot be combined with sampling.sampler lcm"),
        ({"sharding": {"two_stage": False}}, r"draftp.reuse 2 needs sharding.two_stage true"),
        (
            {"draftp": {"reuse": 3}},
            r"global_batch_size 4 is not a multiple of draftp.reuse 3; the nearest that work: 6",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tiny_sdxl, sections, said):
    with pytest.raises(InputError, match=said):
        make_mode(tiny_config(tiny_sdxl, **{**sections, "draftp": {"reuse": 2, **sections.get("draftp", {})}}))


def test_groups_that_processes_cannot_share_are_refused(tiny_sdxl):
    cfg = tiny_config(tiny_sdxl, draftp={"reuse": 2}, trainer=GROUPS)
    check_batch_size(cfg, 2)
    with pytest.raises(InputError, match=r"4 is not a multiple of draftp.reuse 2 times 4 processes; .* work: 8"):
        check_batch_size(cfg, 4)


def test_a_backward_that_groups_are_too_small_for_is_said(tiny_sdxl):
    cfg = tiny_config(tiny_sdxl, draftp={"reuse": 4})
    assert "micro_batch_size 2 has no effect above 1: with draftp.reuse 4" in "".join(without_effect(cfg))

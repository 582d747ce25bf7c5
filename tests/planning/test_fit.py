"""Settings chosen to fit: on the tiny model, by the plan's own figures."""

import re
from pathlib import Path

import pytest

from draftcli.config import check_config, load_config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.errors import InputError
from draftcli.planning.fit import fit
from draftcli.planning.memory import memory_plan
from draftcli.planning.plan import make_plan
from draftcli.planning.size import parse_size
from tests.command import draftp, recipe
from tests.tiny import batch, tiny_model

SIZES = {"24GB": 24e9, "16GiB": 16 * 2**30, "500MB": 5e8, "0.5 tb": 5e11, "12": 12e9, "80g": 80e9}


@pytest.mark.parametrize("text", SIZES)
def test_a_size_has_a_unit(text):
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0GB", "24 apples", "1e3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="such as 12GB"):
        parse_size(text)


def test_less_room_costs_more_until_nothing_fits(tiny_sdxl):
    cfg = load_config(recipe(tiny_sdxl, trainer={"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 1}))
    plans = []

    def plan(some):
        plans.append(memory_plan(some, tiny_sdxl))
        return plans[-1]

    roomy = fit(cfg, parse_size("80GB"), plan, frozenset())
    assert roomy.cfg.trainer.micro_batch_size == 8
    assert not roomy.cfg.sharding.activation_checkpointing
    slim = fit(cfg, min(p.needed for p in plans) - 1_000_000, plan, frozenset())
    assert slim.plan.needed < roomy.plan.needed
    assert slim.choices != roomy.choices
    assert slim.cfg.trainer.global_batch_size == cfg.trainer.global_batch_size
    assert slim.cfg.sampling == cfg.sampling
    kept = fit(cfg, parse_size("80GB"), plan, frozenset({"trainer.micro_batch_size"}))
    assert kept.cfg.trainer.micro_batch_size == 2, "what somebody set is not touched"
    with pytest.raises(InputError, match=r"nothing fits 0.0 GB: at least 0\.\d GB"):
        fit(cfg, 1, plan, frozenset())


def test_what_a_recipe_does_without_for_a_small_gpu_it_has_on_a_large_one(tiny_sdxl):
    spare = {"sharding": {"offload": True}, "model": {"vae_tile": 64}}
    cfg = load_config(recipe(tiny_sdxl, **spare, trainer={"global_batch_size": 2}))
    roomy = fit(cfg, parse_size("80GB"), lambda some: memory_plan(some, tiny_sdxl), frozenset())
    assert (roomy.cfg.sharding.offload, roomy.cfg.model.vae_tile) == (False, None)
    kept = fit(cfg, parse_size("80GB"), lambda some: memory_plan(some, tiny_sdxl), frozenset({"sharding", "model"}))
    assert (kept.cfg.sharding.offload, kept.cfg.model.vae_tile) == (True, 64)


def test_the_command_says_what_each_choice_costs_and_leaves_where_nothing_fits(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={"global_batch_size": 4})
    result = draftp("train", "--preset", preset, "--fit", "24GB", "--dry-run", "--verbose")
    assert result.code == 0, result.err
    assert "trainer.micro_batch_size=4  costs nothing: it fits" in result.out
    assert "micro_batch_size: 4" in result.out
    assert re.search(r"memory on a CPU, 64 x 64, estimated +GB \(10\^9 bytes\)", result.out)
    none = draftp("train", "--preset", preset, "--fit", "1MB", "--dry-run")
    assert none.code == 2
    assert (none.out, none.err.count("\n")) == ("", 1)
    assert "nothing fits" in none.err
    assert draftp("train", "--preset", preset, "--fit", "much", "--dry-run").code == 2
    assert [path.name for path in Path.cwd().iterdir()] == ["tiny.yaml"]


def tightest(cfg, folder, given=frozenset()):
    """What fit chooses where there is a byte less than the cheaper way takes, until nothing fits."""
    found, size = None, parse_size("80GB")
    while True:
        try:
            found = fit(cfg, size, lambda some: memory_plan(some, folder), frozenset(given))
        except InputError as error:
            if "nothing fits" not in str(error):
                raise
            return found
        size = found.plan.needed - 1


def test_the_cost_is_what_the_plan_counts_more(tiny_sdxl):
    """At K = 2 recomputed activations bring recomputed steps with them: two more forward passes each."""
    cfg = load_config(recipe(tiny_sdxl, model={"device": "auto"}, trainer={"max_steps": 1}))
    slim = tightest(cfg, tiny_sdxl)
    costs = {choice.setting: choice.cost for choice in slim.choices}
    assert costs["sharding.activation_checkpointing"] == "8 more UNet evaluations an image, of about 6"
    assert "no more UNet evaluations" in costs["sharding.offload"]


def test_an_average_split_over_processes_is_left_where_it_is(tiny_sdxl):
    sections = {"sharding": {"strategy": "fsdp"}, "ema": {"decay": 0.9}}
    cfg = load_config(recipe(tiny_sdxl, model={"device": "auto"}, trainer={"max_steps": 1}, **sections))
    assert tightest(cfg, tiny_sdxl).cfg.ema.device == "same"


@pytest.mark.parametrize("given", ["sharding.two_stage", "sharding"])
def test_a_given_section_stays_and_nothing_without_effect_is_chosen(tiny_sdxl, given):
    cfg = load_config(recipe(tiny_sdxl, sharding={"two_stage": False}, trainer={"max_steps": 1}))
    roomy = fit(cfg, parse_size("80GB"), lambda some: memory_plan(some, tiny_sdxl), frozenset({given}))
    assert not roomy.cfg.sharding.two_stage
    assert "sharding.decode_batch_size" not in [choice.setting for choice in roomy.choices]


COUNTED = {
    "plain": {},
    "without guidance": {"sampling": {"scale": 1.0}},
    "guidance in part": {"sampling": {"guidance_interval": (0.25, 0.75)}},
    "recomputed": {"sharding": {"recompute_steps": True}},
    "checkpointed": {"sharding": {"activation_checkpointing": True, "recompute_steps": False}},
    "DRaFT-LV": {"draftp": {"low_variance_samples": 2}},
    "without base": {"draftp": {"kl_coeff": 0.0, "log_kl": False}},
}


@pytest.mark.parametrize("case", COUNTED)
def test_evaluations_are_counted_as_the_network_is_asked(tiny_sdxl, case):
    """Rows of latents that the UNet is given in one step, against the plan. What checkpoints repeat asks blocks, not
    the network, and is counted by the plan alone.
    """
    model: SDXLDRaFTPModel = tiny_model(tiny_sdxl, 0.05, **COUNTED[case])
    rows: list[int] = []
    model.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.get_loss_and_metrics(batch(4))
    plan = make_plan(check_config(model.cfg.model_dump()))
    assert sum(rows) == 4 * (plan.forward + plan.base)
    assert plan.again == (plan.with_gradient if case == "checkpointed" else 0)

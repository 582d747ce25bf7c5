"""The ledger (planning/ledger.py): what it counts without running is what runs, and no change makes it worse unseen."""

import re

import pytest

from draftcli import load_config
from draftcli.planning.ledger import count_flop, make_ledger, unit_work
from draftcli.planning.plan import configuration_folder
from draftcli.rewards import load_held_out
from tests.command import draftp, recipe
from tests.tiny import batch, tiny_model

SETTINGS = {
    "last_k": {},
    "one stage": {"sharding": {"two_stage": False}},
    "checkpointing": {"sharding": {"activation_checkpointing": True}},
    "recomputed": {"sharding": {"recompute_steps": True, "activation_checkpointing": True}},
    "unfolded": {"sharding": {"fold_lora": False}},
    "prefix": {"draftp": {"prefix_steps": 3, "truncation_steps": 1}},
    "guided in part": {"sampling": {"guidance_interval": [0.25, 0.75]}},
    "no guidance": {"sampling": {"scale": 1.0}},
    "without base": {"draftp": {"kl_coeff": 0, "log_kl": False}},
    "without the unconditional half": {"draftp": {"detach_uncond": True}},
    "low_variance": {"draftp": {"gradient": "low_variance"}},
    "sparse": {"draftp": {"gradient": {"mode": "sparse", "at": [1, 2]}}},
    "matching": {"draftp": {"gradient": "matching"}},
    "in full": {"peft": {"peft_scheme": "none"}},
}


QUICK = {"last_k", "prefix", "guided in part", "without the unconditional half", "low_variance"}
CASES = [
    pytest.param(
        sections,
        id=name,
        marks=[] if name in QUICK else pytest.mark.slow(reason="a count of its own, or more of the same"),
    )
    for name, sections in SETTINGS.items()
]


@pytest.mark.parametrize("sections", CASES)
def test_it_counts_what_runs(tiny_sdxl, sections):
    """The FLOP of a real step, prompts apart."""
    model = tiny_model(tiny_sdxl, 0.1, **{**sections, "model": {"precision": "fp32"}})
    images = batch(4)
    model.encode(images)
    found = count_flop(lambda: model.get_loss_and_metrics(images)).get_total_flops()
    found -= count_flop(lambda: fold(model)).get_total_flops()
    assert 4 * make_ledger(model.cfg, tiny_sdxl).total == pytest.approx(found, rel=1e-9)


def test_it_counts_the_held_out_rewards_that_training_asks(tiny_sdxl):
    """Of a gated training, beside one that asks none."""
    held_out = {"held_out_rewards": {"toy": {}}, "model": {"precision": "fp32"}}
    found, foreseen = [], []
    for gate in ("none", "held_out"):
        model = tiny_model(tiny_sdxl, 0.1, draftp={"kl_gate": gate}, **held_out)
        if gate == "held_out":
            model.penalty.weights.held_out = load_held_out(model.cfg).rewards
        images = batch(4)
        model.encode(images)
        found.append(
            count_flop(lambda model=model, images=images: model.get_loss_and_metrics(images)).get_total_flops()
        )
        foreseen.append(4 * make_ledger(model.cfg, tiny_sdxl).total)
    assert foreseen[1] - foreseen[0] == pytest.approx(found[1] - found[0], rel=1e-9)
    assert foreseen[1] > 1.01 * foreseen[0]


def fold(model):
    """Folding the LoRA is work of the step, not of an image."""
    if model.cfg.sharding.two_stage:
        with model.networks.without_gradient():
            pass


@pytest.mark.slow(reason="SDXL's configuration")
@pytest.mark.parametrize(("edge", "evaluation", "decode"), [(1024, 6.76, 10.5), (512, 1.59, 2.51)])
def test_sdxl_takes_what_is_known(edge, evaluation, decode):
    """TFLOP of a UNet evaluation and of a decode, as torch counts them on the whole networks."""
    cfg = load_config("sdxl-lora", [f"sampling.height={edge}", f"sampling.width={edge}"])
    unit = unit_work(cfg, configuration_folder(cfg))
    assert unit.base / 1e12 == pytest.approx(evaluation, rel=0.005)
    assert unit.decode / 1e12 == pytest.approx(decode, rel=0.005)
    assert unit.base < unit.tuned < 1.04 * unit.base, "the LoRA beside the weights"
    assert unit.base < unit.backward < unit.backward_through < 2.6 * unit.base, "with activations that are recomputed"


def test_the_dry_run_prints_it(tiny_sdxl):
    out = draftp("train", "--preset", recipe(tiny_sdxl), "--dry-run").out
    table = out[out.index("work ") :]
    assert table.startswith("work of an image, 64 x 64, counted  GFLOP")
    rows = dict(re.findall(r"^(\S.*?) {2,}(\S+)", table.split("\n\n")[0], re.MULTILINE))
    gflop = {name: float(value) for name, value in rows.items() if not name.startswith("work")}
    assert gflop.pop("total") == pytest.approx(sum(gflop.values()), abs=0.05)
    assert {"prefix", "decode", "backward of gradient steps"} <= gflop.keys()
    offloaded = recipe(tiny_sdxl, sharding={"offload": True})
    assert "GB of weights go to the GPU" in draftp("train", "--preset", offloaded, "--dry-run").out

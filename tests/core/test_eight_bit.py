"""The frozen base in 8 bits: the product and its gradient are those of the rounded weights, and a training on them is
nearly that on the base itself. Where bitsandbytes is not installed only its absence is tested; `make extras` runs all.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from draftcli.config import check_config, load_config, without_effect
from draftcli.core.engine import sharding
from draftcli.core.engine.eight_bit import EightBitLinear, quantize_blocks
from draftcli.core.engine.folding import folded
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.loading import model_path
from draftcli.errors import InputError
from draftcli.planning.memory import memory_plan
from draftcli.sampling.load import load_source
from draftcli.sampling.source import find_source
from tests.command import draftp, recipe
from tests.tiny import batch, one_layer_lora, tiny_model

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, an optional extra, is not installed"
)
IN_8_BITS = {"model": {"precision": "fp32", "quantize": "8bit"}}
IN_FLOAT32 = {"model": {"precision": "fp32"}}


def rounded(layer: EightBitLinear) -> nn.Linear:
    """A plain layer with the weights that `layer` stands for."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(layer(torch.eye(layer.in_features)).T - (0 if layer.bias is None else layer.bias[:, None]))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def eight_bit_layers(model) -> list[EightBitLinear]:
    return [module for module in model.unet.modules() if isinstance(module, EightBitLinear)]


def gradient(folder: Path, **settings) -> tuple[torch.Tensor, dict]:
    model = tiny_model(folder, 0.1, **settings)
    _, metrics = model.get_loss_and_metrics(batch(4))
    return torch.cat([p.grad.flatten() for p in model.trainable_parameters]), metrics


# -------------------------------------------------------------------------------------------------------- one product


@needs_it
@pytest.mark.parametrize(("width", "bias"), [((256, 64), True), ((48, 100), False)], ids=["blocks", "a part of one"])
def test_product_and_gradient_are_those_of_the_rounded_weights(width, bias):
    torch.manual_seed(0)
    linear = nn.Linear(*width, bias=bias)
    holder = nn.Module()
    holder.block = type("BasicTransformerBlock", (nn.Sequential,), {})(linear)
    quantize_blocks(holder)
    layer = holder.block[0]
    plain = rounded(layer)
    assert (plain.weight - linear.weight).norm() < 0.015 * linear.weight.norm()
    x = torch.randn(5, 3, width[0], requires_grad=True)
    away = torch.randn(5, 3, width[1])
    (ours,) = torch.autograd.grad((layer(x) * away).sum(), x)
    (theirs,) = torch.autograd.grad((plain(x) * away).sum(), x)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@needs_it
def test_nothing_as_large_as_the_weight_is_kept_for_backward():
    layer = EightBitLinear(nn.Linear(512, 512))
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 512, requires_grad=True))
    floats = sum(t.nbytes for t in kept if t.dtype.is_floating_point)
    assert floats < 512 * 512 / 16
    assert {t.data_ptr() for t in kept if not t.dtype.is_floating_point} == {layer.codes.data_ptr()}


@needs_it
def test_under_autocast_it_computes_in_its_dtype():
    layer = EightBitLinear(nn.Linear(256, 32))
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.03, rtol=0.03)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------- the network


@needs_it
def test_the_transformer_blocks_weights_take_a_quarter_of_float32(tiny_sdxl):
    model, plain = tiny_model(tiny_sdxl, **IN_8_BITS), tiny_model(tiny_sdxl, **IN_FLOAT32)
    layers = eight_bit_layers(model)
    blocks = [block for block in plain.unet.modules() if type(block).__name__ == "BasicTransformerBlock"]
    names = {n for b in blocks for n, m in b.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    assert len(layers) == len(blocks) * len(names)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(t.nbytes for layer in layers for t in (layer.codes, layer.scales))
    assert weights <= held <= 1.03 * weights
    assert all(isinstance(layer.get_base_layer(), EightBitLinear) for layer in lora_layers(model.unet))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.trainable_parameters)


LEVERS = [
    {"sharding": {}},
    {"sharding": {"recompute_steps": True}},
    {"sharding": {"activation_checkpointing": True}},
    {"sharding": {"two_stage": False}},
    {"sharding": {"offload": True}},
]


@needs_it
@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_is_nearly_the_bases_and_the_same_by_every_way(tiny_sdxl, k):
    """A hundredth of the weights' rounding reaches the gradient's direction as one minus cosine below 0.005."""
    settings = {"draftp": {"truncation_steps": k}}
    plain, metrics = gradient(tiny_sdxl, **IN_FLOAT32, **settings)
    found = [gradient(tiny_sdxl, **IN_8_BITS, **settings, **lever) for lever in LEVERS]
    for ours, told in found:
        assert F.cosine_similarity(ours, plain, 0) > 0.995
        assert told["reward"] == pytest.approx(metrics["reward"], abs=0.01)
        assert (ours - found[0][0]).norm() < 1e-4 * plain.norm(), "a lever changes nothing beyond float32's rounding"
    assert not torch.equal(found[0][0], plain)


@needs_it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
def test_compiled_blocks_have_the_same_gradient(tiny_sdxl, monkeypatch):
    """All of torch.compile but the C++ compiler."""
    monkeypatch.setattr(sharding, "COMPILER", "aot_eager")
    plain, _ = gradient(tiny_sdxl, **IN_8_BITS)
    torch._dynamo.reset()
    compiled, _ = gradient(tiny_sdxl, **IN_8_BITS, sharding={"compile": True})
    assert (compiled - plain).norm() < 1e-4 * plain.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1


@needs_it
def test_a_fresh_lora_is_the_base_exactly(tiny_sdxl):
    model = tiny_model(tiny_sdxl, **IN_8_BITS)
    assert model.get_loss_and_metrics(batch(2))[1]["kl_penalty"] == 0


@needs_it
@torch.no_grad()
def test_the_estimate_is_within_three_percent(tiny_sdxl):
    estimates = []
    for settings in (IN_FLOAT32, IN_8_BITS):
        model = tiny_model(tiny_sdxl, 0.1, **settings)
        cond = model.encode(batch(4))
        x, level = model.networks.at_first_level(model.initial_noise(batch(4))), model.schedule.level(1)
        estimates.append(model.networks.tuned(cond)(x, level))
    plain, ours = estimates
    assert 0 < (ours - plain).norm() < 0.03 * plain.norm()


@needs_it
@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral"])
def test_a_few_step_model_with_a_lora_under_it(tiny_sdxl, sampler):
    """What is rounded to 8 bits has the LoRA in it."""
    few = {"sampling": {"sampler": sampler, "timesteps": [999, 759, 499, 259], "steps": 4, "scale": 1.0}}
    few["draftp"] = {"truncation_steps": 4}
    under = {"loras": [f"{one_layer_lora(Path('under.safetensors'))}=0.5"]}
    without, _ = gradient(tiny_sdxl, **IN_FLOAT32, **few)
    plain, metrics = gradient(tiny_sdxl, model={**IN_FLOAT32["model"], **under}, **few)
    ours, told = gradient(tiny_sdxl, model={**IN_8_BITS["model"], **under}, **few)
    assert F.cosine_similarity(ours, plain, 0) > 0.995
    assert told["reward"] == pytest.approx(metrics["reward"], abs=0.01)
    assert 0 < (ours - plain).norm() < 0.3 * (plain - without).norm()


@needs_it
def test_it_is_never_folded_and_saying_so_is_answered(tiny_sdxl):
    model = tiny_model(tiny_sdxl, 0.1, **IN_8_BITS)
    with folded(model.unet, tolerance=1.0) as was_folded:
        assert not was_folded
    asked = {**IN_8_BITS, "sharding": {"fold_lora": True}}
    assert "fold_lora has no effect with model.quantize=8bit" in "\n".join(without_effect(check_config(asked)))
    assert without_effect(check_config(IN_8_BITS)) == []


@needs_it
def test_the_memory_plan_counts_what_is_held():
    cfg = load_config("toy", ["model.quantize=8bit", "model.device=cpu"])
    folder = Path(model_path("toy"))
    model = tiny_model(folder, model=cfg.model.model_dump(), peft=cfg.peft.model_dump())
    held = sum(t.nbytes for t in (*model.unet.parameters(), *model.unet.buffers()))
    plan = memory_plan(cfg, folder).resident
    assert plan["unet"] + plan["LoRA"] == held


# ---------------------------------------------------------------------------------------------------- the command line


def train(preset: Path, output: str, *options: str):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    return result


def lora(run: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(Path(run) / "final" / "pytorch_lora_weights.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@needs_it
def test_a_run_resumes_bit_for_bit_and_leaves_the_same_kind_of_lora(tiny_sdxl):
    train(recipe(tiny_sdxl), "plain")
    ours = recipe(tiny_sdxl, model={"quantize": "8bit"})
    train(ours, "whole")
    train(ours, "parts", "--set", "trainer.max_steps=2")
    train(ours, "parts")
    (whole, said), (parts, _), (plain, plainly) = lora("whole"), lora("parts"), lora("plain")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert said == plainly
    assert {n: (t.shape, t.dtype) for n, t in whole.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}


@needs_it
def test_pictures_of_a_run_are_drawn_with_the_base_as_it_is(tiny_sdxl):
    train(recipe(tiny_sdxl, model={"quantize": "8bit"}), "run", "--set", "trainer.max_steps=1")
    assert not eight_bit_layers(load_source(find_source("run", None, [])))
    assert eight_bit_layers(load_source(find_source("run", None, [], ["model.quantize=8bit"])))
    drawn = draftp("sample", "run", "--prompt", "a red dog", "--output", "drawn")
    assert drawn.code == 0, drawn.err


@needs_it
def test_the_doctor_finds_it_healthy(tiny_sdxl):
    result = draftp("doctor", "--preset", recipe(tiny_sdxl, model={"quantize": "8bit"}))
    assert result.code == 0, result.out
    assert result.out.splitlines()[-1] == "healthy"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sharding": {"strategy": "fsdp"}},
            "model.quantize 8bit cannot be combined with sharding.strategy fsdp; use ddp",
        ),
        ({"model": {"quantize": "8bit", "precision": "fp64"}}, "cannot be combined with model.precision fp64"),
        ({"peft": {"peft_scheme": "none"}}, "is for a frozen base, and peft.peft_scheme none trains all of it"),
        ({"model": {"quantize": "4bit"}}, "input should be '8bit'"),
    ],
)
def test_what_does_not_go_with_it_is_said(settings, words):
    with pytest.raises(InputError) as error:
        check_config({"model": {"quantize": "8bit"}, **settings})
    assert words in str(error.value)


@pytest.mark.parametrize("setting", ["model.quantize=8bit", "optim.name=adamw8bit"])
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_without_its_package_one_line_says_what_to_install(tiny_sdxl, monkeypatch, setting, command):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    output = ["--output", "run"] if command == "train" else []
    result = draftp(command, "--preset", recipe(tiny_sdxl), "--set", setting, *output)
    assert result.code == (2 if command == "train" else 1)
    assert "needs one more package: pip install 'draftp[bitsandbytes]'" in " ".join((result.err + result.out).split())
    assert "Traceback" not in result.err

"""What every command does with a model of each family, by its command line, on the tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file

import draftcli
from draftcli.core.models.family import FAMILIES, find_family
from draftcli.planning.ledger import count_flop, make_ledger
from draftcli.sampling.load import load_source
from draftcli.sampling.source import find_source
from tests.command import WITH_VALIDATION, draftp, recipe, trained_run
from tests.ranks import train_in_ranks
from tests.tiny import batch, tiny_model

FULL = {"peft": {"peft_scheme": "none"}, "optim": {"lr": 5e-3}}
TINY = {"sdxl": "tiny_sdxl", "sd1": "tiny_sd"}
both = pytest.mark.parametrize("name", FAMILIES)
slow = pytest.mark.slow(reason="more of the same; SDXL's tests of each command are in the command's own file")
at_length = pytest.mark.parametrize("name", [pytest.param("sdxl", marks=slow), "sd1"])


@pytest.fixture
def family(name):
    return find_family(name)


@pytest.fixture
def model(name, request):
    return request.getfixturevalue(TINY[name])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """A run of a family's tiny model, lora or full; made when asked for."""
    known = {}

    def run_of(name, scheme):
        if (name, scheme) not in known:
            folder = tmp_path_factory.mktemp(f"{name}-{scheme}")
            sections = FULL if scheme == "full" else {}
            known[name, scheme] = trained_run(folder, request.getfixturevalue(TINY[name]), **sections)
        return known[name, scheme]

    return run_of


def run(*arguments):
    result = draftp(*arguments)
    assert result.code == 0, result.err
    return result


def weights(run):
    lora = Path(run) / "final" / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.is_file() else Path(run) / "final/unet/diffusion_pytorch_model.safetensors")


def assert_close(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=tolerance, rtol=0)


@at_length
@pytest.mark.parametrize("scheme", ["lora", "full"])
def test_training_validates_goes_on_where_it_was_and_learns(model, scheme):
    sections = {"data": WITH_VALIDATION, **(FULL if scheme == "full" else {})}
    preset = recipe(model, **sections)
    run("train", "--preset", preset, "--output", "whole", "--set", "trainer.val_check_interval=4")
    run("train", "--preset", preset, "--output", "half", "--set", "trainer.max_steps=2")
    said = run("train", "--preset", preset, "--output", "half").out
    assert "resuming half after step 2" in said
    assert_close(weights("half"), weights("whole"))
    first, last = (json.loads(line) for line in Path("whole/validation.jsonl").read_text().splitlines())
    assert first["rewards"]["tests.example_rewards:red"]["difference"] == 0
    assert last["rewards"]["tests.example_rewards:red"]["difference"] > 0


@both
@pytest.mark.parametrize("scheme", ["lora", "full"])
def test_final_loads_in_plain_diffusers_and_draws_our_picture(runs, name, model, scheme):
    folder = runs(name, scheme)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if scheme == "lora":
        pipe.load_lora_weights(folder / "final", weight_name="pytorch_lora_weights.safetensors")
    else:
        pipe.unet = UNet2DConditionModel.from_pretrained(folder / "final/unet")
    tuned, prompts = load_source(find_source(str(folder), None, [])), batch(2)
    noise = tuned.initial_noise(prompts)
    options = {"timesteps": draftcli.timesteps(3), "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
    theirs = pipe(list(prompts.prompts), height=64, width=64, **options).images
    with torch.no_grad():
        ours = tuned.generate(prompts, noise)[0] / 255
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@at_length
def test_drawing_annealing_and_evaluating(runs, name, model):
    shutil.copytree(runs(name, "lora"), "runs/tiny")
    drawn = ("--num-images", 1, "--seed", 7)
    run("sample", "tiny", *drawn, "--base", "--output", "drawn")
    assert len(list(Path("drawn").rglob("*.png"))) >= 6
    run("sample", "--model", model, "--lora", "runs/tiny", "--prompt", "a red dog", *drawn, "--output", "by-model")
    run("anneal", "tiny", "--weight", "power_2", *drawn, "--output", "annealed")
    report = run("eval", "tiny", "--num-images", 2, "--features", "toy").out
    assert "report.html" in report
    paper = Path("runs/tiny/eval/metrics.json").read_text()
    columns = json.loads(paper)["columns"]
    assert [column["name"] for column in columns] == ["base", "tuned", "linear"]
    cited = Path("runs/tiny/eval/report.html").read_text()
    assert ("podell2024sdxl" in cited, "rombach2022ldm" in cited) == (name == "sdxl", name == "sd1")


@both
def test_the_card_says_what_it_is(runs, name, family):
    card = (runs(name, "lora") / "final" / "README.md").read_text()
    assert f"from diffusers import {family.pipeline}\n" in card
    assert f"pipe = {family.pipeline}.from_pretrained(" in card
    assert f"- {family.tag}\n" in card


@at_length
def test_plans_fit_and_doctor(model, family):
    preset = recipe(model)
    plan = run("train", "--preset", preset, "--dry-run").out
    for part in family.networks.values():
        assert f"{part} " in plan
    assert "these settings need" in run("train", "--preset", preset, "--dry-run", "--fit", "1GB").out
    checked = draftp("doctor", "--preset", preset).out
    assert "reaches each of the" in checked
    assert "equals the base, bit for bit" in checked
    assert not Path("runs").exists()


@both
def test_the_ledger_counts_what_runs(model):
    tuned = tiny_model(model, 0.1, model={"precision": "fp32"}, sharding={"fold_lora": False})
    images = batch(2)
    tuned.encode(images)
    found = count_flop(lambda: tuned.get_loss_and_metrics(images)).get_total_flops()
    assert 2 * make_ledger(tuned.cfg, model).total == pytest.approx(found, rel=1e-9)


@at_length
@pytest.mark.parametrize("scheme", [pytest.param("lora", marks=slow), "full"])
def test_split_over_two_processes_it_is_the_run_of_one(model, scheme):
    sections = {**(FULL if scheme == "full" else {}), "trainer": {"max_steps": 2, "micro_batch_size": 1}}
    precision = {"model": {"pretrained": str(model), "device": "cpu", "precision": "fp64"}}
    preset = recipe(model, **sections, **precision)
    run("train", "--preset", preset, "--output", "one")
    split = recipe(model, Path("split.yaml"), **sections, **precision, sharding={"strategy": "fsdp"})
    ranks = train_in_ranks(2, split, "two")
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert_close(weights("two"), weights("one"), 1e-9)

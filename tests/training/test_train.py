"""`draftp train` by its command line, on the tiny model."""

import hashlib
import json
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import draftcli
from draftcli.core.batch import Batch
from draftcli.training.step import SKIPS_ALLOWED
from draftcli.training.validation import paired
from tests.command import WITH_VALIDATION, draftp, recipe
from tests.example_rewards import Red


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "final"
    lora = folder / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else folder / "unet" / "diffusion_pytorch_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(preset: Path, output: str, *options: str):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    return result


def test_a_run_leaves_what_the_design_says(tiny_sdxl):
    preset = recipe(
        tiny_sdxl, data=WITH_VALIDATION, held_out_rewards=["tests.example_rewards:jury"], logging={"tensorboard": True}
    )
    result = train(preset, "run", "--set", "trainer.val_check_interval=2")
    run = Path("run")
    folders = {".lock", "samples", "tensorboard", "step-000002", "step-000004", "final"}
    files = {"config.yaml", "contents.json", "metrics.jsonl", "validation.jsonl", "training.html"}
    assert {p.name for p in run.iterdir()} == folders | files
    steps = lines(run / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    wanted = {"step", "loss", "reward", "reward_std", "kl_penalty", "grad_norm", "lr", "seconds"}
    wanted |= {"images_per_second", "memory_gib"}
    assert all(line.keys() == wanted for line in steps)
    assert steps[0]["kl_penalty"] == 0 < steps[-1]["kl_penalty"]
    validations = lines(run / "validation.jsonl")
    assert [line["step"] for line in validations] == [0, 2, 4]
    assert validations[0]["rewards"].keys() == {"tests.example_rewards:red", "tests.example_rewards:jury"}
    assert validations[0]["rewards"]["tests.example_rewards:red"]["difference"] == 0
    assert validations[-1]["rewards"]["tests.example_rewards:red"]["low"] > 0, "training for red makes red"
    assert {p.name for p in (run / "samples").glob("*.png")} == {f"step-00000{n}-sheet.png" for n in (0, 2, 4)}
    assert "tests.example_rewards:red" in (run / "final" / "README.md").read_text()
    for named in ("weights", "card", "page", "images", "figures", "tensorboard", "checkpoints", "settings"):
        paths = next(line.split()[1:] for line in result.out.splitlines() if line.startswith(named))
        assert paths
        assert all(Path(path).exists() for path in paths)


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_sdxl):
    """The coefficient of the penalty included, which is steered."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preset = recipe(tiny_sdxl, draftp={"kl_target": 1e-3}, logging={"tensorboard": True})
    train(preset, "whole", "--set", "trainer.max_steps=6")
    train(preset, "parts", "--set", "trainer.max_steps=3")
    train(preset, "parts", "--set", "trainer.max_steps=6")
    assert same(Path("whole"), Path("parts"))
    drop = {"seconds", "images_per_second", "memory_gib"}
    whole, parts = (
        [{k: v for k, v in line.items() if k not in drop} for line in lines(Path(run) / "metrics.jsonl")]
        for run in ("whole", "parts")
    )
    assert whole == parts
    coefficients = [line["kl_coeff"] for line in whole]
    assert coefficients[:2] == pytest.approx([0.1, 0.095]), "the penalty begins at 0"
    assert len(set(coefficients[3:])) > 1, "it moves after the run was resumed as well"
    assert "steered to a penalty of 0.001" in (Path("parts") / "final" / "README.md").read_text()
    events = EventAccumulator("parts/tensorboard").Reload()
    assert [event.value for event in events.Scalars("train/kl_coeff")] == pytest.approx(coefficients)


def test_full_fine_tuning_trains_resumes_and_opens_in_diffusers(tiny_sdxl):
    preset = recipe(tiny_sdxl, peft={"peft_scheme": "none"}, optim={"lr": 1e-4})
    preset.write_text(preset.read_text().replace("  rank: 2\n", ""))
    train(preset, "whole")
    train(preset, "parts", "--set", "trainer.max_steps=2")
    train(preset, "parts")
    assert same(Path("whole"), Path("parts"))
    tuned = UNet2DConditionModel.from_pretrained("whole/final/unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet").state_dict()
    assert any(not torch.equal(tuned[k], base[k]) for k in base)


@pytest.mark.parametrize("peft", [{"rank": 2, "target_modules": ["to_q", "conv1"]}, {"peft_scheme": "none"}])
def test_convolutions_channels_last_are_saved_and_resume_bit_for_bit(tiny_sdxl, peft):
    trainer = {"max_steps": 2, "save_interval": 1}
    levers = {"sharding": {"channels_last": True}, "ema": {"decay": 0.9}, "trainer": trainer}
    preset = recipe(tiny_sdxl, peft=peft, optim={"lr": 1e-4}, **levers)
    train(preset, "whole")
    train(preset, "parts", "--set", "trainer.max_steps=1")
    train(preset, "parts")
    assert same(Path("whole"), Path("parts"))


def test_a_finished_run_says_so_and_does_nothing(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run")
    passing = ("config.yaml", ".lock")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file() and p.name not in passing}
    result = train(preset, "run")
    assert "finished" in result.out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_other_settings_are_refused_with_the_difference(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run", "--set", "trainer.max_steps=2")
    result = draftp("train", "--preset", preset, "--output", "run", "--set", "optim.lr=0.5")
    assert result.code == 2
    assert "optim.lr was 0.01, is 0.5" in result.err
    assert "--output" in result.err


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "whole", "--set", "trainer.max_steps=6")
    train(preset, "run")
    damaged = Path("run/step-000004/state.pt")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    result = train(preset, "run", "--set", "trainer.max_steps=6")
    assert "run/step-000004 is damaged (state.pt" in result.err
    assert "resuming run after step 2" in result.out
    assert same(Path("whole"), Path("run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_and_the_same_command_goes_on(tiny_sdxl, monkeypatch, number):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 100})
    train(preset, "whole")
    calls, plain = [], Red.__call__

    def interrupting(self, images, prompts):
        calls.append(1)
        if len(calls) == 3:  # the first is before the training, about grey pictures
            os.kill(os.getpid(), number)
        return plain(self, images, prompts)

    monkeypatch.setattr(Red, "__call__", interrupting)
    result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 130
    assert "stopped after step 2, saved" in result.out
    assert [p.name for p in Path("run").glob("step-*")] == ["step-000002"]
    train(preset, "run")
    assert same(Path("whole"), Path("run"))


def test_validation_changes_nothing_in_the_training(tiny_sdxl):
    train(recipe(tiny_sdxl), "without")
    train(recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 1}), "with")
    assert same(Path("with"), Path("without"))


def test_micro_batches_add_up_to_the_global_batch(tiny_sdxl):
    """Float32 sums in another order: Adam divides small gradients by themselves, so a few weights move by 1e-4."""
    for micro in (1, 4):
        train(
            recipe(tiny_sdxl, trainer={"micro_batch_size": micro, "global_batch_size": 4, "max_steps": 2}), f"by{micro}"
        )
    one, four = weights(Path("by1")), weights(Path("by4"))
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=1e-3, rtol=0)
    first = [lines(Path(f"by{m}/metrics.jsonl"))[0] for m in (1, 4)]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-6)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


def test_the_samples_of_draft_lv_count_in_the_reward_that_is_logged(tiny_sdxl):
    """Two rewards, so that each is logged by itself; their running statistics see every sample too."""
    preset = recipe(tiny_sdxl, rewards={"tests.example_rewards:red": {"weight": 1.0, "normalise": "std"},
                                        "tests.example_rewards:green": 0.0})  # fmt: skip
    scores, plain = [], Red.__call__

    def noting(self, images, prompts):
        seen = plain(self, images, prompts)
        if type(self) is Red:
            scores.extend(seen.tolist())
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Red, "__call__", noting)
        train(preset, "run", "--set", "draftp.low_variance_samples=2", "--set", "trainer.max_steps=2")
    steps = [line["reward/tests.example_rewards:red"] for line in lines(Path("run/metrics.jsonl"))]
    del scores[:2]  # of grey pictures, before the training
    assert len(scores) == 2 * 2 * (1 + 2), "two steps of two prompts, of each its image and two more samples"
    assert steps == pytest.approx([sum(scores[:6]) / 6, sum(scores[6:]) / 6], abs=1e-6)


def test_several_sizes_train_one_size_a_batch(tiny_sdxl):
    preset = recipe(tiny_sdxl, sampling={"sizes": [[64, 64], [64, 96], [96, 64]]})
    seen, plain = set(), Red.__call__

    def looking(self, images, prompts):
        seen.add(tuple(images.shape[-2:]))
        return plain(self, images, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Red, "__call__", looking)
        train(preset, "run", "--set", "trainer.max_steps=3")
    assert seen == {(64, 64), (64, 96), (96, 64)}


def test_the_final_lora_gives_plain_diffusers_our_picture(tiny_sdxl):
    """pipe.load_lora_weights(run/final) and timesteps=draftcli.timesteps(n): the picture that draftp gives."""
    preset = recipe(tiny_sdxl, peft={"alpha": 5.0, "target_modules": ["to_q", "to_v", "conv1"]})
    train(preset, "run")
    cfg = draftcli.load_config(preset)
    model = draftcli.SDXLDRaFTPModel(cfg)
    from draftcli.training.checkpoint import load_weights

    load_weights(model, Path("run/final"))
    batch = Batch(["a red cat"], [7], (64, 64), [None])
    noise = model.initial_noise(batch)
    with torch.no_grad():
        ours = model.generate(batch, noise)[0] / 255
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            "a red cat", timesteps=draftcli.timesteps(3), guidance_scale=3.0, latents=noise.clone(),
            height=64, width=64, output_type="pt",
        ).images  # fmt: skip

    base = draw()
    pipe.load_lora_weights("run/final", weight_name="pytorch_lora_weights.safetensors")
    theirs = draw()
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)
    assert (theirs - base).abs().max() > 0.01, "the LoRA does something"


def test_a_reward_that_is_never_a_number_stops_the_run(tiny_sdxl):
    preset = recipe(tiny_sdxl, rewards={"tests.example_rewards:broken": 1.0})
    preset.write_text(preset.read_text().replace("  tests.example_rewards:red: 1.0\n", ""))
    result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 1
    *warned, last = result.err.splitlines()
    why = "reward tests.example_rewards:broken gave no score"
    assert warned == [f"warning: step {n} was skipped: {why}" for n in range(1, SKIPS_ALLOWED)]
    assert last.startswith(f"draftp: {why} in {SKIPS_ALLOWED} steps in a row")
    assert "prompts that a reward can score" in last


def test_paired_interval_of_a_constant_shift_is_the_shift():
    assert paired([1, 2, 3], [2, 3, 4]) == {"base": 2, "tuned": 3, "difference": 1, "low": 1, "high": 1, "n": 3}


def test_paired_interval_leaves_out_pairs_with_nan_and_covers_the_mean():
    figures = paired([0, 0, 0, 0, float("nan")], [1, 2, 3, 4, 5])
    assert figures["n"] == 4
    assert figures["difference"] == 2.5
    assert 1 < figures["low"] < 2.5 < figures["high"] < 4


def test_a_failed_start_does_not_spoil_the_folder(tiny_sdxl):
    """Before the first checkpoint there is nothing to keep, so the corrected command is taken."""
    preset = recipe(tiny_sdxl)
    failed = draftp("train", "--preset", preset, "--output", "run", "--set", "peft.target_modules=[nowhere]")
    assert failed.code == 2
    train(preset, "run")


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run")
    damaged = Path("run/step-000004/state.pt")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    train(preset, "run", "--set", "trainer.max_steps=5")
    sums = json.loads(Path("run/step-000004/manifest.json").read_text())
    assert hashlib.sha256(damaged.read_bytes()).hexdigest() == sums["state.pt"]


def test_fewer_steps_than_were_taken_are_refused(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run")
    result = draftp("train", "--preset", preset, "--output", "run", "--set", "trainer.max_steps=3")
    assert result.code == 2
    assert "has taken 4 steps already" in result.err


def test_a_world_without_addresses_is_refused_rather_than_waited_for(tiny_sdxl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run").code == 2


def test_a_number_of_processes_that_the_launcher_does_not_start_is_said(tiny_sdxl, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for count in (1, 2, 3):
        told = draftp("train", "--preset", recipe(tiny_sdxl), "--processes", str(count), "--dry-run").err
        assert ("--processes 3 has no effect: the launcher has started 2" in told) == (count == 3)


def test_killed_in_the_middle_and_started_again_equals_undisturbed(tiny_sdxl):
    """A real SIGKILL, at once after the fifth step, with checkpoints every second one."""
    preset = recipe(tiny_sdxl, trainer={"max_steps": 10})
    train(preset, "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process that has threads
        child = os.fork()
    if child == 0:
        calls, plain = [], Red.__call__

        def dying(self, images, prompts):
            calls.append(1)
            if len(calls) == 7:  # the first is before the training, about grey pictures
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, images, prompts)

        Red.__call__ = dying
        draftp("train", "--preset", preset, "--output", "run")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    result = train(preset, "run")
    assert "resuming run after step 4" in result.out
    assert same(Path("whole"), Path("run"))
    assert [line["step"] for line in lines(Path("run/metrics.jsonl"))] == list(range(1, 11))

"""What disks, clocks, schedulers and bad gradients do to a training run, and what must be left of it."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import draftcli
from draftcli.changes import MAY_CHANGE, MAY_CHANGE_SECTIONS
from draftcli.config import Config, check_config
from draftcli.errors import InputError
from draftcli.runs import Run
from draftcli.training import checkpoint, session, stop
from draftcli.training.step import Trainer
from draftcli.training.validation import Validation
from tests.command import WITH_VALIDATION, draftp, in_child, recipe
from tests.example_rewards import Red
from tests.faults.kill import campaign, same_files
from tests.tiny import tiny_sd1

LORA = "pytorch_lora_weights.safetensors"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, signals and clocks are Linux's")


def train(preset, output, *options, code=0):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == code, result.err
    return result


def one_line(result, *words):
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("draftp: ")
    for word in words:
        assert word in lines[0]


def exit_code(work):
    """Of `work` in a forked process, where it may change limits and users: 0 means that it went wrong."""

    def told():
        try:
            os._exit(work())
        except BaseException:
            print(traceback.format_exc(), file=sys.__stderr__, flush=True)

    return os.waitstatus_to_exitcode(in_child(told))


def test_killed_again_and_again_a_run_loses_nothing(tiny_sdxl):
    """`make faults` does it 200 times."""
    assert campaign(tiny_sdxl, kills=16, seed=20).kills == 16


@pytest.mark.slow
def test_killed_again_and_again_a_run_of_the_other_family_loses_nothing(tmp_path):
    assert campaign(tiny_sd1(tmp_path / "sd1"), kills=6, seed=21).kills == 6


def test_killed_before_its_new_final_is_whole_a_run_is_not_finished(tiny_sdxl, monkeypatch):
    """final/ of a run that was taken further is of an earlier step until the very end."""
    preset = recipe(tiny_sdxl)
    train(preset, "run", "--set", "trainer.max_steps=2")

    def dying():
        session.write_final = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        train(preset, "run")

    assert os.WTERMSIG(in_child(dying)) == signal.SIGKILL
    assert Path("run/step-000004").is_dir()
    assert "is finished" not in train(preset, "run").out
    assert same_files(Path("run/final"), train_whole(preset) / "final")
    assert "is finished" in train(preset, "run").out


def test_killed_before_it_has_settings_a_run_can_be_begun(tiny_sdxl):
    Path("run").mkdir()
    for name in (".lock", ".config.yaml.partial"):
        Path("run", name).write_text("proc")
    train(recipe(tiny_sdxl), "run", "--set", "trainer.max_steps=1")
    assert {path.name for path in Path("run").glob(".*")} == {".lock"}


def train_whole(preset, *options):
    train(preset, "whole", *options)
    return Path("whole")


def test_every_file_of_a_checkpoint_that_is_cut_or_changed_is_noticed(tiny_sdxl):
    train(recipe(tiny_sdxl, trainer={"max_steps": 1}), "run")
    folder = Path("run/step-000001")
    assert checkpoint._problem(folder) is None
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        for bad in (b"", data[:-1], data[: len(data) // 2], data + b"\0", bytes([data[0] ^ 1]) + data[1:]):
            file.write_bytes(bad)
            assert checkpoint._problem(folder) is not None, file
        file.unlink()
        assert checkpoint._problem(folder) is not None, file
        file.write_bytes(data)
    assert checkpoint._problem(folder) is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_silently(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run")
    for folder in Path("run").glob("step-*"):
        (folder / "state.pt").unlink()
    log = Path("run/metrics.jsonl").read_bytes()
    one_line(train(preset, "run", "--set", "trainer.max_steps=5", code=1), "every checkpoint of run is damaged")
    assert Path("run/metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_gets_full_at_any_moment_keeps_what_there_is(tiny_sdxl, tensorboard):
    """No file can grow past a limit, which is how the operating system says it for a user, too."""
    preset = recipe(
        tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 9}, logging={"tensorboard": tensorboard}
    )
    whole = train_whole(preset)
    train(preset, "run", "--set", "trainer.max_steps=1")
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    limits = [1, *((a + b) // 2 for a, b in pairwise(sizes))][:: 4 if tensorboard else 2]

    def with_a_full_disk(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        one_line(train(preset, "run", code=1), "cannot be written")
        return 7

    for limit in limits:
        assert exit_code(lambda limit=limit: with_a_full_disk(limit)) == 7, limit
        assert not [*Path("run").glob(".*.partial")], "it would take the room that is needed"
        for folder in Run(Path("run")).checkpoints():
            assert same_files(folder, whole / folder.name)
    train(preset, "run")
    assert same_files(Path("run/final"), whole / "final")


def test_a_real_disk_that_is_full(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 9})
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", "small"]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        one_line(train(preset, "small/run", code=1), "cannot be written", "No space left on device")
        kept = Run(Path("small/run")).checkpoints()
        assert kept, "some fit"
        assert all(checkpoint._problem(folder) is None for folder in kept)
    finally:
        subprocess.run(["umount", "small"], check=True)


def test_a_run_that_became_read_only_is_said_in_one_line(tiny_sdxl):
    """As a user who owns nothing of it: root may write anywhere."""
    shutil.copytree(tiny_sdxl, "model")
    preset = recipe(Path("model"))
    train(preset, "run", "--set", "trainer.max_steps=2")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    for path in (Path(), *Path("run").rglob("*"), Path("run"), *Path("model").rglob("*"), Path("model")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def as_nobody():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        one_line(train(preset, "run", code=1), "run", "cannot be written", "Permission denied")
        one_line(draftp("sample", "run", "--prompt", "a fox"), "run/sample", "cannot be written", "Permission denied")
        return 7

    try:
        assert exit_code(as_nobody) == 7
    finally:
        Path().chmod(0o755)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def leaves(value, key=""):
    if isinstance(value, dict) and value and not key.startswith(("rewards", "held_out_rewards")):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value


def other(key, value):
    """Another value that is allowed for a setting."""
    known = {
        "model.pretrained": "elsewhere", "model.precision": "fp64", "model.vae_precision": "fp64",
        "model.vae_tile": 64, "model.prediction_type": "v_prediction", "model.zero_terminal_snr": True,
        "sampling.height": 128, "sampling.width": 128, "sampling.sampler": "ddim", "sampling.schedule": "leading",
        "sampling.guidance_interval": [0.1, 0.9], "sampling.sizes": [[64, 128]], "peft.peft_scheme": "none",
        "peft.target_modules": ["to_q"], "peft.alpha": 2.0, "rewards": {"toy": 1.0}, "held_out_rewards": ["toy"],
        "data.prompts": "other.txt", "data.validation_prompts": ["a fox"], "optim.sched.name": "cosine",
        "optim.betas": [0.8, 0.9], "ema.decay": 0.5, "ema.device": "cpu", "trainer.micro_batch_size": 1,
        "trainer.global_batch_size": 4, "model.quantize": "8bit", "optim.name": "adamw8bit",
        "logging.trackers": ["wandb"], "model.loras": ["style.safetensors"], "sampling.timesteps": [900, 500, 100],
        "monitor.stop": "never", "monitor.final": "last",
        "draftp.kl_target": 0.01, "draftp.prefix_steps": 1, "draftp.prefix_sampler": "heun",
        "draftp.reuse": 2,
    }  # fmt: skip
    if key in known:
        return known[key]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "other"


def test_which_settings_may_change_between_sessions(tiny_sdxl):
    """All but those of the documented list are refused, each by its name."""
    cfg = draftcli.load_config(recipe(tiny_sdxl))
    run = Run(Path("run"))
    run.step_folder(1).mkdir(parents=True)
    run.open(cfg)
    changed = []
    # Another value of these is refused whatever the run had.
    alone = ("model.family", "sampling.guidance_embedding", "draftp.kl_kind", "draftp.kl_gate", "draftp.combine")
    fields = [(key, value) for key, value in leaves(cfg.model_dump(mode="json")) if key not in alone]
    for key, value in fields:
        if key.startswith("sharding."):
            continue
        data = cfg.model_dump(mode="json")
        *sections, name = key.split(".")
        node = data
        for section in sections:
            node = node[section]
        node[name] = other(key, value)
        may = key in MAY_CHANGE or key.startswith(MAY_CHANGE_SECTIONS)
        with nullcontext() if may else pytest.raises(InputError, match=re.escape(f"({key}")):
            assert run.open(check_config(data))[0].startswith(f"{key} was")
            changed.append(key)
            run.open(cfg)
    assert len(fields) > 50
    of_sections = {"logging.trackers", "logging.project", "monitor.stop", "monitor.patience", "monitor.final"}
    assert set(changed) == {*MAY_CHANGE, *of_sections}
    assert MAY_CHANGE_SECTIONS == ("logging", "monitor", "sharding")
    documented = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in documented for key in (*MAY_CHANGE, *MAY_CHANGE_SECTIONS))
    assert {*Config.model_fields} >= {*MAY_CHANGE_SECTIONS}


def test_settings_that_changed_are_said(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    train(preset, "run", "--set", "trainer.max_steps=2")
    result = train(preset, "run", "--set", "trainer.keep_checkpoints=1")
    assert "changed since the last session: trainer.max_steps was 2, is 4" in result.out
    assert "changed since the last session: trainer.keep_checkpoints was 2, is 1" in result.out


def test_after_running_out_of_memory_a_run_goes_on_with_less(tiny_sdxl):
    """What --fit and docs/training.md advise may be set on resuming, and keeps the weights, up to rounding."""
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, ema={"decay": 0.9})
    whole = train_whole(preset)
    train(preset, "run", "--set", "trainer.max_steps=2")
    base = Path("run/samples/base.safetensors").stat().st_mtime_ns
    less = ("trainer.micro_batch_size=1", "model.offload_text_encoders=true", "ema.device=cpu", "sharding.offload=true")
    train(preset, "run", *(word for setting in less for word in ("--set", setting)))
    for name, tensor in load_file(whole / "final" / LORA).items():
        torch.testing.assert_close(load_file(Path("run/final") / LORA)[name], tensor, rtol=1e-2, atol=1e-4)
    assert Path("run/samples/base.safetensors").stat().st_mtime_ns == base, "the base is not drawn again"


def test_a_clock_that_goes_backwards_changes_nothing(tiny_sdxl, monkeypatch):
    """Each session, and each look at the clock, an hour earlier than the one before; files from the future."""
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, logging={"tensorboard": True})
    whole = train_whole(preset)
    now = [time.time()]

    def earlier():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    for steps in (1, 3, 4):
        train(preset, "run", "--set", f"trainer.max_steps={steps}")
        for path in Path("run").rglob("*"):
            os.utime(path, (now[0] + 10**6 / steps,) * 2)
    assert same_files(Path("run/final"), whole / "final")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["seconds"] > 0 for line in lines)


def test_a_second_process_is_refused_and_the_first_may_die(tiny_sdxl, monkeypatch):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 1})
    whole = train_whole(preset)

    def stopping_at_the_third_step():
        calls, plain = [], Red.__call__

        def call(self, images, prompts):
            calls.append(1)
            if len(calls) == 4:  # the first is before the training, about grey pictures
                os.kill(os.getpid(), signal.SIGSTOP)
            return plain(self, images, prompts)

        Red.__call__ = call
        train(preset, "run")

    first = os.fork()
    if first == 0:
        stopping_at_the_third_step()
        os._exit(0)
    try:
        assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
        one_line(train(preset, "run", code=2), f"is being written by another process (process {first} on")
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert "resuming run after step 2" in train(preset, "run").out
    assert same_files(Path("run/final"), whole / "final")


def signal_at(monkeypatch, call: int, number: int) -> None:
    calls, plain = [], Red.__call__

    def signalling(self, images, prompts):
        if len(calls) == call:  # number 0 is before the training, about grey pictures
            os.kill(os.getpid(), number)
        calls.append(1)
        return plain(self, images, prompts)

    monkeypatch.setattr(Red, "__call__", signalling)


@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_scheduler_that_kills_soon_gets_what_is_done(tiny_sdxl, monkeypatch, where):
    """A step, or a validation, that takes longer than SAVE_DEADLINE after SIGTERM is given up, and nothing is lost."""
    preset = recipe(
        tiny_sdxl,
        data=WITH_VALIDATION,
        trainer={"save_interval": 100, "micro_batch_size": 1, "val_check_interval": 3},
        ema={"decay": 0.8},
    )
    whole = train_whole(preset)
    monkeypatch.setattr(stop, "SAVE_DEADLINE", 0.0)
    with monkeypatch.context() as patch:
        # The base and the first validation are 4 pictures, a step is 2.
        signal_at(patch, 4 + 2 * 2 + 1 if where == "step" else 4 + 3 * 2 + 1, signal.SIGTERM)
        result = train(preset, "run", code=130)
    last = 2 if where == "step" else 3
    assert f"stopped after step {last}, saved" in result.out
    assert [path.name for path in Path("run").glob("step-*")] == [f"step-00000{last}"]
    train(preset, "run")
    assert same_files(Path("run/final"), whole / "final")
    steps = [[json.loads(line)["step"] for line in (f / "validation.jsonl").read_text().splitlines()] for f in
             (whole, Path("run"))]  # fmt: skip
    assert steps[0] == steps[1] == [0, 3, 4]


def test_a_scheduler_has_its_checkpoint_within_30_seconds(tiny_sdxl, monkeypatch):
    """With steps that take a minute: a reward on a slow server."""
    preset = recipe(tiny_sdxl, trainer={"save_interval": 100, "micro_batch_size": 1, "global_batch_size": 60})
    calls, plain = [], Red.__call__

    def slow(self, images, prompts):
        calls.append(time.monotonic())
        if len(calls) == 63:  # the first is before the training, about grey pictures
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) >= 63:
            time.sleep(1)
        return plain(self, images, prompts)

    monkeypatch.setattr(Red, "__call__", slow)
    result = train(preset, "run", code=130)
    assert time.monotonic() - calls[62] < 30
    assert "stopped after step 1, saved" in result.out
    assert Path("run/step-000001").is_dir()


def test_a_validation_that_fails_loses_no_step(tiny_sdxl, monkeypatch):
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"save_interval": 100, "val_check_interval": 3})
    whole = train_whole(preset)

    def gone(*arguments, **options):
        raise RuntimeError("the reward's server is gone")

    with monkeypatch.context() as patch:
        plain = Validation.__call__
        patch.setattr(
            Validation, "__call__", lambda v, run, step, *rest: (gone if step else plain)(v, run, step, *rest)
        )
        with pytest.raises(RuntimeError, match="server is gone"):
            draftp("train", "--preset", preset, "--output", "run")
    assert Path("run/step-000003").is_dir()
    train(preset, "run")
    assert same_files(Path("run/final"), whole / "final")


def test_weights_that_explode_stop_the_run_and_those_from_before_stay(tiny_sdxl):
    """The first step has a learning rate of 1e30: its weights are finite, and what they give is not."""
    preset = recipe(
        tiny_sdxl,
        optim={"lr": 1e33, "sched": {"name": "constant_with_warmup", "warmup_steps": 1000}},
        trainer={"max_steps": 9, "save_interval": 1},
    )
    train(preset, "one", "--set", "trainer.max_steps=1")
    result = train(preset, "run", code=1)
    one_line(result, "was not finite in 3 steps in a row, the last is step 4", "a lower optim.lr", "another --output")
    assert [line.split(" was skipped")[0] for line in result.err.splitlines() if "was skipped" in line] == [
        "warning: step 2", "warning: step 3"]  # fmt: skip
    assert same_files(Path("run/step-000001"), Path("one/step-000001"))
    assert all(torch.isfinite(tensor).all() for tensor in load_file(Path("run/step-000001") / LORA).values())


def spoil(folder: Path) -> None:
    file = folder / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])


def test_damaged_checkpoints_do_not_push_out_whole_ones(tiny_sdxl):
    """Two newer ones that are damaged count for keep_checkpoints no more, nor are they "the newest" for a command."""
    preset = recipe(tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 3})
    train(preset, "run")
    for step in (3, 4):
        spoil(Path(f"run/step-00000{step}"))
    result = train(preset, "run", "--set", "trainer.max_steps=3", "--set", "trainer.keep_checkpoints=1")
    assert "run/step-000004 is damaged" in result.err
    run = Run(Path("run"))
    assert [path.name for path in run.checkpoints()] == ["step-000003"]
    assert checkpoint._problem(run.step_folder(3)) is None
    assert {path.name for path in run.folder.glob("step-*.damaged")} == {"step-000003.damaged", "step-000004.damaged"}
    train(preset, "run", "--set", "trainer.keep_checkpoints=1")
    assert [path.name for path in run.checkpoints()] == ["step-000004"]


def test_other_settings_before_the_first_checkpoint_begin_anew(tiny_sdxl):
    """Nothing of the validation before the first step stays: it was of another reward."""
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 2})

    def dying():
        Trainer.step = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        train(preset, "run")

    assert os.WTERMSIG(in_child(dying)) == signal.SIGKILL
    assert [line["step"] for line in Run(Path("run")).validations()] == [0]
    for folder in ("run", "whole"):
        train(preset, folder, "--reward", "tests.example_rewards:green=1.0")
    assert Path("run/validation.jsonl").read_text() == Path("whole/validation.jsonl").read_text()


def test_too_little_memory_for_a_checkpoint_is_not_called_another_run(tiny_sdxl, monkeypatch):
    """Who follows the advice to remove it has lost it."""
    preset = recipe(tiny_sdxl)
    train(preset, "run", "--set", "trainer.max_steps=2")

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint, "load_weights", fail)
    one_line(train(preset, "run", code=1), "the GPU is out of memory")


@pytest.mark.parametrize("when", ["add_scalar", "flush", "close"])
def test_a_disk_that_is_full_for_tensorboard_alone(tiny_sdxl, monkeypatch, when):
    """Its writer is a thread: what goes wrong there comes up at any later call."""
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, logging={"tensorboard": True})
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, when, fail)
        one_line(train(preset, "run", code=1), "run/tensorboard: cannot be written (No space left on device)")
    train(preset, "run")

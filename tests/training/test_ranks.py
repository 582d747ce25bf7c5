"""Several processes, as torchrun starts them, are one run: two gloo processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file

from draftcli.errors import DraftpError
from draftcli.runs import Run
from draftcli.sampling.sheet import FOOTER
from draftcli.training import checkpoint, nodes
from tests.command import WITH_VALIDATION, draftp, recipe
from tests.example_rewards import Red
from tests.ranks import train_in_ranks

BATCH = {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 2, "val_check_interval": 2}
ROOT = Path(__file__).parents[2]


def lora(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "final" / "pytorch_lora_weights.safetensors")


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_alike(one: str, two: str) -> None:
    """Sums in another order: 1e-6 in the losses; Adam divides small gradients by themselves, so weights get 1e-3.

    Sheets carry scores in letters, one of which may round the other way: a few black and white pixels.
    """
    for a, b in zip(lines(f"{one}/metrics.jsonl"), lines(f"{two}/metrics.jsonl"), strict=True):
        for name in ("loss", "reward", "kl_penalty"):
            assert a[name] == pytest.approx(b[name], abs=1e-4 if a["step"] > 1 else 1e-6)
        assert a.get("kl_coeff") == b.get("kl_coeff")
    ours, theirs = lora(one), lora(two)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)
    for step in (0, 2):
        pictures = [Image.open(f"{run}/samples/step-{step:06d}-sheet.png") for run in (one, two)]
        pictures = [image.crop((0, 0, image.width, image.height - FOOTER)) for image in pictures]  # it names the run
        assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 0.1, step
    for a, b in zip(lines(f"{one}/validation.jsonl"), lines(f"{two}/validation.jsonl"), strict=True):
        figures, others = a["rewards"]["tests.example_rewards:red"], b["rewards"]["tests.example_rewards:red"]
        assert figures["base"] == pytest.approx(others["base"], abs=1e-6)
        assert figures["tuned"] == pytest.approx(others["tuned"], abs=1e-3)


@pytest.mark.parametrize(
    "draftp_settings",
    [
        {"kl_target": 1e-3},
        pytest.param({"truncation_steps": 1, "prefix_steps": 4}, marks=pytest.mark.slow(reason="more of the same")),
    ],
    ids=["own grid, a steered penalty", "prefix"],
)
def test_two_processes_equal_one_on_the_same_global_batch(tiny_sdxl, draftp_settings):
    preset = recipe(tiny_sdxl, draftp=draftp_settings, data=WITH_VALIDATION, trainer=BATCH)
    assert draftp("train", "--preset", preset, "--output", "one").code == 0
    ranks = train_in_ranks(2, preset, "two")
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert_alike("one", "two")
    assert "2 processes" in ranks[0][1]
    assert ranks[1][1] == "", "one process talks for all"


def fail():
    raise DraftpError("the reward's server is gone")


def in_call(here: bool, number: int | None, act) -> None:
    """In this process, `act` in the reward's call `number`, counted from 1; None: in every one.

    The call before the training, about grey pictures, is number 0.
    """
    calls, plain = [], Red.__call__

    def call(self, images, prompts):
        if here and number in (None, len(calls)):
            act()
        calls.append(1)
        return plain(self, images, prompts)

    Red.__call__ = call


def test_when_a_process_fails_none_waits_and_no_step_is_lost(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={**BATCH, "max_steps": 5, "save_interval": 100})

    ranks = train_in_ranks(2, preset, "run", before=lambda rank: in_call(rank == 1, 3, fail))
    assert [code for code, _ in ranks] == [1, 1]
    assert "the reward's server is gone" in ranks[1][1]
    assert "process 1 of this run failed" in ranks[0][1]
    assert [path.name for path in Path("run").glob("step-*")] == ["step-000002"]


def test_when_a_process_is_killed_the_other_leaves(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={**BATCH, "max_steps": 5, "save_interval": 100})

    ranks = train_in_ranks(
        2, preset, "run", before=lambda rank: in_call(rank == 1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    assert [code for code, _ in ranks] == [1, -signal.SIGKILL]
    assert "process 1 of this run is gone" in ranks[0][1]
    assert "process 1 was last at: step 3, drawing its images" in ranks[0][1]
    assert "process 0 waited at: step 3, waiting for the others' gradients" in ranks[0][1]
    assert [path.name for path in Path("run").glob("step-*")] == ["step-000002"]


@pytest.mark.parametrize("who", [0, 1])
def test_when_a_process_with_a_part_of_the_weights_fails_the_other_says_why(tiny_sdxl, who):
    """It cannot wait for the other, which waits for its part inside the network."""
    preset = recipe(tiny_sdxl, trainer={**BATCH, "save_interval": 1}, sharding={"strategy": "fsdp"})
    ranks = train_in_ranks(2, preset, "run", before=lambda rank: in_call(rank == who, 2, fail))
    assert [code for code, _ in ranks] == [1, 1], ranks
    assert "the reward's server is gone" in ranks[who][1]
    # Process 0 keeps what the others would read of it, where torchrun does not.
    why = "process 1 of this run failed: the reward's server is gone" if who else "process 0 of this run is gone"
    assert why in ranks[1 - who][1]
    assert [path.name for path in Path("run").glob("step-*")] == ["step-000001"]


def test_nothing_hangs_on_a_slow_process(tiny_sdxl):
    """One that comes late to every part of a run: the other waits, in training, validation and saving."""

    def before(rank):
        in_call(rank == 1, None, lambda: time.sleep(0.5))
        if rank == 1:
            plain = checkpoint.save_tensors
            checkpoint.save_tensors = lambda *args: (time.sleep(1), plain(*args))

    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer=BATCH, sharding={"strategy": "fsdp"})
    ranks = train_in_ranks(2, preset, "run", before=before)
    assert [code for code, _ in ranks] == [0, 0], ranks
    assert lora("run")


def test_who_waits_too_long_says_for_whom_and_for_what(tiny_sdxl):
    def stuck():
        time.sleep(18)  # beyond the time-out, and the time that others are given to say they wait too
        os._exit(9)

    preset = recipe(tiny_sdxl, trainer=BATCH, sharding={"timeout_minutes": 0.15})
    ranks = train_in_ranks(2, preset, "run", before=lambda rank: in_call(rank == 1, 2, stuck))
    assert [code for code, _ in ranks] == [1, 9], ranks
    assert "process 1 did not answer in time (sharding.timeout_minutes)" in ranks[0][1]
    assert "process 1 was last at: step 2, drawing its images" in ranks[0][1]
    assert "process 0 waited at: step 2, waiting for the others' gradients" in ranks[0][1]


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={**BATCH, "max_steps": 50, "save_interval": 100})

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passes on what the terminal has sent already

    ranks = train_in_ranks(2, preset, "run", before=lambda rank: in_call(rank == 1, 2, twice))
    assert [code for code, _ in ranks] == [130, 130]
    assert [path.name for path in Path("run").glob("step-*")] == ["step-000002"]


def test_a_second_ctrl_c_stops_at_once(tiny_sdxl):
    """As torchrun passes them on, which has each process in a session of its own."""
    preset = recipe(tiny_sdxl, trainer={**BATCH, "max_steps": 50, "save_interval": 1})

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a scheduler reaches each process by itself, too
        os.kill(os.getpid(), signal.SIGTERM)

    ranks = train_in_ranks(2, preset, "run", before=lambda rank: in_call(True, 3, twice))
    assert [code for code, _ in ranks] == [130, 130], ranks
    assert Run(Path("run")).checkpoints()[0].name == "step-000002"


def test_a_global_batch_that_cannot_be_shared_out_names_the_nearest(tiny_sdxl):
    ranks = train_in_ranks(2, recipe(tiny_sdxl, trainer={**BATCH, "global_batch_size": 6}), "run")
    assert [code for code, _ in ranks] == [2, 2]
    assert "micro_batch_size 2 times 2 processes; the nearest that work: 4, 8" in ranks[0][1]
    assert ranks[1][1] == "", "once is enough"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nodes_that_do_not_share_the_folder_are_told_before_anything_is_trained(tiny_sdxl, strategy, monkeypatch):
    monkeypatch.setattr(nodes, "NFS_CACHE", 0.5)

    def before(rank):
        Path(f"node{rank}").mkdir()
        os.chdir(f"node{rank}")

    preset = recipe(tiny_sdxl, trainer=BATCH, sharding={"strategy": strategy}).resolve()
    ranks = train_in_ranks(2, preset, "run", before=before)
    assert [code for code, _ in ranks] == [2, 2], ranks
    assert "run is another folder for process 1 than for process 0" in ranks[0][1]


@pytest.mark.parametrize("what", ["settings", "prompts"])
def test_nodes_with_different_files_are_told(tiny_sdxl, what):

    def before(rank):
        Path(f"node{rank}").mkdir()
        os.chdir(f"node{rank}")
        Path("prompts.txt").write_text("a fox\n" * (1 + rank * (what == "prompts")))
        seed = rank * (what == "settings")
        recipe(tiny_sdxl, trainer={**BATCH, "seed": seed}, data={"prompts": "prompts.txt"})

    ranks = train_in_ranks(2, Path("tiny.yaml"), "run", before=before)
    assert [code for code, _ in ranks] == [2, 2], ranks
    assert f"has other {what} than process 0" in ranks[1][1]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "draftcli", "train"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "draftcli", "train"],
    "draftp": ["draftcli", "train", "--processes", "2"],
}


@pytest.mark.slow  # three launchers, each starting processes that import torch anew
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_start_a_run(tiny_sdxl, launcher):
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer=BATCH)
    assert draftp("train", "--preset", preset, "--output", "one").code == 0
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "--preset", str(preset), "--output", "two"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert_alike("one", "two")


KILLED = """
import os, signal
from tests.example_rewards import Red

class Killed(Red):
    def __call__(self, images, prompts):
        os.kill(os.getpid(), signal.SIGKILL if os.environ["RANK"] == "1" else signal.SIGCONT)
        return super().__call__(images, prompts)
"""


@pytest.mark.slow  # two launches of two processes that import torch anew
def test_what_goes_wrong_in_processes_of_our_own_is_one_line(tiny_sdxl):
    """torchrun would end with its own traceback and exit code."""
    Path("killed.py").write_text(KILLED)
    preset = recipe(tiny_sdxl, rewards={"tests.example_rewards:red": 0.0, "killed:Killed": 1.0}, trainer=BATCH)

    def told(*options):
        command = [sys.executable, "-m", "draftcli", "train", "--processes", "2", "--preset", str(preset), *options]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=500)
        return done.returncode, done.stderr.splitlines()

    assert told("--set", "trainer.global_batch_size=6")[0] == 2
    code, said = told("--prompts", "nowhere.txt", "--set", "trainer.save_interval=9")
    assert code == 2
    assert said == [line for line in said if "nowhere.txt" in line], "nothing else is said of what does not start"
    assert len(said) == 1, said

    code, said = told("--output", "run")
    assert code == 1
    assert said[-1] == (
        "draftp: process 1 was killed (SIGKILL); run the same command to resume from the last checkpoint"
    )
    assert "Traceback" not in "".join(said)


KILLED_ONCE = """
import os, signal
from tests.example_rewards import Red

class Once(Red):
    calls = -1  # the first is before the training, about grey pictures
    def __call__(self, images, prompts):
        Once.calls += 1
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and Once.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images, prompts)
"""


@pytest.mark.slow  # torchrun starts two processes twice, each importing torch anew
@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp"],
)
def test_torchrun_restarts_from_the_last_checkpoint_when_a_process_dies(tiny_sdxl, strategy):
    Path("once.py").write_text(KILLED_ONCE)
    preset = recipe(
        tiny_sdxl,
        rewards={"tests.example_rewards:red": 0.0, "once:Once": 1.0},
        trainer={**BATCH, "max_steps": 4, "save_interval": 1},
        sharding={"strategy": strategy},
    )
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "-m",
        "draftcli",
    ]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "train", "--preset", str(preset), "--output", "run"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    # torchrun names it; the survivor too, unless torchrun stops it before it can
    assert "local_rank: 1" in done.stderr
    assert "resuming run after step 2" in done.stdout
    assert [line["step"] for line in lines("run/metrics.jsonl")] == [1, 2, 3, 4]

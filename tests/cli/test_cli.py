"""The command line as people meet it: help, version, dry runs."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from draftcli import __version__
from draftcli.config import load_config, preset_names
from draftcli.planning.plan import make_plan
from tests.command import draftp, recipe
from tests.tiny import write_single_file

# What no help of a typer program can do without.
BARE_HELP = "import sys, typer; sys.argv = ['x', '--help']; typer.run(lambda: None)"


def processor_time(code: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of the processor that `python -c CODE` takes: the quickest of three, as the machine has other work."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent), done


def test_help_is_instant_and_does_not_import_torch():
    """At most three times what the help of an empty typer program takes."""
    code = (
        "import sys; sys.argv = ['draftp', '--help']\n"
        "from draftcli.cli import main\n"
        "try: main()\n"
        "finally: sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'numpy')))"
    )
    (ours, done), (bare, empty) = processor_time(code), processor_time(BARE_HELP)
    assert done.returncode == 0, "a heavy library was imported"
    assert "train" in done.stdout
    assert "--help" in empty.stdout
    assert ours < 3 * bare


def test_version():
    assert draftp("--version").out == f"draftp {__version__}\n"


def test_help_of_a_command_teaches_by_example():
    assert draftp("train", "--help").out.count("draftp train --preset") >= 3


# half a minute of processor time for each plan of SDXL's memory
BY_SIZE = [pytest.param(n, marks=pytest.mark.slow) if n.startswith("sd") else n for n in preset_names()]


# what the header of a preset says to fetch first
FETCHED = {"sdxl-lightning-lora": "sdxl_lightning_4step.safetensors", "sdxl-lcm-lora": "lcm-lora-sdxl.safetensors"}


@pytest.mark.parametrize(("preset", "file"), FETCHED.items())
def test_a_preset_whose_file_was_not_fetched_says_so(preset, file):
    assert file in load_config_text(preset).split("\nmodel:")[0]
    result = draftp("train", "--preset", preset, "--dry-run")
    assert result.code == 2
    assert f"{file}: there is no such file" in result.err


@pytest.mark.parametrize("preset", BY_SIZE)
def test_dry_run_works_offline_for_every_preset_and_touches_nothing(preset, tiny_sdxl):
    if preset in FETCHED:
        write_single_file(tiny_sdxl, Path(FETCHED[preset]))
    result = draftp("train", "--preset", preset, "--dry-run")
    assert result.code == 0, result.err
    assert result.err == "", "a preset of ours gives no warning"
    for word in ("trainable", "frozen", "UNet evaluations", "images", "rewards", "with gradient", "needed"):
        assert word in result.out
    assert "kl_coeff" not in result.out
    assert [path.name for path in Path.cwd().iterdir()] == [name for name in [FETCHED.get(preset)] if name]


def test_a_dry_run_prints_the_settings_when_it_is_asked_to():
    result = draftp("train", "--preset", "toy", "--dry-run", "--verbose")
    assert "kl_coeff: 12.0" in result.out
    told = draftp("train", "--preset", "toy", "--verbose", "--dry-run", "--set", "sampling.sampler=heun")
    assert (told.code, told.out) == (2, ""), "an error stands alone"
    assert told.err.count("\n") == 1


def test_a_training_says_at_once_what_it_does(tiny_sdxl):
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run", "--verbose")
    assert result.err == "warning: --verbose has no effect without --dry-run\n"
    lines = result.out.splitlines()
    assert lines[0] == f"run run: {tiny_sdxl}, 4 steps"
    assert lines[1] == "loading torch, diffusers and transformers"
    assert lines[2].startswith("loaded in ")


def test_dry_run_counts_sdxl_as_it_is():
    """2.57 billion weights in the UNet; 10 steps before the gradient and one with it, that one with the base beside and
    its forward pass again in backward, are 13 with guidance: 26 evaluations.
    """
    plan = make_plan(load_config("sdxl-lora"))
    assert plan.frozen["unet"] == 2_567_463_684
    assert plan.frozen["text encoder"] == 123_060_480
    assert plan.frozen["text encoder 2"] == 694_659_840
    assert plan.forward + plan.base + plan.again == 26
    assert make_plan(load_config("sdxl-full")).trainable == 2_567_463_684


def test_the_preset_for_24_gb_has_two_names():
    assert load_config("sdxl-lora") == load_config("sdxl-lora-24gb")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_open_with_hardware_duration_result_and_command(preset):
    head = load_config_text(preset).split("\nmodel:")[0]
    for word in ("hardware", f"draftp train --preset {preset}"):
        assert word in head
    assert ("# duration " in head and "# result " in head) or "# status     not run on a GPU yet" in head
    load_config(preset)


def load_config_text(preset: str) -> str:
    from draftcli.config import presets_folder

    return (presets_folder() / f"{preset}.yaml").read_text(encoding="utf-8")


def test_reward_replaces_those_of_the_preset_and_set_wins_over_the_file():
    result = draftp(
        "train",
        "--preset",
        "toy",
        "--reward",
        "pickscore=0.5",
        "--reward",
        "clip",
        "--set",
        "optim.lr=3e-4",
        "--dry-run",
        "--verbose",
    )
    assert result.code == 0
    assert "rewards    pickscore, clip;" in result.out
    assert "lr: 0.0003" in result.out


def test_output_defaults_to_the_presets_name_and_quiet_is_quiet(tiny_sdxl):
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert Path("runs/tiny/final/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow  # a minute: builds a wheel, which fetches the build backend, and starts two processes from it
def test_the_wheel_works_from_any_folder(tmp_path):
    root = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, root], check=True)
    (wheel,) = tmp_path.glob("draftp-*.whl")
    assert wheel.stat().st_size < 16e6
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments], env=env, cwd=elsewhere, capture_output=True, text=True, check=True
        ).stdout

    assert run("-c", "import draftcli; print(draftcli.__file__)").startswith(str(site))
    settings = ["--set", "trainer.max_steps=1", "--set", "trainer.val_check_interval=0", "--set", "held_out_rewards=[]"]
    out = run("-m", "draftcli", "train", "--preset", "toy", *settings)
    assert "weights     runs/toy/final" in out

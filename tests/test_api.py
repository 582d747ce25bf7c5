"""The commands as functions: what they return, what they call back, and how little they print."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging
from PIL import Image
from safetensors.torch import load_file

import draftcli
from draftcli.errors import InputError
from tests.command import WITH_VALIDATION, draftp, recipe

LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)


@pytest.fixture(autouse=True)
def _outside_of_a_command(monkeypatch):
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)


def tiny(model, **sections):
    sections = {"optim": {"lr": 0.1}, "data": WITH_VALIDATION, **sections}
    return draftcli.load_config(recipe(model, **sections), ["trainer.max_steps=2", "trainer.val_check_interval=2"])


def test_from_training_to_a_report_without_a_word(tiny_sdxl, capfd):
    told, lines = [], []
    result = draftcli.train(tiny(tiny_sdxl), "runs/mine", progress=lambda *it: told.append(it), on_step=lines.append)
    assert result.finished
    assert result.validation is not None
    assert told == [("training", 1, 2), ("training", 2, 2)]

    run = draftcli.load_run("mine")
    assert lines == run.steps()
    assert run.settings() == draftcli.load_config("runs/mine/config.yaml")
    assert run.validations()[-1]["step"] == 2

    told.clear()
    drawn = draftcli.sample(
        "runs/mine", ["a red dog", "a cat"], base=True, images=2, progress=lambda *it: told.append(it)
    )
    assert len(drawn.files) == drawn.total == drawn.drawn == 8
    assert all(path.suffix == ".png" and path.is_file() for path in drawn.files)
    assert told[-1] == ("drawing", 8, 8)
    annealed = draftcli.anneal(Path("runs/mine"), weights=["power_2"], overrides=["sampling.steps=2"], output="out")
    assert list(annealed.evaluations) == ["base", "power_2", "tuned"]
    assert annealed.written["page"] == Path("out/compare.html")

    told.clear()
    report = draftcli.evaluate("runs/mine", images=2, features="toy", progress=lambda *it: told.append(it))
    assert report is not None
    assert list(report.comparison.figures) == ["base", "tuned", "linear"]
    assert report.written["report"].is_file()
    assert {what for what, *_ in told} == {"drawing mine", "measuring"}
    assert told[-1][1] == told[-1][2]
    assert capfd.readouterr() == ("", "")


def test_it_does_what_the_commands_do(tiny_sdxl):
    cfg = tiny(tiny_sdxl)
    draftcli.train(cfg, "runs/ours")
    overrides = ("--set", "trainer.max_steps=2", "--set", "trainer.val_check_interval=2")
    assert draftp("train", "--preset", "tiny.yaml", *overrides, "--output", "runs/theirs").code == 0
    a, b = (load_file(f"runs/{name}/final/pytorch_lora_weights.safetensors") for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    draftcli.sample("runs/ours", ["a red dog"], output="ours")
    assert draftp("sample", "runs/theirs", "--prompt", "a red dog", "--output", "theirs").code == 0
    ours, theirs = (Image.open(next(Path(name).glob("0*.png"))) for name in ("ours", "theirs"))
    assert ours.tobytes() == theirs.tobytes()


def test_libraries_are_afterwards_as_they_were(tiny_sdxl):
    levels = [library.get_verbosity() for library in LIBRARIES]
    bars = [library.is_progress_bar_enabled() for library in LIBRARIES]
    for library in LIBRARIES:
        library.set_verbosity(logging.INFO)
        library.enable_progress_bar()
    try:
        draftcli.sample(model=str(tiny_sdxl), prompts=["a fox"], overrides=["sampling.steps=1"])
        assert [library.get_verbosity() for library in LIBRARIES] == [logging.INFO] * 2
        assert all(library.is_progress_bar_enabled() for library in LIBRARIES)
    finally:
        for library, level, bar in zip(LIBRARIES, levels, bars, strict=True):
            library.set_verbosity(level)
            (library.enable_progress_bar if bar else library.disable_progress_bar)()


def test_a_training_in_another_thread(tiny_sdxl):
    """As in a web page or a notebook that stays usable: only the main thread can have signal handlers."""
    results = []
    thread = threading.Thread(target=lambda: results.append(draftcli.train(tiny(tiny_sdxl, data={}), "runs/mine")))
    thread.start()
    thread.join()
    assert [result.finished for result in results] == [True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draftcli.load_run("nowhere"), "nowhere is not a run"),
        (lambda: draftcli.sample("nowhere"), "nowhere is not a run"),
        (lambda: draftcli.sample(model="toy", prompts="no.txt"), "no.txt"),
        (lambda: draftcli.sample(model="toy", prompts=["a"], suffix="gif"), "gif: allowed are"),
        (lambda: draftcli.anneal(model="toy", prompts=["a"]), "alone has nothing to anneal to"),
        (lambda: draftcli.evaluate(["nowhere"]), "nowhere is not a run"),
        (lambda: draftcli.train(draftcli.load_config("toy", ["rewards={nothing: 1}"]), "runs/x"), "unknown reward"),
    ],
)  # fmt: skip
def test_what_the_user_gave_wrong_is_an_error_to_catch(call, words):
    with pytest.raises(InputError, match=words):
        call()
    assert not Path("runs").exists()


def test_the_package_shows_its_names_and_stays_light():
    """In a process of its own: listing the names, and a wrong run, import no torch."""
    code = (
        "import sys, draftcli\n"
        "light = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'typer', 'rich'} & {*sys.modules}\n"
        "assert not light, light\n"
        "assert {*draftcli.__all__} <= {*dir(draftcli)}\n"
        "try: draftcli.sample('nowhere')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = str(Path(draftcli.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (done.stdout.decode().strip(), done.stderr.decode()) == ("InputError", "")
    assert all(getattr(draftcli, name) is not None for name in draftcli.__all__)

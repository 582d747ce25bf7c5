"""The moving average, the best checkpoint, the warning of reward hacking, and where the figures go."""

import importlib.util
import json
import shutil
import struct
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file

from draftcli.config import check_config, load_config
from draftcli.metrics.thumbnails import pairwise_distance, thumbnail
from draftcli.runs import Run
from draftcli.training.ema import Ema
from draftcli.training.result import sheet_caption
from draftcli.training.trackers import run_tags
from tests.command import WITH_VALIDATION, draftp, recipe

LORA = "pytorch_lora_weights.safetensors"


def train(preset: Path, output: str, *options: str):
    result = draftp("train", "--preset", preset, "--output", output, *options)
    assert result.code == 0, result.err
    return result


def test_the_average_is_that_of_its_definition_on_any_device():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ema = Ema([weight], decay=0.3, device=torch.device("cpu"))
    expected, decays = weight.detach().clone(), [0.1, 2 / 11, 0.25, 0.3, 0.3]
    for i, decay in enumerate(decays):
        with torch.no_grad():
            weight += i + 1
        ema.update()
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(ema.averages[0], expected)
    before = weight.detach().clone()
    with ema.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, before)
    torch.testing.assert_close(ema.averages[0], expected)


def test_final_holds_the_average_or_the_last_weights_by_choice(tiny_sdxl):
    every_step = {"save_interval": 1, "keep_checkpoints": 9}
    preset = recipe(tiny_sdxl, trainer=every_step, ema={"decay": 0.9})
    train(preset, "averaged")
    train(preset, "last", "--set", "ema.in_final=false", "--set", "ema.device=cpu")
    train(recipe(tiny_sdxl, trainer=every_step), "plain")
    last, plain = load_file(Path("last/final") / LORA), load_file(Path("plain/final") / LORA)
    assert all(torch.equal(last[k], plain[k]) for k in plain), "the average does not touch the training"
    steps = [load_file(Path(f"plain/step-00000{n}") / LORA) for n in (1, 2, 3, 4)]
    averaged = load_file(Path("averaged/final") / LORA)
    for name, final in averaged.items():
        # Before the first step B is zero, and A is not known here: B alone is averaged by hand.
        if "lora_B" in name or "lora.up" in name:
            expected = torch.zeros_like(final)
            for n, step in enumerate(steps):
                decay = (1 + n) / (10 + n)
                expected = decay * expected + (1 - decay) * step[name]
            torch.testing.assert_close(final, expected)
            assert not torch.equal(final, plain[name])
    assert "decay 0.9" in Path("averaged/final/README.md").read_text()


def test_the_average_is_resumed_exactly(tiny_sdxl):
    preset = recipe(tiny_sdxl, ema={"decay": 0.9})
    train(preset, "whole")
    train(preset, "parts", "--set", "trainer.max_steps=1")
    train(preset, "parts")
    one, two = (load_file(Path(run) / "final" / LORA) for run in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_best_by_held_out_reward_stays_and_hacking_is_warned_about(tiny_sdxl):
    """Trained on red, judged by green: every step makes it worse, so the first is the best."""
    preset = recipe(
        tiny_sdxl,
        data=WITH_VALIDATION,
        held_out_rewards=["tests.example_rewards:green"],
        trainer={"val_check_interval": 1, "save_interval": 100, "keep_checkpoints": 1, "max_steps": 5},
        monitor={"stop": "never"},
    )
    result = train(preset, "run")
    assert [p.name for p in Run(Path("run")).checkpoints()] == ["step-000005", "step-000001"]
    assert Run(Path("run")).best() == 1
    assert "green on held-out prompts fell by" in result.err
    assert "this looks like reward hacking" in result.err


def test_pairwise_distance_is_between_pictures_of_one_group():
    images = torch.zeros(4, 3, 64, 96)
    images[1] = 0.5
    images[3] = 1.0
    figures = pairwise_distance(thumbnail(images), [0, 0, 1, 1])
    assert figures.tolist() == pytest.approx([0.5, 1.0])
    together = pairwise_distance(thumbnail(images), [0, 0, 0, 0])
    assert together.tolist() == pytest.approx([(0.5 + 0 + 1 + 0.5 + 0.5 + 1) / 6])


def test_the_bases_pictures_are_made_once_in_a_run(tiny_sdxl, monkeypatch):
    from draftcli.training import validation

    kinds, plain = [], validation.draw
    monkeypatch.setattr(validation, "draw", lambda model, pictures, kind, size: kinds.append(kind) or plain(
        model, pictures, kind, size))  # fmt: skip
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 2})
    train(preset, "run", "--set", "trainer.max_steps=2")
    assert kinds == ["base", "tuned"], "before the first step tuned is base"
    train(preset, "run")
    assert kinds == ["base", "tuned", "tuned"]
    lines = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert lines[0]["rewards"]["tests.example_rewards:red"]["difference"] == 0
    assert {entry["rewards"]["tests.example_rewards:red"]["base"] for entry in lines} == {
        lines[0]["rewards"]["tests.example_rewards:red"]["base"]
    }
    assert lines[0]["diversity"]["n"] == 2
    Path("run/samples/base.safetensors").write_bytes(b"damaged")
    train(preset, "run", "--set", "trainer.max_steps=6")
    assert kinds[3:] == ["base", "tuned"]


def test_runs_of_the_same_base_share_its_part_of_validation(tiny_sdxl, monkeypatch):
    """By what its pictures and scores depend on: not by training, but by seeds; and a run has its own in any case."""
    from draftcli.training import validation

    kinds, plain = [], validation.draw
    monkeypatch.setattr(validation, "draw", lambda model, pictures, kind, size: kinds.append(kind) or plain(
        model, pictures, kind, size))  # fmt: skip
    data = {**WITH_VALIDATION, "validation_cache": "shared/base"}
    preset = recipe(tiny_sdxl, data=data, trainer={"val_check_interval": 2, "max_steps": 2})
    train(preset, "first")
    (kept,) = Path("shared/base").iterdir()
    train(preset, "second", "--set", "optim.lr=0.02")
    assert kinds == ["base", "tuned", "tuned"]
    assert kept.read_bytes() == Path("first/samples/base.safetensors").read_bytes()
    bases = [
        [entry["rewards"]["tests.example_rewards:red"]["base"] for entry in Run(Path(run)).validations()]
        for run in ("first", "second")
    ]
    assert bases[0] == bases[1]
    kept.write_bytes(b"damaged")
    train(preset, "third")
    train(preset, "fourth", "--set", "trainer.seed=5")
    assert kinds[3:] == ["base", "tuned"] * 2
    assert len(list(Path("shared/base").iterdir())) == 2


def test_validation_pictures_may_have_sizes_of_their_own(tiny_sdxl):
    rows = [{"prompt": "a fox", "size": [64, 96]}, {"prompt": "an owl"}, {"prompt": "a cat", "size": [96, 64]}]
    Path("held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preset = recipe(tiny_sdxl, data={"validation_prompts": "held.jsonl"}, trainer={"val_check_interval": 4})
    train(preset, "run")
    assert Path("run/samples/step-000004-sheet.png").stat().st_size > 1000


def test_tensorboards_own_reader_finds_figures_and_pictures(tiny_sdxl):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 2}, logging={"tensorboard": True})
    train(preset, "run", "--set", "trainer.max_steps=2")
    train(preset, "run")
    events = EventAccumulator("run/tensorboard", size_guidance={"images": 0, "scalars": 0}).Reload()
    written = [json.loads(entry)["reward"] for entry in Path("run/metrics.jsonl").read_text().splitlines()]
    rewards = events.Scalars("train/reward")
    assert [point.step for point in rewards] == [1, 2, 3, 4]
    assert [point.value for point in rewards] == pytest.approx(written)
    assert [picture.step for picture in events.Images("validation/pictures")] == [0, 2, 4]
    tags = events.Tags()["scalars"]
    assert {"validation/tests.example_rewards:red/tuned", "validation/diversity/tuned", "train/memory_gib"} <= {*tags}


def test_tensorboard_drops_what_was_logged_after_the_checkpoint(tiny_sdxl):
    """Steps 3 and 4 are taken twice, and are one point each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preset = recipe(tiny_sdxl, logging={"tensorboard": True})
    train(preset, "run")
    shutil.rmtree("run/step-000004")
    train(preset, "run")
    events = EventAccumulator("run/tensorboard", size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars("train/reward")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "trackers", "project"),
    [
        ({}, ["tensorboard"], "draftp"),
        ({"tensorboard": True, "wandb": None}, ["tensorboard"], "draftp"),
        ({"tensorboard": False}, [], "draftp"),
        ({"tensorboard": True, "wandb": "mine"}, ["tensorboard", "wandb"], "mine"),
        ({"tensorboard": False, "wandb": "mine"}, ["wandb"], "mine"),
        ({"trackers": ["mlflow", "wandb"], "wandb": None}, ["mlflow"], "draftp"),
        ({"trackers": ["mlflow"], "tensorboard": True, "project": "mine"}, ["mlflow", "tensorboard"], "mine"),
    ],
)
def test_names_of_the_first_version_become_trackers(given, trackers, project):
    cfg = check_config({"logging": given}).logging
    assert (cfg.trackers, cfg.project) == (trackers, project)


def test_a_run_of_the_first_version_resumes_without_a_word_about_logging(tiny_sdxl):
    preset = recipe(tiny_sdxl, logging={"tensorboard": True})
    train(preset, "run", "--set", "trainer.max_steps=2")
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(yaml.safe_dump(settings | {"logging": {"tensorboard": True, "wandb": None}}))
    out = train(preset, "run").out
    assert "resuming run after step 2" in out
    assert "logging" not in out


class Unreliable(GeneralTracker):
    """A tracker whose server goes away after the second step, in the form that accelerate's users write."""

    name, requires_logging_directory, main_process_only = "unreliable", False, False
    logged: ClassVar[list[int]] = []

    def __init__(self, project: str) -> None:
        super().__init__()
        self.project = project

    @property
    def tracker(self) -> str:
        return self.project

    def store_init_configuration(self, values: dict) -> None:
        assert values["trainer"]["max_steps"] == 4

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        if step == 3:
            raise ConnectionError("the server is gone")
        self.logged.append(step)


def test_a_tracker_that_fails_is_dropped_and_the_training_goes_on(tiny_sdxl, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "unreliable", Unreliable)
    monkeypatch.setattr(Unreliable, "logged", [])
    result = train(recipe(tiny_sdxl, logging={"trackers": ["unreliable"]}), "run")
    assert result.err == "warning: logging.trackers unreliable gets no more figures: the server is gone\n"
    assert Unreliable.logged == [1, 2]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_does_not_start_is_one_line(tiny_sdxl, monkeypatch):
    def refuse(self, *_: object) -> None:
        raise RuntimeError("nobody is logged in\nsee the manual")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "unreliable", Unreliable)
    monkeypatch.setattr(Unreliable, "start", refuse)
    preset = recipe(tiny_sdxl, logging={"trackers": ["unreliable"]})
    result = draftp("train", "--preset", preset, "--output", "run")
    assert (result.code, result.err) == (
        2,
        "draftp: logging.trackers unreliable does not start: nobody is logged in\n",
    )


@pytest.mark.skipif(importlib.util.find_spec("aim") is not None, reason="aim is installed")
def test_a_tracker_needs_its_package(tiny_sdxl):
    preset = recipe(tiny_sdxl, logging={"trackers": ["tensorboard", "aim"]})
    result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 2
    assert "logging.trackers aim needs one more package: pip install aim" in result.err


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_needs_its_package(tiny_sdxl):
    result = draftp("train", "--preset", recipe(tiny_sdxl, logging={"wandb": "draftp"}), "--output", "run")
    assert result.code == 2
    assert "pip install 'draftp[wandb]'" in result.err


def wandb_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format after seven bytes; wandb ships no reader any more."""
    records, part, at, block = [], b"", 7, 32768
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(part)
            part = b""
    return records


@pytest.mark.parametrize(
    ("overrides", "tags"),
    [
        (["rewards={toy: 1, clip: 1}"], ["toy", "lora", "toy", "clip"]),
        (["model.pretrained=somebody/sdxl", "peft.peft_scheme=none"], ["somebody/sdxl", "full fine-tuning", "toy"]),
        (["model.pretrained=/home/me/sdxl", f"rewards={{my.{'x' * 80}:it: 1}}"], ["sdxl", "lora", f"my.{'x' * 61}"]),
    ],
)
def test_what_weights_and_biases_files_a_run_under(overrides, tags):
    assert run_tags(load_config("toy", overrides)) == list(dict.fromkeys(tags))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb, an optional extra, is not installed")
def test_wandb_offline_has_every_step_and_goes_on_after_a_resume(tiny_sdxl, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    preset = recipe(tiny_sdxl, data=WITH_VALIDATION, trainer={"val_check_interval": 4}, logging={"wandb": "draftp"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        train(preset, "run", "--set", "trainer.max_steps=2")
        train(preset, "run")
    from wandb.proto import wandb_internal_pb2

    rewards, identities, settings, captions, tags = {}, set(), set(), [], []
    for path in sorted(Path("run/wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            identities |= {record.run.run_id} - {""}
            settings |= {item.key for item in record.config.update}
            tags += record.run.tags
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/reward" in items:
                rewards[int(items["_step"])] = json.loads(items["train/reward"])
            captions += json.loads(items.get("validation/pictures/captions", "[]"))
    written = [json.loads(entry)["reward"] for entry in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [rewards[step] for step in (1, 2, 3, 4)] == pytest.approx(written)
    assert identities == {Path("run/wandb-id.txt").read_text()}
    assert {"optim", "trainer", "rewards"} <= settings
    assert {*tags} == {tiny_sdxl.name, "lora", "tests.example_rewards:red"}
    lines = [json.loads(line) for line in Path("run/validation.jsonl").read_text().splitlines()]
    assert captions == [sheet_caption(line) for line in lines]
    pictures = Path("run/wandb").glob("offline-run-*/files/media/images/validation/pictures_*.png")
    assert sorted(path.name.split("_")[1] for path in pictures) == ["0", "2", "4"]

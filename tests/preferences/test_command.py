"""`draftp rewards train` by the real command line, and its folder wherever a reward's name goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import draftcli
from draftcli.errors import InputError
from draftcli.rewards import load_reward
from draftcli.rewards.catalogue import same_network
from tests.command import draftp, recipe
from tests.preferences.people import rate

PAIRS = 60


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rate(tmp_path_factory.mktemp("rated"), PAIRS, repeats=10)


@pytest.fixture(scope="module")
def taste(rated: Path) -> Path:
    folder = rated.parent / "my-taste"
    result = draftp("rewards", "train", rated, "--output", folder)
    assert result.code == 0, result.err
    (folder.parent / "printed").write_text(result.out, encoding="utf-8")
    return folder


def test_what_is_printed_and_what_is_left(taste: Path) -> None:
    printed = (taste.parent / "printed").read_text(encoding="utf-8")
    report = json.loads((taste / "report.json").read_text(encoding="utf-8"))
    assert {path.name for path in taste.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "report.json", "held_out.jsonl",
    }  # fmt: skip
    held_out = report["held_out"]
    assert held_out["agreement"]["low"] > 0.6, "warmth can be read from colours"
    assert held_out["judges"]["toy"]["agreement"]["mean"] < held_out["agreement"]["mean"]
    assert held_out["steadiness"]["mean"] == 1
    assert (report["pairs"], report["trained"], report["from"]["reward"]) == (PAIRS + 10, "head", "toy")
    for words in (
        f"agrees with you in {held_out['agreement']['mean']:.2f}",
        "the same answer again in 1.00 of 10 pairs that were asked twice",
        f"draftp train --reward {taste}=1.0",
    ):
        assert words in printed
    card = (taste / "README.md").read_text(encoding="utf-8")
    assert f"trained on {PAIRS + 10} choices" in card
    lines = [json.loads(line) for line in (taste / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == PAIRS + 10
    right = sum((line["log_odds"] > 0) == (line["answer"] == 1) for line in lines)
    assert right / len(lines) == pytest.approx(held_out["agreement"]["mean"], abs=0.05), "each prompt counts alike"


def test_the_same_command_gives_the_same_bytes(rated: Path, taste: Path) -> None:
    result = draftp("rewards", "train", rated, "--output", "again")
    assert result.code == 0, result.err
    for file in ("model.safetensors", "config.json", "report.json"):
        assert Path("again", file).read_bytes() == (taste / file).read_bytes()
    assert "--reward ./again=1.0" in result.out
    assert draftp("rewards", "train", rated, "--output", "other", "--seed", "1").code == 0
    assert Path("other/report.json").read_bytes() != (taste / "report.json").read_bytes()


def test_the_folder_passes_the_check_of_rewards(taste: Path) -> None:
    result = draftp("rewards", "check", taste, "--size", "64x64")
    assert result.code == 0, result.out + result.err
    assert "usable for training and for evaluation" in result.out
    assert "slope        ok" in result.out, "the gradient is that of finite differences"


def test_its_score_is_the_line_on_the_clips_features(taste: Path) -> None:
    reward = load_reward(str(taste))
    clip = draftcli.get_reward_model("toy").reward
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red star", "a large blue circle", ""]
    tensors = load_file(taste / "model.safetensors")
    inputs = clip.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    seen = clip.clip(**inputs, pixel_values=images * 2 - 1)  # transformers' own forward
    match = seen.image_embeds * seen.text_embeds
    pooled = clip.clip.vision_model(pixel_values=images * 2 - 1).pooler_output
    features = torch.cat([pooled, match, seen.logits_per_image.diagonal()[:, None]], 1)
    expected = features @ tensors["weight"][0] + tensors["bias"]
    torch.testing.assert_close(reward(images, prompts), expected, rtol=1e-4, atol=1e-4)


def test_a_run_is_trained_on_it_and_knows_its_content(taste: Path, tiny_sdxl: Path) -> None:
    shutil.copytree(taste, "my-taste")
    preset = recipe(tiny_sdxl, data={"prompts": ["a red star", "a blue circle"]}, trainer={"val_check_interval": 0})
    command = ("train", "--preset", preset, "--output", "run", "--reward", "./my-taste=2.0")
    result = draftp(*command)
    assert result.code == 0, result.err
    contents = json.loads(Path("run/contents.json").read_text(encoding="utf-8"))
    assert set(contents["rewards../my-taste"]) == {
        "config.json", "model.safetensors", "README.md", "report.json", "held_out.jsonl",
    }  # fmt: skip
    Path("my-taste/model.safetensors").write_bytes(Path("my-taste/model.safetensors").read_bytes() + b" ")
    again = draftp(*command, "--set", "trainer.max_steps=6")
    assert again.code == 2
    assert "rewards../my-taste is as it was, but model.safetensors is another" in again.err


@pytest.mark.parametrize("name", ["./my-taste", "my-taste"])
def test_settings_of_a_reward_that_is_a_path(name: str, taste: Path) -> None:
    shutil.copytree(taste, "my-taste")
    settings = [f"rewards.{name}.target=3"] if "/" in name else [f"rewards={{{name}: {{target: 3}}}}"]
    cfg = draftcli.load_config("toy", [f"rewards={{{name}: 0.5}}", *settings])
    assert cfg.rewards[name].target == 3
    reward = draftcli.get_reward_model(cfg)
    assert reward(torch.rand(2, 3, 64, 64), ["a red star", "a blue star"]).shape == (2,)


def test_diversity_is_not_measured_in_what_it_stands_on(taste: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_network(str(taste), "toy")
    assert same_network("toy", str(taste))
    assert not same_network(str(taste), "pickscore")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no reward of draftp rewards train"),
        (lambda folder: (folder / "config.json").write_text("{}"), "holds no reward of draftp rewards train"),
        (lambda folder: change(folder, format=9), "written by a newer draftp"),
        (lambda folder: change(folder, trained="forest"), "config.json is damaged"),
        (lambda folder: change(folder, network="0" * 16), "was trained on another network than toy is now"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
    ],
)
def test_a_folder_that_is_no_reward_any_more(spoil, words, taste: Path) -> None:
    shutil.copytree(taste, "my-taste")
    spoil(Path("my-taste"))
    result = draftp("rewards", "check", "./my-taste")
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["draftp_reward"].update(values)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_what_is_there_is_replaced_only_if_it_is_a_reward_and_asked_for(rated: Path, taste: Path) -> None:
    shutil.copytree(taste, "my-taste")
    Path("photos").mkdir()
    Path("photos/cat.png").touch()
    for output, more, words in (
        ("my-taste", (), "a trained reward is there; add --overwrite"),
        ("photos", ("--overwrite",), "something else is there"),
    ):
        result = draftp("rewards", "train", rated, "--output", output, *more)
        assert (result.code, words in result.err) == (2, True), result.err
    assert draftp("rewards", "train", rated, "--output", "my-taste", "--overwrite").code == 0
    assert Path("photos/cat.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.jsonl"], "there is no such file or folder"),
        (["FILE", "--from", "brightness"], "brightness is not a CLIP, whose features can be learned on"),
        (["FILE", "--from", "pikscore"], "did you mean pickscore"),
        (["FILE", "--from", "./nowhere"], "there is no such folder"),
        (["FILE", "--from", "TASTE"], "is not a CLIP"),
        (["FILE", "--judge", "pikscore"], "did you mean pickscore"),
        (["ONE"], "none can be held out"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, words, rated: Path, taste: Path) -> None:
    one = rated.parent / "one.jsonl"
    one.write_text(rated.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    places = {"FILE": rated, "ONE": one, "TASTE": taste}
    result = draftp("rewards", "train", *(places.get(word, word) for word in arguments), "--output", "x")
    assert result.code == 2
    assert words in result.err
    assert result.err.count("\n") == 1
    assert not Path("x").exists()


def test_answers_by_chance_are_warned_about_and_unreadable_pictures_left_out(rated: Path) -> None:
    shutil.copytree(rated.parent / "pictures", "pictures")
    items = [json.loads(line) for line in rated.read_text(encoding="utf-8").splitlines()[:40]]
    for number, item in enumerate(items):
        item["answer"] = "left" if number * 7 % 4 < 2 else "right"
    Path(items[3]["left"]["picture"]).write_bytes(b"no picture")
    Path("p.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    result = draftp("rewards", "train", "p.jsonl", "--judge", "brightness")
    assert result.code == 0
    assert "warning: p.jsonl: 1 of 40 pairs are left out: " in result.err
    assert "cannot be told from chance" in result.err
    assert "brightness   0." in result.out
    assert Path("my-taste/config.json").is_file()


def test_a_reward_from_a_folder_that_has_moved_is_found_by_its_backbone(rated: Path) -> None:
    from draftcli.toy.reward import WEIGHTS_FOLDER

    shutil.copytree(WEIGHTS_FOLDER / "reward", "clip")
    assert draftp("rewards", "train", rated, "--from", "./clip", "--output", "mine").code == 0
    Path("clip").rename("moved")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_reward("./mine")
    images, prompts = torch.rand(2, 3, 64, 64), ["a red star", "a blue star"]
    assert load_reward("./mine", backbone="moved")(images, prompts).shape == (2,)

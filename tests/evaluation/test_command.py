"""`draftp eval` by its command line, on the tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from draftcli.evaluation.features import load_features
from draftcli.evaluation.measure import CHUNK, Judges, collect, measure
from draftcli.evaluation.pictures import Item, folder_gallery, read_entries, read_picture
from tests.cli.test_bad_input import expect
from tests.command import DRAWN, draftp
from tests.example_rewards import Red

RED, GREEN = "tests.example_rewards:red", "tests.example_rewards:green"
TOY = ("--features", "toy")  # in the package; the default, OpenAI's CLIP, would come from the hub


def run(*arguments):
    result = draftp("eval", *arguments, *TOY)
    assert result.code == 0, result.err
    return result


def figures(folder):
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))["figures"]


def make_folder(folder, prompts=("a fox", "an owl"), seeds=(0, 1), colour=None):
    """Pictures from elsewhere with their index; of one colour, or each of another."""
    folder = Path(folder)
    folder.mkdir()
    lines = []
    for i, (prompt, seed) in enumerate((p, s) for p in prompts for s in seeds):
        Image.new("RGB", (64, 64), colour or (40 * i, 200 - 30 * i, 20)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "prompt": prompt, "seed": seed}))
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")
    return folder


# -------------------------------------------------------------------------------------------------- what people get


def test_bare_eval_compares_the_newest_run(lora_run):
    shutil.copytree(lora_run, "runs/tiny")
    result = run("--num-images", 2)
    output = Path("runs/tiny/eval")
    for name in ("metrics.json", "metrics.csv", "pictures.csv", "report.html", "hero.png"):
        assert f"{output / name}" in result.out
        assert (output / name).stat().st_size > 500
    data = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    assert (data["format"], data["version"]) == ("draftp-eval", 1)
    assert [column["name"] for column in data["columns"]] == ["base", "tuned", "linear"]
    assert [column["evaluations"] for column in data["columns"]] == [6, 6, 10]
    assert data["trained"] == ["tests.example_rewards:red"]
    assert [item["prompt"] for item in data["items"]] == [prompt for prompt in DRAWN for _ in range(2)]
    assert all((output / file).is_file() for file in data["pictures"]["linear"]["files"])
    assert "warning: Only 3 prompts" in result.out


def copy_of_run(run_folder, name, weights):
    """A copy of a run whose settings say that it was trained with other weights of rewards."""
    shutil.copytree(run_folder, name)
    config = Path(name) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["rewards"] = {reward: {"weight": weight} for reward, weight in weights.items()}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return name


def test_weights_of_rewards_say_what_was_trained_on_and_which_way(lora_run):
    """A reward of weight 0 judges as one that is held out, and lower scores are better where the weight is below 0."""
    one = copy_of_run(lora_run, "one", {RED: -1, GREEN: 0})
    other = copy_of_run(lora_run, "other", {RED: 2})
    result = run(one, other, "--num-images", 2, "--weight", "base", "--output", "out")
    data = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert (data["trained"], data["judge"]) == ([RED], GREEN)
    assert [(metric["label"], metric["better"]) for metric in data["metrics"][:2]] == [(RED, -1), (GREEN, 1)]
    assert data["settings"]["trained_on"] == f"{RED} (lower is better)"
    assert data["settings"]["held_out"] == GREEN
    assert f"trained on: {RED} (lower is better); *" in " ".join(result.out.split())
    assert (
        f"one was trained towards lower scores of {RED} and other towards higher ones: lower is taken for better, "
        "as the first run has it." in data["warnings"]
    )
    report = Path("out/report.html").read_text(encoding="utf-8")
    assert report.count("trained on, lower is better") >= 3, "in the verdict, the key table and the details"


def test_what_is_there_is_not_done_again(lora_run):
    run(lora_run, "--output", "out", "--num-images", 2)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").rglob("*.npz")}
    drawn = {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")}
    first = Path("out/metrics.json").read_text()
    run(lora_run, "--output", "out", "--num-images", 2)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("out").rglob("*.npz")} == before
    assert {path: path.stat().st_mtime_ns for path in Path("out/pictures").rglob("*.png")} == drawn
    assert Path("out/metrics.json").read_text() == first


def test_scales_checkpoints_and_copies_are_what_they_should_be(lora_run):
    """Scale 0 is the base, scale 1 and the last checkpoint are the tuned network: their differences are exactly 0."""
    run(lora_run, lora_run / "step-000002", "--weight", "step_1", "--lora-scale", "0,1", "--output", "out")
    got = figures("out")
    key = "reward/tests.example_rewards:red"
    assert list(got) == [
        "base", "tuned", "step_1", "scale_0", "scale_1",
        "step-000002 tuned", "step-000002 step_1", "step-000002 scale_0", "step-000002 scale_1",
    ]  # fmt: skip
    assert got["tuned"][key]["difference"] != 0
    for name in ("step_1", "scale_0", "step-000002 scale_0"):
        assert (got[name][key]["difference"], got[name][key]["win_rate"]) == (0, 0.5), name
    for name in ("scale_1", "step-000002 tuned", "step-000002 scale_1"):
        assert got[name][key] == got["tuned"][key], name


def test_a_reward_judges_with_the_settings_of_its_run(lora_run):
    """Relative to control words it is another judge, and scores kept of the plain one are not taken for its own."""
    from draftcli.config import RewardSource
    from draftcli.evaluation.evaluate import load_judges
    from draftcli.rewards.wrappers import InMicroBatches, PromptRelative

    words = {"positive": "a red circle", "negative": "a blue square"}
    plain, relative, other = (
        load_judges({"toy": RewardSource.model_validate(settings)}, "toy", [])
        for settings in ({}, {"relative": words}, {"relative": words | {"negative": "a dog"}, "micro_batch_size": 2})
    )
    assert isinstance(relative.rewards["toy"], PromptRelative)
    assert isinstance(other.rewards["toy"], InMicroBatches)
    assert len({judges.fingerprint for judges in (plain, relative, other)}) == 3


def test_folders_of_pictures_from_elsewhere():
    make_folder("one")
    shutil.copytree("one", "same")
    make_folder("red", colour="red")
    run("one", "same", "red", "--reward", "tests.example_rewards:red", "--output", "out")
    got, key = figures("out"), "reward/tests.example_rewards:red"
    assert got["same"][key]["difference"] == 0
    assert got["red"][key]["value"] == 1
    assert got["red"]["squared_diversity"]["value"] == pytest.approx(0, abs=1e-6)
    assert got["red"]["pixel_diversity"]["value"] == 0
    assert got["red"]["near_duplicates"]["value"] == 1
    assert got["red"]["saturation"]["value"] == 1
    assert got["red"]["evaluations"]["why"] == "unknown"


def test_a_folder_beside_a_run(lora_run):
    make_folder("theirs", prompts=DRAWN, seeds=(1234, 1235))
    run(lora_run, "theirs", "--num-images", 2, "--output", "out")
    assert list(figures("out")) == ["base", "tuned", "linear", "theirs"]


def test_help_teaches_by_example():
    assert draftp("eval", "--help").out.count("draftp eval") >= 4


def test_quiet_is_quiet():
    make_folder("one"), make_folder("two")
    result = draftp("eval", "one", "two", "--reward", "toy", *TOY, "--quiet", "--output", "out")
    assert (result.code, result.out, result.err) == (0, "", "")


# ------------------------------------------------------------------------------------------ measuring goes on, in parts


@pytest.fixture
def work():
    items = [Item("a fox", seed) for seed in range(3 * CHUNK - 2)]
    folder = make_folder("many", prompts=["a fox"], seeds=range(len(items)))
    import torch

    return [folder_gallery(folder, items)], items, Judges({"red": Red()}, load_features("toy"), torch.device("cpu"))


def test_two_processes_measure_what_one_does(work):
    galleries, items, judges = work
    measure(galleries, items, judges, Path("one"))
    for rank in (1, 0):
        measure(galleries, items, judges, Path("two"), (rank, 2))
    files = sorted(path.name for path in Path("one").iterdir())
    assert len(files) == 3
    assert files == sorted(path.name for path in Path("two").iterdir())
    assert all((Path("one") / name).read_bytes() == (Path("two") / name).read_bytes() for name in files)


def test_an_interrupted_measurement_goes_on(work):
    galleries, items, judges = work
    done = []

    def stop(count):
        done.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(galleries, items, judges, Path("cache"), advance=stop)
    kept = {path.name: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    assert len(kept) == len(done) == 1
    measure(galleries, items, judges, Path("cache"))
    assert {name: (Path("cache") / name).stat().st_mtime_ns for name in kept} == kept
    got = collect(galleries[0], items, judges, Path("cache"))
    expected = [float((p[0] - p[1]).mean()) for p in map(read_picture, galleries[0].files)]
    assert got.scores["red"] == pytest.approx(expected, abs=1e-6)


def test_another_picture_or_judge_is_measured_anew(work):
    galleries, items, judges = work
    measure(galleries, items, judges, Path("cache"))
    Image.new("RGB", (64, 64), "blue").save(galleries[0].files[0])
    measure(galleries, items, judges, Path("cache"))
    assert len(list(Path("cache").iterdir())) == 4
    assert collect(galleries[0], items, judges, Path("cache")).scores["red"][0] == 0
    other = Judges({"red": Red(), "again": Red()}, judges.features, judges.device)
    measure(galleries, items, other, Path("cache"))
    assert len(list(Path("cache").iterdir())) == 7


def test_transparent_pictures_lie_on_white_and_sizes_may_differ():
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save("clear.png")
    assert read_picture(Path("clear.png")).shape == (3, 4, 8)
    assert np.all(read_picture(Path("clear.png")) == 1)
    make_folder("one")
    make_folder("two")
    Image.new("RGB", (96, 80), "red").save("two/0.png")
    run("one", "two", "--reward", "toy", "--output", "out")


def test_the_same_pictures_stored_otherwise_score_the_same():
    """Turned by EXIF, in 16 bits, with a palette: what people see decides."""
    folder = make_folder("plain")
    bright = np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))
    plain = [Image.fromarray(np.dstack([bright, bright.T, bright])), Image.fromarray(bright).convert("RGB")]
    plain += [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    for i, picture in enumerate(plain):
        picture.save(folder / f"{i}.png")
    shutil.copytree("plain", "other")
    turned = Image.Exif()
    turned[0x0112] = 6
    plain[0].rotate(90).save("other/0.png", exif=turned)
    Image.fromarray(bright.astype(np.uint16) * 257).save("other/1.png")
    plain[2].quantize(4).save("other/2.png", transparency=3)
    run("plain", "other", "--reward", "toy", "--output", "out")
    table = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))["pictures"]
    assert table["plain"]["scores"] == table["other"]["scores"]


# ---------------------------------------------------------------------------------------------------------- wrong input

WRONG = [
    (["nowhere"], "nowhere is not a run"),
    (["RUN", "--weight", "wobbly"], "wobbly"),
    (["RUN", "--weight", "step_2"], "step_2"),
    (["RUN", "--weight", "power_0"], "power_0"),
    (["RUN", "--weight", "linear,,base"], "''"),
    (["RUN", "--lora-scale", "much"], "--lora-scale much: expected numbers"),
    (["RUN", "--lora-scale", "0.5,nan"], "expected numbers"),
    (["RUN", "--seed", "4294967295"], "seeds go from 0 to 4294967295"),
    (["RUN", "--prompts", "nowhere.txt"], "--prompts nowhere.txt"),
    (["RUN", "--prompts", "empty.txt"], "there is no prompt in it"),
    (["RUN", "--prompts", "cat.png"], "expected a .txt, .jsonl"),
    (["RUN", "--prompts", "broken.jsonl"], "line 1: not valid JSON"),
    (["RUN", "--reward", "pickscoer"], "did you mean pickscore?"),
    (["RUN", "--reward", "tests.nowhere:x"], "cannot import"),
    (["RUN", "--judge", "nobody"], "--judge nobody: the rewards here are tests.example_rewards:red"),
    (["RUN", "--features", "nowhere"], "unknown reward 'nowhere'"),
    (["RUN", "--features", "toy_oracle"], "toy_oracle is not a CLIP"),
    (["RUN", "--features", "toy=bare"], "bare cannot be loaded"),
    (["RUN", "--features", "dinov2=bare"], "bare cannot be loaded"),
    (["RUN", "--set", "sampling.steps=0"], "sampling.steps = 0"),
    (["RUN", "--set", "nonsense=1"], "unknown setting nonsense"),
    (["RUN", "one"], "one: 12 of 12 images are missing"),
    (["empty"], "empty is not a run"),
    (["one"], "one has nothing to be compared with"),
    (["one", "two"], "image folders have no rewards"),
    (["one", "two", "--reward", "toy", "--lora-scale", "0.5"], "no images can be generated"),
    (["one", "two", "--reward", "toy", "--prompts", "empty.txt"], "which have their own prompts"),
    (["one", "fewer", "--reward", "toy"], "fewer: 1 of 4 images are missing, the first is seed 0 of 'an owl'"),
    (["one", "broken", "--reward", "toy"], "index.jsonl line 1: not valid JSON"),
    (["one", "keyless", "--reward", "toy"], "line 1: expected an object with file (text), prompt (text), seed"),
    (["one", "blank", "--reward", "toy"], "it contains no images"),
    (["one", "outside", "--reward", "toy"], "'../one/0.png' lies outside the folder"),
    (["one", "torn", "--reward", "toy"], "0.png: cannot be read as an image"),
    (["one", "moving", "--reward", "toy"], "0.png: it holds 2 frames or pages"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input(lora_run, arguments, words):
    make_folder("one"), make_folder("two"), Path("empty").mkdir()
    Path("bare").mkdir()  # transformers 4 reads "mpt" in "empty" and takes it for such a model
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"prompt"\n')
    Path("cat.png").write_bytes(b"")
    for name, lines in (
        (
            "fewer",
            Path("one/index.jsonl").read_text().splitlines()[:2] + Path("one/index.jsonl").read_text().splitlines()[3:],
        ),
        ("broken", ["{"]),
        ("keyless", ['{"file": "0.png", "prompt": "a fox"}']),
        ("blank", [""]),
        (
            "outside",
            [line.replace('"0.png"', '"../one/0.png"') for line in Path("one/index.jsonl").read_text().splitlines()],
        ),
        ("torn", Path("one/index.jsonl").read_text().splitlines()),
        ("moving", Path("one/index.jsonl").read_text().splitlines()),
    ):
        shutil.copytree("one", name)
        (Path(name) / "index.jsonl").write_text("\n".join(lines) + "\n")
    frame = Image.new("RGB", (64, 64), "red")
    frame.save("moving/0.png", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])
    Path("torn/0.png").write_bytes(Path("one/0.png").read_bytes()[:30])
    given = [lora_run if argument == "RUN" else argument for argument in arguments]
    features = () if "--features" in arguments else TOY
    expect(draftp("eval", *given, *features, "--output", "out"), 2, words)
    assert not Path("out/report.html").exists()


@pytest.mark.parametrize("option", [("--num-images", 0), ("--prefer", 2), ("--seed", -1)])
def test_numbers_out_of_range_show_the_usage(option):
    result = draftp("eval", *option)
    assert result.code == 2
    assert option[0] in result.err


def test_there_is_no_run():
    expect(draftp("eval"), 2, "there is no run under runs/")


def test_a_full_fine_tune_has_no_lora_to_scale(full_run):
    expect(draftp("eval", full_run, "--lora-scale", "0.5", *TOY), 2, "has no LoRA to scale")


def test_an_output_that_cannot_be_written():
    make_folder("one"), make_folder("two")
    Path("out").write_text("a file")
    expect(draftp("eval", "one", "two", "--reward", "toy", *TOY, "--output", "out"), 1, "out", "cannot be written")


def test_a_prompt_of_an_index_may_hold_other_line_breaks():
    line = {"file": "0001.png", "prompt": "a fox\u2028in snow", "seed": 0}
    Path("index.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_entries(Path()) == [line]

"""draftp rate as people meet it: from the command line, with pictures that are there and with some that are drawn."""

import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from draftcli.cli.console import literal_console
from draftcli.rating.agreement import agreement_with, summarise
from draftcli.rating.rate import rate_pictures
from draftcli.rating.request import RatingRequest, check_rating
from draftcli.rating.storage import read_preferences
from draftcli.toy.person import oracle_person, rate_pairs
from draftcli.toy.world import parse, render
from tests.command import draftp
from tests.rating.example import lines_of, prefers_red, write_folder

PROMPTS = ("a red dog", "a blue bird", "a green cat")


def rated(person=prefers_red, most=None, **given):
    """`draftp rate` in this process, with a function in the place of the person."""
    request = RatingRequest(**given)
    people = []

    def announce(address: str) -> None:
        people.append(threading.Thread(target=rate_pairs, args=(address, person, most)))
        people[0].start()

    result = rate_pictures(request, check_rating(request), literal_console(quiet=True), announce)
    people[0].join()
    return result


def sides(line):
    return [line["left"], line["right"]]


def test_a_run_beside_its_base(lora_run):
    result = rated(names=[str(lora_run)], prompts=PROMPTS, base=True, pairs=11, output=Path("out"))
    lines = lines_of(Path("out"))
    assert result.summary.answered == len(lines) == 12
    for line in lines:
        assert {side["column"] for side in sides(line)} == {"base", "tuned"}
        left, right = sides(line)
        assert left["seed"] == right["seed"]
        assert left["hash"] != right["hash"]
        assert left["model"] == str(lora_run)
        assert "steps" in left["settings"]
        assert prefers_red(*(Image.open(Path("out") / side["picture"]) for side in sides(line)), "") == line["answer"]
    index = [json.loads(line) for line in Path("out/pictures/index.jsonl").read_text().splitlines()]
    assert {line["hash"] for line in index} == {side["hash"] for line in lines for side in sides(line)}
    assert len(index) == 22
    assert result.columns == ["base", "tuned"]
    assert result.summary.wins.n == 11
    assert (result.summary.repeated, result.summary.steady) == (1, 1)


def test_two_seeds_go_on_without_drawing_or_asking_again(lora_run):
    given = {"names": [str(lora_run)], "prompts": PROMPTS[:2], "output": Path("out"), "seed": 5}
    result = rated(most=2, pairs=3, **given)
    assert (result.summary.answered, result.total) == (2, 3)
    drawn = {path: path.stat().st_mtime_ns for path in Path("out/pictures").glob("*.png")}
    assert rated(pairs=4, **given).summary.answered == 4
    lines = lines_of(Path("out"))
    assert len(lines) == 4
    assert sorted(sorted(side["seed"] for side in sides(line)) for line in lines) == [[5, 6], [5, 6], [7, 8], [7, 8]]
    assert {side["column"] for line in lines for side in sides(line)} == {"tuned"}
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn

    def nobody(*_):
        raise AssertionError("every pair has its answer")

    assert rated(nobody, pairs=4, **given).summary.answered == 4
    assert len(lines_of(Path("out"))) == 4


def test_a_run_against_another(lora_run, full_run):
    rated(names=[str(lora_run), str(full_run)], prompts=PROMPTS[:2], pairs=2, output=Path("out"))
    for line in lines_of(Path("out")):
        assert {side["column"] for side in sides(line)} == {f"{run.parent.name}/run" for run in (lora_run, full_run)}
        assert len({side["hash"] for side in sides(line)}) == 2
        assert len({side["seed"] for side in sides(line)}) == 1


def test_a_recipe_is_rated_on_the_prompts_that_it_trains_on(tiny_sdxl):
    from tests.command import recipe

    rated(preset=str(recipe(tiny_sdxl)), pairs=3)
    assert {line["prompt"] for line in lines_of(Path("rate"))} == {"a red cat", "a blue dog", "a green bird"}


def test_finishing_on_the_page_ends_the_drawing(lora_run):
    rated(names=[str(lora_run)], prompts=PROMPTS, pairs=500, most=1, output=Path("out"), batch_size=1)
    assert len(list(Path("out/pictures").glob("*.png"))) < 100


def test_ctrl_c_ends_the_drawing_and_keeps_what_is_there(lora_run):
    def leaves(*_):
        signal.raise_signal(signal.SIGINT)
        return "left"

    result = rated(leaves, names=[str(lora_run)], prompts=PROMPTS, pairs=500, most=1, output=Path("out"), batch_size=1)
    assert result.summary.answered == len(read_preferences(result.path)) == 1
    drawn = {path.name for path in Path("out/pictures").glob("*.png")}
    index = [json.loads(line)["file"] for line in Path("out/pictures/index.jsonl").read_text().splitlines()]
    assert 2 <= len(index) <= len(drawn) < 100
    assert drawn >= {*index}


# ---- the command line, in a process of its own


@contextmanager
def command(*arguments):
    """`draftp rate ARGUMENTS --no-open`, running: the process and its page's address."""
    # A suite that was started in the background ignores Ctrl-C, and so would its processes.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from draftcli.cli import main; main()"
    )
    call = [sys.executable, "-c", start, "rate", *map(str, arguments), "--no-open"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"rate at  (http://127\.0\.0\.1:\d+/[\w-]{40,}/)\n", line)
        try:
            assert found, line + process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()


@pytest.fixture
def pictures():
    return write_folder(Path("pictures"))


def test_killed_and_started_again_nothing_is_lost(pictures):
    """While the first one runs, a second one may neither write there nor listen at its port."""
    with command(pictures, "--pairs", 10) as (process, address):
        assert rate_pairs(address, prefers_red, most=4, finish=False) == 4
        refused = draftp("rate", pictures, "--pairs", 10)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "another draftp rate is open there" in refused.err
        port = address.split(":")[2].split("/")[0]
        refused = draftp("rate", pictures, "--output", "other", "--port", port, "--pairs", 10)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert f"--port {port}: cannot be used" in refused.err
        process.kill()
        assert process.wait() != 0
    before = Path("pictures/rate/preferences.jsonl").read_bytes()
    assert before.count(b"\n") == 4
    with command(pictures, "--pairs", 10) as (process, address):
        assert rate_pairs(address, prefers_red, most=7, finish=False) == 7
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        out, err = process.stdout.read(), process.stderr.read()
        assert err == ""
    assert Path("pictures/rate/preferences.jsonl").read_bytes().startswith(before)
    assert out.splitlines() == [
        "press Ctrl-C here, or Finish on the page, to save and quit",
        "11 of 11 answered: 10 preferences, 0 times neither, 0 skipped",
        "the same answer to 1 of 1 pairs that were shown twice",
        "answers  pictures/rate/preferences.jsonl",
    ]
    assert len(read_preferences(Path("pictures/rate/preferences.jsonl"))) == 11


# ---- what is refused, and what is said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one", "two", "three"], "3 names were given"),
        (["nowhere"], "nowhere"),
        ([], "no run"),
        (["pictures", "nowhere"], "give two runs or two folders"),
        (["one", "two", "--lora", "pictures"], "two runs are compared as they are"),
        (["pictures", "--judge", "pickscor"], "did you mean pickscore"),
        (["--model", "toy"], "no prompt was given"),
        (["--model", "toy", "--prompts", "none.txt"], "none.txt"),
        (["--model", "toy", "--prompt", "a red star", "--base"], "--base"),
        (["--model", "toy", "--preset", "toy"], "give one of them"),
        (["--preset", "toyy"], "did you mean toy"),
        (["--preset", "toy", "--set", "model.devise=cpu"], "did you mean device"),
    ],
)  # fmt: skip
def test_what_cannot_be_rated_is_one_line(pictures, arguments, words):
    result = draftp("rate", *arguments)
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert words in result.err
    assert not Path("rate").exists()


def test_a_missing_package_says_what_to_install(pictures, monkeypatch):
    monkeypatch.setattr("draftcli.rating.request._PACKAGES", ("starlette", "uvicorn_that_is_not_here"))
    result = draftp("rate", pictures)
    assert (result.code, result.err) == (
        2, "draftp: the page needs uvicorn_that_is_not_here: pip install 'draftp[rate]'\n",
    )  # fmt: skip


def test_settings_without_effect_and_too_few_pairs_are_said(capsys):
    write_folder(Path("pictures"), prompts=2, seeds=2)
    rated(names=["pictures"], base=True, overrides=["sampling.steps=3"], device="cpu", pairs=5)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: --set has no effect on folders of images",
        "warning: --base has no effect on folders of images",
        "warning: --device has no effect on folders of images",
        "warning: --pairs 5: there are 2 pairs in pictures",
    ]


# ---- what the answers say


def line(answer, left, right, repeats=False, prompt="p"):
    return {
        "prompt": prompt, "answer": answer, "repeats": repeats,
        "left": {"picture": left, "column": left[0]}, "right": {"picture": right, "column": right[0]},
    }  # fmt: skip


def test_answers_are_counted_and_compared_with_themselves():
    answers = [
        line("left", "a0", "b0"), line("right", "a1", "b1", prompt="q"), line("neither", "b2", "a2"),
        line("skip", "a3", "b3"), line("right", "b0", "a0", True), line("right", "b1", "a1", True, "q"),
        line("neither", "a2", "b2", True),
    ]  # fmt: skip
    summary = summarise(answers, ["a", "b"])
    assert (summary.answered, summary.preferences, summary.ties, summary.skipped) == (7, 2, 1, 1)
    assert (summary.repeated, summary.steady) == (3, 2), "of q the other image was better the second time"
    assert summary.wins.n == 3
    assert summary.wins.mean == pytest.approx((0.25 + 1) / 2), "prompts count alike: p has one lost and one tied, q won"
    assert summarise(answers, ["a"]).wins is None


def test_agreement_with_a_reward_is_counted_by_hand():
    folder = Path("bright")
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((16, 16 + i, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes())
    answers = [
        line("left", "3.png", "0.png"), line("right", "2.png", "1.png", prompt="q"), line("left", "3.png", "4.png"),
        line("neither", "0.png", "1.png"), line("skip", "0.png", "2.png"), line("left", "0.png", "3.png", True),
    ]  # fmt: skip
    agrees = agreement_with(answers, folder, "brightness", "cpu")
    assert agrees.n == 3
    assert agrees.mean == pytest.approx((0.75 + 0) / 2), "p: one right, one tied; q: wrong"
    assert agreement_with(answers, folder, "toy_oracle", "cpu").n == 0, "it has no score for such prompts"


def test_a_judge_leaves_out_pairs_whose_image_is_gone_and_says_so(capsys):
    for name, level in (("dark", 0), ("light", 200)):
        Image.new("RGB", (16, 16), (level,) * 3).save(f"{name}.png")
    seen, gone = line("left", "light.png", "dark.png"), line("left", "dark.png", "lost.png", prompt="q")
    agrees = agreement_with([seen, gone], Path(), "brightness", "cpu")
    assert (agrees.n, agrees.mean) == (1, 1)
    assert capsys.readouterr().err == (
        "warning: preferences.jsonl: 1 of 2 pairs are left out: lost.png: there is no such file\n"
    )
    assert agreement_with([line("neither", "light.png", "dark.png")], Path(), "brightness", "cpu").n == 0


def picture_of(caption: str, seed: int = 0) -> Image.Image:
    pixels = render(parse(caption), np.random.default_rng(seed))
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def toy_folder(folder: Path, count: int) -> Path:
    """Clean pictures of the toy world, each beside the one of another caption."""
    folder.mkdir()
    captions = ["a small red circle on the left of a white background", "a large blue star in the centre"]
    lines = []
    for i in range(count):
        for seed, caption in enumerate(captions):
            picture_of(caption, i).save(folder / f"{i}-{seed}.png")
            lines.append({"file": f"{i}-{seed}.png", "prompt": captions[i % 2], "seed": 2 * i + seed})
    (folder / "index.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))
    return folder


def test_the_oracle_as_the_person_and_a_judge_that_is_said_at_the_end():
    toy_folder(Path("toy"), 6)
    request = {"names": ["toy"], "pairs": 20, "judges": ["toy_oracle", "toy"], "device": "cpu"}
    sure = rated(oracle_person(1e-6), output=Path("sure"), **request)
    assert sure.judges["toy_oracle"].mean == 1
    unsure = rated(oracle_person(10.0), output=Path("unsure"), **request)
    assert unsure.judges["toy_oracle"].mean < 0.9
    result = draftp("rate", "toy", "--pairs", "20", "--output", "sure", "--judge", "toy_oracle", "--no-open")
    assert result.code == 0, result.err
    assert re.search(r"^toy_oracle agrees in 100 % of 20 pairs$", result.out, re.M), result.out


@pytest.mark.parametrize(
    ("prompt", "answer"), [("a large blue star in the centre", "right"), ("nothing it knows", "skip")]
)
def test_the_oracle_says_what_it_knows(prompt, answer):
    left, right = picture_of("a small red circle on the left"), picture_of("a large blue star in the centre")
    assert oracle_person(0.001)(left, right, prompt) == answer

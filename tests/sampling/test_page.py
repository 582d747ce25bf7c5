"""compare.html with the scores of an evaluation, and what sheets write about their images."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from draftcli.sampling.paper import line_height
from draftcli.sampling.scores import KnownScores, known_scores
from draftcli.sampling.sheet import Cell, Heading, Row, made_by_line, score_line, sheet_edge, write_sheet, write_table
from tests.command import draftp


def page_data(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_images_that_an_evaluation_scored_have_their_scores_on_the_page(lora_run):
    shutil.copytree(lora_run, "run")
    drawn = "--num-images", "2", "--prompts", "p.txt"
    Path("p.txt").write_text("a red dog\na blue bird\n")
    assert draftp("eval", "run", *drawn, "--features", "toy").code == 0
    (Path("more.txt")).write_text("a red dog\nnever evaluated\n")
    options = ("--weight", "base,tuned,linear", "--num-images", "2", "--prompts", "more.txt", "--output", "out")
    assert draftp("anneal", "run", *options).code == 0
    data = page_data(Path("out/compare.html"))
    evaluated = json.loads(Path("run/eval/metrics.json").read_text())
    assert data["columns"] == ["base", "tuned", "linear"]
    assert data["judge"] == evaluated["judge"]
    for i, item in enumerate(data["items"][:2]):
        expected = [evaluated["pictures"][name]["scores"][data["judge"]][i] for name in data["columns"]]
        assert item["scores"][data["judge"]] == expected
    assert [item["scores"] for item in data["items"][2:]] == [{}, {}], "another prompt was not scored"
    assert [item["prompt"] for item in data["items"]] == ["a red dog"] * 2 + ["never evaluated"] * 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pictures": {"base": {"files": ["x.png"], "scores": {}}}}'])
def test_an_evaluation_that_is_damaged_or_gone_has_no_scores(tmp_path, text):
    (tmp_path / "eval").mkdir()
    if text:
        (tmp_path / "eval/metrics.json").write_text(text)
    assert known_scores(tmp_path) == KnownScores()


@pytest.mark.parametrize(
    ("score", "base", "line"),
    [(0.8123, None, "oracle 0.812"), (0.8123, 0.9, "oracle 0.812 (-0.0877)"), (3.0, 2.5, "oracle 3.00 (+0.500)")],
)
def test_a_score_is_written_with_its_name_and_direction(score, base, line):
    assert score_line("package.module:oracle", score, base) == line


@pytest.mark.parametrize(("size", "edge"), [((64, 64), 192), ((192, 100), 192), ((193, 10), 320), ((1024, 1024), 320)])
def test_small_images_get_one_size_on_every_sheet(size, edge):
    assert sheet_edge(size, large=320) == edge


def rows_of_ink(path: Path) -> set[int]:
    """The rows of a sheet, in pixels, whose left margin of captions has letters in it."""
    with Image.open(path) as sheet:
        captions = sheet.convert("L").crop((32, 60, 220, sheet.height - 40))
        return {y for y in range(captions.height) if captions.crop((0, y, captions.width, y + 1)).getextrema()[0] < 90}


def test_a_table_writes_a_prompt_once(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    for name, second in (("once", "a red dog"), ("twice", "a blue bird")):
        rows = [Row("a red dog", "seed 0", [image]), Row(second, "seed 1", [image])]
        write_table(tmp_path / f"{name}.png", [Heading("base")], rows, "t")
    assert len(rows_of_ink(tmp_path / "twice.png")) > 1.5 * len(rows_of_ink(tmp_path / "once.png")) > 0


def test_the_seeds_of_a_prompt_are_lines_of_one_cell_and_the_footer_is_at_the_bottom(tmp_path):
    image = Image.new("RGB", (64, 64), "red")
    footer = made_by_line("runs/toy", "10 steps of euler")
    assert re.fullmatch(r"runs/toy · 10 steps of euler · \d{4}-\d\d-\d\d · draftp \S+", footer)
    sizes = []
    for count, foot in ((2, ""), (4, ""), (4, footer)):
        cell = Cell([image] * count, "a", ["base", "tuned"] * (count // 2), across=2)
        write_sheet(tmp_path / "s.png", [cell], "t", footer=foot)
        with Image.open(tmp_path / "s.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[1][0] == sizes[0][0]
    assert sizes[1][1] - sizes[0][1] > 192
    assert line_height("text") < sizes[2][1] - sizes[1][1] < 2 * line_height("text")

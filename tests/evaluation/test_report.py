"""The files that people open: complete, self-contained, and whatever stands in a prompt stays text."""

import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from draftcli.evaluation.citations import bibtex
from draftcli.evaluation.compare import compare
from draftcli.evaluation.figures import Figure
from draftcli.evaluation.key_table import KeyTable, key_table
from draftcli.evaluation.outputs import write_outputs
from draftcli.evaluation.plot import Point, clear_front, scatter
from draftcli.evaluation.report import choose_items, reward_points
from draftcli.evaluation.request import Request, command_line
from draftcli.evaluation.verdict import find_verdict, reward_change
from draftcli.pages.numbers import signed, significant
from tests.evaluation.example import ABOUT, EACH, GALLERIES, NASTY, PROMPTS, example_comparison, make_example


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    example = make_example(folder / "pictures")
    comparison = example_comparison(*example)
    _, items, measured = example
    return write_outputs(folder, comparison, ABOUT, items, measured), comparison, example


class Tags(HTMLParser):
    """Every tag with its attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def test_metrics_json_is_complete_and_has_no_nan(written):
    files, *_ = written
    text = files["metrics"].read_text(encoding="utf-8")
    assert "NaN" not in text
    data = json.loads(text)
    assert data["figures"].keys() == GALLERIES.keys()
    for figures in data["figures"].values():
        assert figures.keys() == {metric["key"] for metric in data["metrics"]}
    assert data["settings"]["prompts"] == NASTY


def test_metrics_json_keeps_its_layout(written):
    """Version 1 of the format: scripts of users read these keys."""
    data = json.loads(written[0]["metrics"].read_text(encoding="utf-8"))
    assert list(data) == [
        "format", "version", "draftp", "title", "settings", "columns", "base", "judge", "prefer", "trained", "metrics",
        "figures", "fronts", "recommendation", "warnings", "items", "pictures",
    ]  # fmt: skip
    assert (data["format"], data["version"]) == ("draftp-eval", 1)
    assert list(data["figures"]["tuned"]) == [
        "reward/toy", "reward/toy_oracle", "cosine_diversity", "squared_diversity", "vendi", "pixel_diversity",
        "recall", "precision", "density", "coverage", "spectral", "log_spectral", "fid", "kid", "saturation",
        "contrast", "edge_density", "colour_entropy", "high_frequency_energy", "clipped", "near_duplicates",
        "evaluations", "seconds",
    ]  # fmt: skip
    of_base = ["value", "median", "low", "high", "n"]
    against_base = ["difference", "difference_low", "difference_high", "win_rate", "win_low", "win_high"]
    assert list(data["figures"]["base"]["reward/toy"]) == of_base
    assert list(data["figures"]["tuned"]["reward/toy"]) == [*of_base, *against_base]
    assert list(data["figures"]["base"]["fid"]) == ["value", "why"]
    assert list(data["figures"]["tuned"]["kid"]) == ["value", "n"]
    assert list(data["figures"]["tuned"]["seconds"]) == ["value"]
    assert list(data["metrics"][0]) == ["key", "label", "group", "better", "digits", "about"]
    assert list(data["columns"][0]) == ["name", "source", "evaluations", "seconds"]
    assert list(data["recommendation"]) == ["column", "why"]


def test_tables_hold_every_figure_and_every_picture(written):
    files, comparison, (_, _, measured) = written
    with files["table"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(GALLERIES) * len(comparison.metrics)
    row = next(r for r in rows if (r["column"], r["metric"]) == ("tuned", "reward/toy"))
    assert float(row["difference"]) == comparison.figures["tuned"].reward("toy").difference
    with files["pictures"].open(encoding="utf-8", newline="") as file:
        pictures = list(csv.DictReader(file))
    assert len(pictures) == len(GALLERIES) * len(PROMPTS) * EACH
    assert pictures[0]["prompt"] == NASTY
    assert float(pictures[0]["toy"]) == measured["base"].scores["toy"][0]


def test_the_page_is_one_file_and_prompts_stay_text(written):
    text = written[0]["report"].read_text(encoding="utf-8")
    tags = Tags(text)
    assert [tag for tag, _ in tags.tags].count("script") == 2, "the data and ours; none from a prompt"
    for tag, attributes in tags.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert not re.search(r"url\(|@import", text)
    assert "&lt;script&gt;document.title" in text
    data = json.loads(tags.scripts[0])
    assert data["items"][0]["prompt"] == NASTY
    assert "49" not in {match.strip() for match in re.findall(r">([^<]*)<", text)}, "templates in prompts are not run"


def test_plots_escape_names_and_give_every_point_a_label():
    points = [Point(f"<b>{i}</b>", (i, i - 0.1, i + 0.1), (i % 3, np.nan, np.nan), on_front=i > 2) for i in range(5)]
    svg = scatter(points, "x & y", '"quoted"')
    assert "<b>" not in svg
    assert svg.count("&lt;b&gt;") == 15, "a label, a title, and a part of the description each"
    assert "nan" not in svg.partition("<style>")[0] + re.sub(r"<title>.*?</title>", "", svg)


def test_the_page_shows_worst_best_and_between(written):
    _, comparison, (_, items, measured) = written
    base, others = measured["base"].scores["toy_oracle"], [m for n, m in measured.items() if n != "base"]
    change = np.mean([m.scores["toy_oracle"] for m in others], axis=0) - base
    chosen = choose_items(comparison, items, measured, room=12 * len(GALLERIES))
    assert len(chosen) == 12
    assert {np.argmin(change), np.argmax(change)} <= set(chosen)
    assert len({items[i].prompt for i in chosen}) == 12, "each of another prompt"
    assert choose_items(comparison, items, measured) == list(range(len(items)))


def test_large_pictures_are_made_smaller():
    import base64
    import io

    from draftcli.pages.embed import EMBEDDED_EDGE, embedded

    uri = embedded(Image.new("RGB", (1344, 768), "red"))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (EMBEDDED_EDGE, round(EMBEDDED_EDGE * 768 / 1344))


# ------------------------------------------------------------------------------------------------- the verdict


def test_the_verdict_quotes_the_figures(written):
    _, comparison, _ = written
    verdict = find_verdict(comparison, len(PROMPTS), EACH)
    figures = comparison.figures["tuned"]
    held_out, kept = figures.reward("toy_oracle"), figures.diversity.diversity_kept
    assert verdict.column == "tuned"
    assert f"toy_oracle (held out) falls from 0.779 to {significant(held_out.value)}" in verdict.sentence
    assert f"95 % interval {signed(held_out.difference_low)} to {signed(held_out.difference_high)}" in verdict.sentence
    assert "toy (trained on) rises from 1.98 to 2.97" in verdict.sentence
    assert f"higher in {100 * figures.reward('toy').win_rate:.3g} % of pairs" in verdict.sentence
    assert verdict.sentence.endswith(f"It keeps {kept.words} of the diversity of base.")
    assert [use.column for use in verdict.uses] == [comparison.recommendation.column, "linear", "base"]


def test_where_lower_scores_are_wanted_the_report_shows_them_as_they_are_and_says_so(written, tmp_path):
    galleries, items, measured = written[2]
    negative = {n: replace(m, scores={**m.scores, "toy": -m.scores["toy"]}) for n, m in measured.items()}
    comparison = compare(galleries, items, negative, {"toy": -1}, "toy")
    figure = comparison.figures["tuned"].reward("toy")
    verdict = find_verdict(comparison, len(PROMPTS), EACH)
    assert "toy (trained on, lower is better) falls from −1.98 to −2.97" in verdict.sentence
    assert f"lower in {100 * (1 - figure.win_rate):.3g} % of pairs" in verdict.sentence
    assert [use.purpose for use in verdict.uses][1] == "the lowest toy"
    assert verdict.uses[1].column == "tuned"
    table = key_table(comparison)
    assert list(table.heads[1:3]) == ["toy (trained on, lower is better)", "toy_oracle (held out)"]
    assert table.rows[1][1].startswith("−2.97, −0.99")
    assert table.rows[1][1].endswith("wins 100 %")
    page = write_outputs(tmp_path, comparison, ABOUT, items, negative)["report"].read_text(encoding="utf-8")
    assert page.count("Higher is better, except for toy") == 2, "above the plots and above the table"
    assert "own unit (lower is better)" in page
    assert f'<span class="difference up">{signed(figure.difference)}</span> <span class="interval">wins 100 %' in page
    data = json.loads(Tags(page).scripts[0])
    assert data["better"] == {"toy": -1, "toy_oracle": 1}
    assert data["items"][0]["scores"]["toy"][0] < 0


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.05, 0.15, "r (held out) rises from 1.00 to 1.10 (+0.100, 95 % interval +0.0500 to +0.150"),
        (-0.05, 0.25, "r (held out) does not change measurably (+0.100, 95 % interval −0.0500 to +0.250"),
        (math.nan, math.nan, "r (held out) goes from 1.00 to 1.10, and there is no interval to judge that by"),
    ],
)
def test_only_what_is_certain_is_called_a_rise(low, high, said):
    figure = Figure(1.1, difference=0.1, difference_low=low, difference_high=high, win_rate=0.75)
    assert reward_change("r", figure, "held out").startswith(said)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9996, "1.00"), (12_345.0, "12,300"), (7.784, "7.78"), (-0.05612, "−0.0561"), (0.0, "0"), (1.8e-17, "0"),
        (1.234e-5, "1.23e−05"), (math.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert significant(value) == text


# ----------------------------------------------------------------------------------- tables, plots, citations, panel


def test_the_key_table_in_other_formats_escapes_what_is_special_there(written):
    table = key_table(written[1])
    assert [row[0] for row in table.rows] == list(GALLERIES)
    markdown, latex = table.to_markdown(), table.to_latex()
    assert markdown.splitlines()[1] == "| --- | --- | --- | --- | --- |"
    assert "toy\\_oracle (held out) & toy (trained on)" in latex
    assert "100 \\%" in latex
    assert "−" not in latex
    odd = KeyTable("a | b", ["x"], [["5 % & {y}_|"]])
    assert odd.to_markdown().splitlines()[2] == "| 5 % & {y}_\\| |"
    assert "5 \\% \\& \\{y\\}\\_|" in odd.to_latex()


def test_plots_are_in_percent_of_the_base(written):
    points = {point.name: point for point in reward_points(written[1], "toy_oracle")}
    figure = written[1].figures["tuned"]
    assert points["base"].x[0] == 100
    assert points["base"].y[0] == 0
    assert points["tuned"].x == pytest.approx(
        [100 * v for v in (figure.diversity.kept, figure.diversity.kept_low, figure.diversity.kept_high)]
    )
    oracle = figure.reward("toy_oracle")
    assert points["tuned"].y[0] == pytest.approx(100 * oracle.difference / (oracle.value - oracle.difference))


@pytest.mark.parametrize(("half", "names"), [(0.1, ["left", "right"]), (3.0, [])], ids=["certain", "noise"])
def test_a_front_is_drawn_where_it_is_more_than_noise(half, names):
    def point(name, x, y, on_front=True):
        return Point(name, (x, x - half, x + half), (y, y - half, y + half), on_front)

    points = [point("right", 3, 1), point("left", 1, 3), point("inside", 1, 1, on_front=False)]
    assert [p.name for p in clear_front(points)] == names
    assert ('class="line"' in scatter(points, "x", "y")) is bool(names)


def test_bibtex_names_what_was_used_and_nothing_else():
    entries = bibtex(["pickscore", "hpsv2_1"], "dinov2, facebook/dinov2-base, CLS token", True, True, ["sdxl"])
    assert re.findall(r"@misc\{(\w+),", entries) == [
        "clark2024draft", "jena2025aig", "podell2024sdxl", "kirstain2023pickapic", "wu2023hpsv2", "oquab2024dinov2",
        "friedman2023vendi",
    ]  # fmt: skip
    assert re.findall(r"@misc\{(\w+),", bibtex(["toy"], "toy", False, False)) == ["friedman2023vendi"]
    assert entries.count("{") == entries.count("}")


def test_the_panel_is_of_the_size_that_links_show(written):
    with Image.open(written[0]["hero"]) as panel:
        assert panel.size == (1200, 675)
        assert len(panel.getcolors(2**20)) > 50


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "draftp eval"),
        (
            {"names": ["runs/a b"], "weights": ("linear", "power_2"), "scales": (0.5,), "images": 8, "prefer": 0.7},
            "draftp eval 'runs/a b' --weight linear,power_2 --lora-scale 0.5 --num-images 8 --prefer 0.7",
        ),
        (
            {"rewards": ["clip", "toy"], "seed": 0, "overrides": ["model.device=cpu"], "output": Path("out")},
            "draftp eval --seed 0 --reward clip --reward toy --set model.device=cpu --output out",
        ),
    ],
)
def test_the_command_that_made_it(options, command):
    assert command_line(Request(**options)) == command

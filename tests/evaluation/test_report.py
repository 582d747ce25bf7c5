"""The files that people open: complete, self-contained, and whatever stands in a prompt stays text."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from draftcli.evaluation.outputs import write_outputs
from draftcli.evaluation.plot import Point, scatter
from draftcli.evaluation.report import choose_items
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
        "contrast", "edge_density", "colour_entropy", "high_frequency_energy", "near_duplicates", "evaluations",
        "seconds",
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
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import", text)
    assert "&lt;script&gt;document.title" in text
    data = json.loads(tags.scripts[0])
    assert data["items"][0]["prompt"] == NASTY
    assert "49" not in {match.strip() for match in re.findall(r">([^<]*)<", text)}, "templates in prompts are not run"


def test_plots_escape_names_and_give_every_point_a_label():
    points = [Point(f"<b>{i}</b>", (i, i - 0.1, i + 0.1), (i % 3, np.nan, np.nan), on_front=i > 2) for i in range(5)]
    svg = scatter(points, "x & y", '"quoted"')
    assert "<b>" not in svg
    assert svg.count("&lt;b&gt;") == 10, "a label and a title each"
    assert "nan" not in svg.partition("<style>")[0] + re.sub(r"<title>.*?</title>", "", svg)


def test_the_page_shows_worst_best_and_between(written):
    _, comparison, (_, items, measured) = written
    base, others = measured["base"].scores["toy_oracle"], [m for n, m in measured.items() if n != "base"]
    change = np.mean([m.scores["toy_oracle"] for m in others], axis=0) - base
    chosen = choose_items(comparison, items, measured, room=12 * len(GALLERIES))
    assert len(chosen) == 12
    assert set(np.argsort(change)[:4]) | set(np.argsort(change)[-4:]) <= set(chosen)
    assert choose_items(comparison, items, measured) == list(range(len(items)))


def test_large_pictures_are_made_smaller(tmp_path: Path):
    import base64
    import io

    from PIL import Image

    from draftcli.evaluation.report import EMBEDDED_EDGE, embedded

    Image.new("RGB", (1344, 768), "red").save(tmp_path / "wide.png")
    uri = embedded(tmp_path / "wide.png")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (EMBEDDED_EDGE, round(EMBEDDED_EDGE * 768 / 1344))

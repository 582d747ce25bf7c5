"""compare.html and training.html in a real browser; tests/evaluation/test_browser.py has the report."""

import shutil
from pathlib import Path

import pytest

from tests.command import draftp, trained_run

pytestmark = pytest.mark.browser

HOSTILE = '</script><img src="https://example.org/x.png" onerror="document.title=1"> of a fox'
WIDTHS = (1200, 390)


@pytest.fixture(scope="module")
def run(lora_run, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("pages") / "run"
    shutil.copytree(lora_run, copy)
    return copy


@pytest.fixture(scope="module")
def compare(run) -> Path:
    """Three columns, two prompts with two seeds each; one prompt is hostile."""
    prompts = run.parent / "prompts.txt"
    prompts.write_text(f"a red dog\n{HOSTILE}\n", encoding="utf-8")
    drawn = draftp(
        "anneal", run, "--weight", "linear", "--num-images", 2, "--prompts", prompts, "--output", run / "out"
    )
    assert drawn.code == 0, drawn.err
    page = run.parent / "compare.html"  # elsewhere: it needs no file beside it
    shutil.copy(run / "out" / "compare.html", page)
    return page


@pytest.fixture(scope="module")
def training(tiny_sdxl, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    validated = trained_run(folder, tiny_sdxl, trainer={"max_steps": 2, "val_check_interval": 1})
    page = folder / "training.html"
    shutil.copy(validated / "training.html", page)
    return page


def width_of(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def pictures_are_whole(page) -> bool:
    return page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0 && i.alt)")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_fits_the_window_in_every_view(open_file, compare, width, scheme):
    page = open_file(compare, width, color_scheme=scheme)
    assert pictures_are_whole(page)
    for view in ("pair", "slider", "all"):
        page.locator("#view").select_option(view)
        assert width_of(page) <= width, view
        shown = page.locator("#cards .item").first.locator("img")
        assert shown.count() == (3 if view == "all" else 2)


def test_a_hostile_prompt_stays_text(open_file, compare):
    page = open_file(compare)
    assert HOSTILE in page.locator("#cards").inner_text()
    assert page.title() != "1"


def test_arrow_keys_change_the_column_of_a_comparison(open_file, compare):
    page = open_file(compare)
    page.locator("#view").select_option("pair")
    card = page.locator(".pair").first
    card.focus()
    seen = set()
    for _ in range(3):
        seen.add(card.locator(".name").nth(1).inner_text())
        page.keyboard.press("ArrowRight")
    assert seen == {"linear", "tuned"}


def test_a_comparison_is_grouped_by_prompt_and_enlarges(open_file, compare):
    page = open_file(compare)
    assert page.locator("#cards .group").count() == 2
    page.locator(".pair").first.press("Enter")
    assert page.locator("#large").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#large").is_visible()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_training_fits_the_window(open_file, training, width, scheme):
    page = open_file(training, width, color_scheme=scheme)
    assert pictures_are_whole(page)
    assert width_of(page) <= width
    assert page.locator("svg.plot").count() >= 4, "rewards, diversity, loss and penalty"
    assert page.evaluate(
        "[...document.querySelectorAll('svg.plot')].every((e) => e.getBoundingClientRect().right <= innerWidth)"
    )
    for role in ("banner", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1, role


@pytest.mark.parametrize("name", ["compare", "training"])
def test_on_paper_there_are_no_controls_and_no_empty_pages(open_file, request, tmp_path, name):
    page = open_file(request.getfixturevalue(name))
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    pages = page.pdf(path=tmp_path / "page.pdf", format="A4").count(b"/Type /Page\n")
    assert 1 <= pages <= 6

"""The report in a real browser: Debian's Chromium, headless, driven by Playwright. Run by `make browser`."""

import re
import shutil
from functools import partial

import pytest

from tests.evaluation.example import GALLERIES, NASTY, write_example

pytestmark = pytest.mark.browser

DESK, PHONE = 1200, 390  # pixels across


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    files = write_example(folder)
    shutil.rmtree(folder / "pictures")  # the page must not need them
    return files["report"]


@pytest.fixture
def open_page(open_file, report):
    """`open_file` of the report."""
    return partial(open_file, report)


def card_scores(page):
    """The difference shown under each card, in order."""
    texts = page.locator("#cards .scores span").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def test_pictures_load_and_prompts_stay_text(open_page):
    page = open_page()
    assert NASTY in page.title(), "the script in the prompt would have changed it"
    assert page.locator("#cards .item").count() == 9
    assert page.locator("#cards .item img").count() == 18, "side by side"
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth === 64 && i.alt)")
    assert page.locator("svg.plot").count() == 2


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_nothing_is_wider_than_the_window(open_page, width):
    page = open_page(width)
    for view in ("pair", "slider", "all"):
        page.locator("#view").select_option(view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    page.locator(".pair").first.click()
    assert page.evaluate("document.getElementById('large').scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_page, scheme):
    """By WCAG's formula, 4.5 to 1 for text and 3 to 1 for the bars of the plots."""
    page = open_page(color_scheme=scheme)
    ratios = page.evaluate(
        """() => {
          const light = (text) => {
            const [r, g, b] = text.match(/[\\d.]+/g).map((v) => v / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          const ratio = (selector, what) => {
            const ink = light(getComputedStyle(document.querySelector(selector))[what]);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          };
          const texts = ["h1", ".note", ".interval"].map((selector) => ratio(selector, "color"));
          return [...texts, ratio(".plot text", "fill"), ratio(".plot .bar", "stroke")];
        }"""
    )
    assert min(ratios[:-1]) >= 4.5, ratios
    assert ratios[-1] >= 3


def test_worst_middle_and_best_are_of_different_prompts(open_page):
    page = open_page()
    groups = page.locator("#cards .group")
    assert [text.partition(":")[0] for text in groups.locator("h3").all_inner_texts()] == ["Worst", "Middle", "Best"]
    prompts = [text.rpartition(" · ")[0] for text in page.locator("#cards .prompt").all_inner_texts()]
    assert len(set(prompts)) == 9
    worst, middle, best = (card_scores(page)[i : i + 3] for i in (0, 3, 6))
    assert max(worst) <= min(middle)
    assert max(middle) <= min(best)
    counted = page.locator("#counts").inner_text()
    rises, falls, same, total = map(int, re.findall(r"(\d+)(?=,| of| pairs)", counted)[-4:])
    assert rises + falls + same == total == 60


def test_the_slider_follows_mouse_and_keys(open_page):
    page = open_page()
    page.locator("#view").select_option("slider")
    frame = page.locator(".compare").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, middle, steps=4)
    page.mouse.up()
    assert abs(int(frame.get_attribute("aria-valuenow")) - 25) <= 1
    assert frame.get_attribute("aria-valuetext").startswith(f"{frame.get_attribute('aria-valuenow')} % base")
    clip = frame.locator("img").nth(1).evaluate("(image) => getComputedStyle(image).clipPath")
    assert "75" in clip or "74" in clip
    assert not page.locator("#large").is_visible(), "dragging is not clicking"
    frame.press("Home")
    assert frame.get_attribute("aria-valuenow") == "0"
    frame.press("ArrowRight")
    assert frame.get_attribute("aria-valuenow") == "5"


def test_a_finger_enlarges_too(open_page):
    page = open_page(PHONE, has_touch=True)
    page.locator(".pair").first.tap()
    assert page.locator("#large").is_visible()


def test_a_click_enlarges_and_escape_closes(open_page):
    page = open_page()
    page.locator(".pair").nth(2).click()
    large = page.locator("#large")
    assert large.is_visible()
    assert large.locator(".strip button").count() == len(GALLERIES)
    large.locator(".strip button", has_text="worse").click()
    assert large.locator(".compare .r").inner_text() == "worse"
    assert page.evaluate("document.activeElement.textContent") == "worse", "the focus stays where it was"
    page.keyboard.press("Escape")
    assert not large.is_visible()
    page.locator(".pair").first.press("Enter")
    assert large.is_visible()
    large.get_by_role("button", name="Close").click()
    assert not large.is_visible()


def test_arrow_keys_turn_the_columns_and_the_focus_stays(open_page):
    page = open_page()
    page.locator("#order").select_option("given")
    page.locator(".pair").nth(1).focus()
    seen = []
    for _ in range(len(GALLERIES)):
        seen.append(page.locator(".pair").nth(1).locator(".name").nth(1).inner_text())
        page.keyboard.press("ArrowRight")
    assert set(seen) == GALLERIES.keys() - {"base"}
    assert page.evaluate("document.activeElement.dataset.key") == "card-1"


def test_sorting_and_any_two_columns(open_page):
    page = open_page()
    page.locator("#order").select_option("worst")
    assert card_scores(page) == sorted(card_scores(page)), "worst first"
    page.locator("#order").select_option("best")
    assert card_scores(page) == sorted(card_scores(page), reverse=True)
    page.locator("#right").select_option(label="tuned")
    page.locator("#left").select_option(label="worse")
    page.locator("#reward").select_option(label="toy")
    assert card_scores(page) == sorted(card_scores(page), reverse=True)
    assert min(card_scores(page)) > 0.7, "tuned is 0.9 above worse"
    assert page.locator("#cards .pair .name").first.inner_text() == "worse"


def test_more_cards_on_demand(open_page):
    page = open_page()
    page.locator("#order").select_option("given")
    assert page.locator("#cards .item").count() == 24
    for count in (48, 60):
        page.get_by_role("button", name="Show more").click()
        assert page.locator("#cards .item").count() == count
    assert not page.locator("#more").is_visible()
    assert page.locator("#cards h3").count() == 12, "grouped by prompt"


@pytest.mark.parametrize(("button", "start"), [("SVG", b"<svg"), ("PNG", b"\x89PNG")])
def test_plots_are_saved_as_files(open_page, tmp_path, button, start):
    page = open_page()
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button, exact=True).first.click()
    assert waiting.value.suggested_filename == f"toy_oracle.{button.lower()}"
    waiting.value.save_as(tmp_path / "plot")
    assert (tmp_path / "plot").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("link", "name", "text"),
    [
        ("CSV, every figure", "metrics.csv", "column,metric,value"),
        ("Markdown", "key-figures.md", "| column |"),
        ("LaTeX", "key-figures.tex", "\\begin{table}"),
    ],
)
def test_tables_are_saved_as_files(open_page, tmp_path, link, name, text):
    page = open_page()
    with page.expect_download() as waiting:
        page.get_by_role("link", name=link).click()
    assert waiting.value.suggested_filename == name
    waiting.value.save_as(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(text)


def test_landmarks_and_a_way_past_the_head(open_page):
    page = open_page()
    for role in ("banner", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1, role
    assert page.locator("table:not(:has(caption))").count() == 0
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_print_has_no_controls(open_page):
    page = open_page()
    page.emulate_media(media="print")
    first, second = (page.locator(".pair").first.locator("img").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]
    assert not page.locator(".controls").is_visible()

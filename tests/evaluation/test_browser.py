"""The report in a real browser: Debian's Chromium, headless, driven by Playwright. Run by `make browser`."""

import shutil

import pytest

from tests.evaluation.example import GALLERIES, NASTY, write_example

pytestmark = pytest.mark.browser

DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    files = write_example(folder)
    shutil.rmtree(folder / "pictures")  # the page must not need them
    return files["report"].as_uri()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "these tests need Debian's chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI is root in a container
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, report):
    """A function that opens the report and afterwards says that it kept to itself and complained about nothing."""
    contexts, trouble = [], []

    def opened(viewport=DESK):
        contexts.append(chromium.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if _is_outside(request.url) else None)
        page.goto(report)
        return page

    def _is_outside(url):
        return url != report and not url.startswith("data:")

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def card_scores(page):
    """The difference shown under each card, in order."""
    texts = page.locator("#cards .scores span").all_inner_texts()
    return [float(text.replace("−", "-")) for text in texts]


def test_pictures_load_and_prompts_stay_text(open_page):
    page = open_page()
    assert NASTY in page.title(), "the script in the prompt would have changed it"
    images = page.locator("#cards img")
    assert images.count() == 48
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth === 64)")
    assert page.locator("svg.plot").count() == 2


@pytest.mark.parametrize("viewport", [DESK, PHONE])
def test_nothing_is_wider_than_the_window(open_page, viewport):
    page = open_page(viewport)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.locator(".compare").first.click()
    assert page.evaluate("document.getElementById('large').scrollWidth") <= viewport["width"]


def test_the_slider_follows_mouse_and_keys(open_page):
    page = open_page()
    frame = page.locator(".compare").first
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, middle, steps=4)
    page.mouse.up()
    assert abs(int(frame.get_attribute("aria-valuenow")) - 25) <= 1
    clip = frame.locator("img").nth(1).evaluate("(image) => getComputedStyle(image).clipPath")
    assert "75" in clip
    assert not page.locator("#large").is_visible(), "dragging is not clicking"
    frame.press("Home")
    assert frame.get_attribute("aria-valuenow") == "0"
    frame.press("ArrowRight")
    assert frame.get_attribute("aria-valuenow") == "5"


def test_a_finger_drags_too(chromium, report):
    context = chromium.new_context(viewport=PHONE, has_touch=True)
    page = context.new_page()
    page.goto(report)
    page.locator(".compare").first.tap()
    assert page.locator("#large").is_visible()
    context.close()


def test_a_click_enlarges_and_escape_closes(open_page):
    page = open_page()
    page.locator(".compare").nth(2).click()
    large = page.locator("#large")
    assert large.is_visible()
    assert large.locator(".strip button").count() == len(GALLERIES)
    large.locator(".strip button", has_text="worse").click()
    assert large.locator(".compare .r").inner_text() == "worse"
    page.keyboard.press("Escape")
    assert not large.is_visible()
    page.locator(".compare").first.press("Enter")
    assert large.is_visible()
    large.get_by_role("button", name="close").click()
    assert not large.is_visible()


def test_sorting_and_any_two_columns(open_page):
    page = open_page()
    assert card_scores(page) == sorted(card_scores(page)), "worst first"
    page.locator("#order").select_option("best")
    assert card_scores(page) == sorted(card_scores(page), reverse=True)
    page.locator("#right").select_option(label="tuned")
    page.locator("#left").select_option(label="worse")
    page.locator("#reward").select_option(label="toy")
    assert card_scores(page) == sorted(card_scores(page), reverse=True)
    assert min(card_scores(page)) > 0.7, "tuned is 0.9 above worse"
    assert page.locator("#cards .compare .l").first.inner_text() == "worse"


def test_more_cards_on_demand(open_page):
    page = open_page()
    assert page.locator("#cards .item").count() == 24
    for count in (48, 60):
        page.get_by_role("button", name="show more").click()
        assert page.locator("#cards .item").count() == count
    assert not page.locator("#more").is_visible()


def test_print_shows_pairs_side_by_side(open_page):
    page = open_page()
    page.emulate_media(media="print")
    first, second = (page.locator(".compare").first.locator("img").nth(i).bounding_box() for i in (0, 1))
    assert first["x"] + first["width"] == pytest.approx(second["x"], abs=1)
    assert not page.locator(".controls").is_visible()

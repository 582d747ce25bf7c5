"""The rating page in a real browser: Debian's Chromium, headless, driven by Playwright. Run by `make browser`."""

from pathlib import Path

import pytest

from draftcli.rating.pairs import pairs_in_folder
from tests.rating.example import NASTY, lines_of, rating_page, write_folder

pytestmark = pytest.mark.browser

DESK, PHONE, ON_ITS_SIDE = ({"width": w, "height": h} for w, h in ((1200, 900), (390, 844), (844, 390)))
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "neither": "ArrowDown", "skip": "s"}
PAIRS = 20


def rating(output: Path, pairs: int = PAIRS, ready: int | None = None):
    """A page for the pictures in pictures/: its address and its session."""
    return rating_page(Path("pictures"), output, pairs, ready)


@pytest.fixture
def open_page(chromium):
    """A function that opens the page and afterwards says that it kept to itself and complained about nothing."""
    contexts, trouble = [], []
    write_folder(Path("pictures"), size=(300, 200))

    def opened(address, viewport=DESK, expected=(), **options):
        contexts.append(chromium.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()

        def complain(text):
            # a test's server ends before its page does
            if not any(words in text for words in ("ERR_CONNECTION_REFUSED", *expected)):
                trouble.append(text)

        page.on("console", lambda message: complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else complain(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def counted(page, done, total=PAIRS + 2):
    """Wait until so many are done and the next pair, if any, is there."""
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(f"{done} of {total}")
    expect(page.locator("main")).to_have_attribute("aria-busy", "false")


def test_twenty_pairs_by_keyboard_with_undo_reload_and_a_second_session(open_page):
    """Three are answered, one taken back, the page loaded anew, the server ended and started, and all are rated."""
    with rating(Path("out")) as (address, _):
        page = open_page(address)
        counted(page, 0)
        for done, answer in enumerate(("left", "right", "neither"), 1):
            page.keyboard.press(KEYS[answer])
            counted(page, done)
        page.keyboard.press("u")
        counted(page, 2)
        page.reload()
        counted(page, 2)
    assert [line.get("answer") for line in lines_of(Path("out"))] == ["left", "right", "neither", None]
    with rating(Path("out")) as (address, session):
        page = open_page(address)
        counted(page, 2)
        total = PAIRS + 2
        for done in range(3, total + 1):
            page.keyboard.press("ArrowLeft" if done % 2 else "ArrowRight")
            counted(page, done, total)
        assert page.locator("#wait").inner_text().startswith(f"All {total} pairs are rated.")
        page.keyboard.press("Backspace")
        counted(page, total - 1, total)
        page.keyboard.press("s")
        counted(page, total, total)
        page.locator("#finish").press("Enter")
        page.get_by_text("You can close this page").wait_for()
        assert session.ended.is_set()
        answers = session.answers()
    assert [line["answer"] for line in answers] == ["left", "right", *(["left", "right"] * 10)[:19], "skip"]
    assert [line["repeats"] for line in answers].count(True) == 2
    assert all(0 < line["seconds"] < 60 for line in answers)


def test_a_server_that_has_gone_is_said_and_nothing_is_lost(open_page):
    with rating(Path("out")) as (address, _):
        page = open_page(address)
        counted(page, 0)
        page.keyboard.press("ArrowLeft")
        counted(page, 1)
    page.keyboard.press("ArrowLeft")
    page.get_by_text("Every answer is saved. The same command goes on").wait_for()
    assert len(lines_of(Path("out"))) == 1


def test_hostile_prompts_stay_text(open_page):
    with rating(Path("out")) as (address, _):
        page = open_page(address)
        counted(page, 0)
        seen = set()
        for done in range(1, PAIRS + 3):
            seen.add(page.locator("#prompt").evaluate("(e) => e.textContent"))
            assert page.locator("#prompt *").count() == 0
            page.keyboard.press("ArrowLeft")
            counted(page, done)
        assert NASTY in seen
        assert page.title() == "Which image is better?"


def test_a_wrong_token_shows_nothing(open_page):
    with rating(Path("out")) as (address, _):
        wrong = address[:-2] + ("A/" if address[-2] != "A" else "B/")
        page = open_page(wrong, expected=["404", "favicon.ico"])
        assert page.locator("body").inner_text() == "not found"


def test_pairs_that_are_not_drawn_yet_come_by_themselves(open_page):
    with rating(Path("out"), ready=0) as (address, session):
        page = open_page(address)
        page.get_by_text("The next pair is being drawn.").wait_for()
        page.keyboard.press("ArrowLeft")
        assert not session.answers()
        session.add(pairs_in_folder(Path("pictures"), "theirs", PAIRS, seed=0))
        page.locator("#pair").wait_for()
        counted(page, 0)  # its pictures are there: until then a key has no effect
        page.keyboard.press("ArrowLeft")
        counted(page, 1)


@pytest.mark.parametrize("viewport", [DESK, PHONE, ON_ITS_SIDE], ids=["desk", "phone", "on its side"])
@pytest.mark.parametrize("size", [(300, 200), (64, 64), (200, 700)], ids=["wide", "tiny", "tall"])
def test_everything_is_in_the_window(open_page, viewport, size):
    """Both pictures, undistorted and as large as there is room, and every button large enough for a finger."""
    write_folder(Path("pictures"), size=size)
    with rating(Path("out")) as (address, _):
        page = open_page(address, viewport, has_touch=True)
        counted(page, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert page.evaluate("document.documentElement.scrollHeight") <= viewport["height"]
        for button in page.locator(".answers button, .look").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= 44
            assert box["y"] + box["height"] <= viewport["height"]
        first, second = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
        assert first["width"] * first["height"] > 0.15 * viewport["width"] * viewport["height"]
        assert first["x"] + first["width"] <= second["x"] or first["y"] + first["height"] <= second["y"]


def test_fingers_choose_enlarge_and_take_back(open_page):
    with rating(Path("out")) as (address, _):
        page = open_page(address, PHONE, has_touch=True, is_mobile=True)
        counted(page, 0)
        page.locator(".look").nth(1).tap()
        large = page.locator("#large")
        assert large.is_visible()
        assert large.locator("[aria-pressed=true]").inner_text() == "Lower"
        large.get_by_role("button", name="Close").tap()
        page.locator(".pick").nth(1).tap()
        counted(page, 1)
        page.get_by_role("button", name="Neither").tap()
        counted(page, 2)
        page.get_by_role("button", name="Undo").tap()
        counted(page, 1)
    assert [line.get("answer") for line in lines_of(Path("out"))] == ["right", "neither", None]


def test_the_keyboard_alone_does_everything(open_page):
    """Tab reaches every button; enlarged, the arrows turn between the two and answer nothing."""
    with rating(Path("out")) as (address, session):
        page = open_page(address)
        counted(page, 0)
        page.keyboard.press("e")
        large = page.locator("#large")
        shown = page.locator("#enlarged").get_attribute("src")
        page.keyboard.press("ArrowRight")
        assert page.locator("#enlarged").get_attribute("src") != shown
        assert not session.answers()
        page.keyboard.press("Escape")
        assert not large.is_visible()
        page.locator("h1").click()  # from the top
        reached = []
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
            )
        for name in ("Left", "Neither", "Right", "Skip", "Undo", "Finish"):
            assert any(name in text for text in reached), reached
        page.get_by_role("button", name="Neither").press("Enter")
        counted(page, 1)
        page.keyboard.down("ArrowLeft")
        page.keyboard.down("ArrowLeft")  # held down: it repeats
        counted(page, 2)
        page.keyboard.press("Control+ArrowLeft")
        counted(page, 2)
    assert [line["answer"] for line in lines_of(Path("out"))] == ["neither", "left"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_page, scheme):
    """By WCAG's formula, 4.5 to 1."""
    with rating(Path("out")) as (address, _):
        page = open_page(address, color_scheme=scheme)
        counted(page, 0)
        ratios = page.evaluate(
            """() => {
              const light = (text) => {
                const [r, g, b] = text.match(/[\\d.]+/g).map((v) => v / 255)
                  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              return ["h1", "#prompt", "#count", ".answers button", ".answers kbd"].map((selector) => {
                const element = document.querySelector(selector);
                let ground = element;
                while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
                const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(light);
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
              });
            }"""
        )
    assert min(ratios) >= 4.5, ratios


def test_a_second_window_follows_the_first(open_page):
    with rating(Path("out")) as (address, _):
        first, second = open_page(address), open_page(address, expected=["409"])
        counted(first, 0)
        counted(second, 0)
        first.keyboard.press("ArrowLeft")
        counted(first, 1)
        second.keyboard.press("ArrowRight")
        second.get_by_text("answered in another window").wait_for()
        counted(second, 1)
    assert [line["answer"] for line in lines_of(Path("out"))] == ["left"]


def test_a_picture_that_is_gone_can_be_skipped(open_page):
    with rating(Path("out")) as (address, _):
        for path in Path("pictures").glob("*.png"):
            path.unlink()
        page = open_page(address, expected=["404"])
        page.get_by_text("An image cannot be shown").wait_for()
        page.keyboard.press("s")
        counted(page, 1)

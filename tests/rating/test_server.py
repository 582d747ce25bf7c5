"""The page by its HTTP interface, on a real server: rating, undo, going on, and what is refused."""

import http.client
import io
import json
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from draftcli.rating.pairs import pairs_in_folder
from draftcli.toy.person import rate_pairs
from tests.rating.example import NASTY, lines_of, prefers_red, rating_page, red, write_folder

PAIRS = 12


def page(pictures: Path, output: Path, pairs: int = PAIRS, ready: int | None = None):
    """The page for a folder of pictures: its address and its session."""
    return rating_page(pictures, output, pairs, ready)


@pytest.fixture
def pictures(tmp_path):
    return write_folder(tmp_path / "pictures")


def ask(address, what, given=None, method=None, **headers):
    """The status and the body of one request, as they come."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname, where.port)
    body = given if given is None or isinstance(given, bytes) else json.dumps(given).encode()
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method or ("GET" if given is None else "POST"), where.path + what, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, text, response.headers


def state(address):
    return json.loads(ask(address, "state")[1])


def test_everything_is_rated_kept_and_steady(pictures, tmp_path):
    out = tmp_path / "out"
    with page(pictures, out) as (address, session):
        assert rate_pairs(address, prefers_red) == PAIRS + 1, "one of ten is shown again"
        assert session.ended.is_set()
        answers = session.answers()
    lines = lines_of(out)
    assert answers == lines
    for line in lines:
        assert [*line] == ["prompt", "left", "right", "answer", "seconds", "repeats", "time"]
        left, right = (Image.open(out / line[side]["picture"]) for side in ("left", "right"))
        assert line["answer"] == prefers_red(left, right, "")
        assert line["left"].keys() == {"picture", "column", "seed", "weight", "hash"}
        assert line["left"]["column"] == "drawn"
        assert 0 <= line["seconds"] < 60
    assert NASTY in {line["prompt"] for line in lines}
    (again,) = (line for line in lines if line["repeats"])
    (first,) = (line for line in lines if line["left"] == again["right"] and line["right"] == again["left"])
    assert {first["answer"], again["answer"]} == {"left", "right"}


def test_a_session_goes_on_where_another_was(pictures, tmp_path):
    out = tmp_path / "out"
    with page(pictures, out) as (address, _):
        assert rate_pairs(address, prefers_red, most=5, finish=False) == 5
    with page(pictures, out) as (address, session):
        assert (state(address)["done"], session.given) == (5, 0)
        ask(address, "undo", {})
        assert state(address)["done"] == 4, "undo reaches back into earlier sessions"
        rate_pairs(address, prefers_red)
        assert len(session.answers()) == PAIRS + 1
    with page(pictures, out, pairs=PAIRS + 3) as (address, session):
        assert state(address)["done"] == PAIRS + 1, "more pairs begin with the same ones"
        assert rate_pairs(address, prefers_red) == 3
    assert sum("undo" in line for line in lines_of(out)) == 1


def test_undo_shows_the_same_pair_again(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, _):
        first = state(address)
        assert not first["undo"]
        status, text, _ = ask(address, "answer", {"name": first["pair"]["name"], "answer": "left", "seconds": 1})
        assert (status, json.loads(text)["done"]) == (200, 1)
        assert json.loads(ask(address, "undo", {})[1]) == first
        assert json.loads(ask(address, "undo", {})[1]) == first, "nothing is left to take back"
    assert [line.get("undo") for line in lines_of(tmp_path / "out")] == [None, 0]


def test_a_pair_that_was_skipped_is_not_shown_again(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, session):
        assert rate_pairs(address, lambda *_: "skip") == PAIRS
        assert session.state()["total"] == PAIRS


def test_an_answer_to_another_pair_changes_nothing(pictures, tmp_path):
    """As from a second window, or a button pressed twice."""
    with page(pictures, tmp_path / "out") as (address, session):
        given = {"name": state(address)["pair"]["name"], "answer": "left", "seconds": 1}
        assert ask(address, "answer", given)[0] == 200
        status, text, _ = ask(address, "answer", given)
        assert (status, json.loads(text)) == (409, session.state())
        assert len(session.answers()) == 1


def test_pairs_are_waited_for(pictures, tmp_path):
    with page(pictures, tmp_path / "out", ready=1) as (address, session):
        assert rate_pairs(address, prefers_red, most=1, finish=False) == 1
        waiting = state(address)
        assert waiting["pair"] is None
        assert not waiting["complete"]
        assert (waiting["drawn"], waiting["pairs"]) == (1, PAIRS)
        session.add(pairs_in_folder(pictures, "theirs", 2, seed=0)[1:])
        assert state(address)["pair"] is not None


def test_nothing_says_which_is_which(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, _):
        shown = state(address)
        texts = [json.dumps(shown), ask(address, "")[1].decode()]
        for name in (shown["pair"]["left"], shown["pair"]["right"], *shown["ahead"]):
            status, data, headers = ask(address, f"picture/{name}")
            assert (status, headers["content-type"]) == (200, "image/png")
            assert not Image.open(io.BytesIO(data)).info.keys() & {"parameters"}
            texts.append(str(headers))
        assert not [text for text in texts if "drawn0" in text or ".png" in text or "AIG" in text or '"seed' in text]
        assert len({*shown["pair"].values()}) == 4
    with page(pictures, tmp_path / "out2") as (address, _):
        assert state(address)["pair"]["left"] != shown["pair"]["left"], "names are new each time"


def test_pixels_are_those_of_the_file(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, session):
        pair = state(address)["pair"]
        for side in ("left", "right"):
            with urllib.request.urlopen(f"{address}picture/{pair[side]}") as response:
                assert red(Image.open(response)) == red(Image.open(session.picture(pair[side])))


def test_requests_without_the_token_or_from_elsewhere_are_refused(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, session):
        where = urlsplit(address)
        outside = f"{where.scheme}://{where.netloc}/"
        assert ask(outside, "")[0] == ask(outside, "state")[0] == ask(outside, "x" * 43 + "/state")[0] == 404
        assert ask(address[:-2] + "/", "state")[0] == 404
        assert ask(outside, "wrong/answer", {"name": "x", "answer": "left", "seconds": 1})[0] == 404
        port = where.port
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1.evil.example:{port}",
            f"127.0.0.1:{port + 1}",
        ):
            assert ask(address, "state", Host=host)[0] == 403, host
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert ask(address, "state", Host=host)[0] == 200
        assert ask(address, "finish", {}, Origin="http://evil.example")[0] == 403
        assert ask(address, "undo", {}, Origin=f"http://localhost:{port}")[0] == 200
        assert not session.ended.is_set()
        assert not session.answers()


@pytest.fixture(scope="module")
def one_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with page(write_folder(folder / "pictures"), folder / "out") as opened:
        yield opened


GOOD = {"name": "x", "answer": "left", "seconds": 1}


@pytest.mark.parametrize(
    ("what", "given", "headers", "status"),
    [
        ("answer", None, {}, 405),
        ("finish", None, {}, 405),
        ("state", {}, {}, 405),
        ("nothing", None, {}, 404),
        ("picture/nothing", None, {}, 404),
        ("picture/..%2f..%2fetc%2fpasswd", None, {}, 404),
        ("answer", b"name=x&answer=left", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ("answer", b"{", {}, 400),
        ("answer", b"[" * 4000, {}, 400),
        ("answer", b"\xff", {}, 400),
        ("answer", [], {}, 400),
        ("answer", {**GOOD, "answer": "both"}, {}, 400),
        ("answer", {**GOOD, "answer": ["left"]}, {}, 400),
        ("answer", {**GOOD, "name": 3}, {}, 400),
        ("answer", {**GOOD, "seconds": -1}, {}, 400),
        ("answer", {**GOOD, "seconds": float("nan")}, {}, 400),
        ("answer", {**GOOD, "seconds": 10**400}, {}, 400),
        ("answer", {**GOOD, "seconds": True}, {}, 400),
        ("answer", {**GOOD, "name": "x" * 5000}, {}, 413),
        ("answer", GOOD, {}, 409),
    ],
)
def test_bad_requests_change_nothing(one_page, what, given, headers, status):
    address, session = one_page
    assert ask(address, what, given, **headers)[0] == status
    assert not session.answers()
    assert not session.ended.is_set()


def test_the_page_keeps_to_itself(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, _):
        _, text, headers = ask(address, "")
    html = text.decode()
    assert "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src" in html
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "http://" not in html
    assert "https://" not in html


def test_a_picture_that_is_gone_is_said_and_skipped(pictures, tmp_path):
    with page(pictures, tmp_path / "out") as (address, session):
        shutil.rmtree(pictures)
        pair = state(address)["pair"]
        status, text, _ = ask(address, f"picture/{pair['left']}")
        assert status == 404
        assert b"cannot be read as an image" in text
        assert ask(address, "answer", {"name": pair["name"], "answer": "skip", "seconds": 0})[0] == 200
        assert [line["answer"] for line in session.answers()] == ["skip"]

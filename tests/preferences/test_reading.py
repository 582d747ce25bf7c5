"""Every layout in which people have preferences, and what is wrong with files of them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from draftcli.errors import InputError
from draftcli.preferences.pairs import Answer, Answers, Shown
from draftcli.preferences.reading import read_answers


def picture(path: Path | str, colour: str = "red") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return str(path)


def lines(*items: object, name: str = "p.jsonl") -> Path:
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    Path(name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return Path(name)


def rated(answer: object, left: str = "a.png", right: str = "b.png", prompt: str = "a fox", **more: object) -> dict:
    return {
        "prompt": prompt,
        "left": {"picture": left, "seed": 0},
        "right": {"picture": right},
        "answer": answer,
        **more,
    }


def told(found: Answers) -> list[tuple]:
    return [(c.prompt, Path(c.first.name).name, Path(c.second.name).name, c.label, c.repeat) for c in found.answers]


@pytest.fixture(autouse=True)
def pictures() -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(name)


def test_answers_of_the_rating_page_with_undo_skip_repeats_and_a_torn_line() -> None:
    file = lines(
        rated("left"), rated("right"), {"undo": 1}, rated("neither"), rated("skip"),
        rated("right", "b.png", "a.png", repeats=True), '{"prompt": "a f',
    )  # fmt: skip
    found = read_answers(file)
    assert told(found) == [
        ("a fox", "a.png", "b.png", 1.0, False),
        ("a fox", "a.png", "b.png", 0.5, False),
        ("a fox", "b.png", "a.png", 0.0, True),
    ]
    assert (found.skipped, found.decided, found.sides_by_chance) == (1, 2, True)
    assert found.left_out == ("p.jsonl: lines that are not JSON are left out: 7",)
    assert found.steadiness() == [1.0], "the same image again, on the other side"
    file.rename("preferences.jsonl")
    assert told(read_answers(Path())) == told(found), "the folder of draftp rate is as good as its file"


def test_chosen_and_rejected_beside_the_file_or_anywhere() -> None:
    elsewhere = picture(Path("far/d.png").absolute())
    file = lines(
        {"prompt": "a fox", "chosen": "b.png", "rejected": elsewhere},
        {"prompt": "", "chosen": "a.png", "rejected": "c.png"},
    )
    found = read_answers(file)
    assert told(found) == [("a fox", "b.png", "d.png", 1.0, False), ("", "a.png", "c.png", 1.0, False)]
    assert found.sides_by_chance is False
    assert found.habit() is None, "the chosen one comes first by the layout, which says nothing of a hand"


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        ({"image_path": ["1.png", "2.png"], "human_preference": [0, 1]}, [0.0]),
        ({"file_path": ["1.png", "2.png"], "human_preference": [1, 0]}, [1.0]),
        ({"image_path": ["1.png", "2.png", "3.png"], "rank": [2, 1, 2]}, [0.0, 0.5, 1.0]),
    ],
)
def test_hpd_in_a_folder_of_the_files_name_or_beside_it(item, labels) -> None:
    picture("train/1.png")
    picture("train/2.png")
    picture("3.png")
    Path("train.json").write_text(json.dumps([{"prompt": "a fox", **item}]), encoding="utf-8")
    assert [answer.label for answer in read_answers(Path("train.json")).answers] == labels


def test_a_folder_of_chosen_and_rejected_with_prompts_beside() -> None:
    for name in ("chosen/1.png", "rejected/1.jpg", "chosen/2.webp", "rejected/2.png", "chosen/3.png", "rejected/4.png"):
        picture(Path("liked", name))
    Path("liked/chosen/1.txt").write_text("a fox\nin the snow\n", encoding="utf-8")
    found = read_answers(Path("liked"))
    assert told(found) == [("a fox in the snow", "1.png", "1.jpg", 1.0, False), ("", "2.webp", "2.png", 1.0, False)]
    assert found.left_out == ("liked: 2 images are left out, as only one side has them: 3",)


class Table:
    """What pyarrow's ParquetFile is asked for: this environment may be without it; `make extras` has it."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows
        self.schema_arrow = SimpleNamespace(names=list(rows[0]))

    def iter_batches(self, batch_size: int, columns: list[str]):
        yield SimpleNamespace(to_pylist=lambda: [{name: row[name] for name in columns} for row in self.rows])


def jpeg(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "JPEG")
    return data.getvalue()


def pick(label: float | None, **more: object) -> dict:
    other = None if label is None else 1 - label
    return {"caption": "a fox", "jpg_0": jpeg("red"), "jpg_1": {"bytes": jpeg("blue")}, "label_0": label,
            "label_1": other, "has_label": True, **more}  # fmt: skip


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch):
    def put(rows: list[dict]) -> Path:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            package, module = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
            package.ArrowException = ValueError
            package.parquet = module
            module.ParquetFile = lambda path: Table(rows)
            monkeypatch.setitem(sys.modules, "pyarrow", package)
            monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
            Path("pick.parquet").write_bytes(b"PAR1")
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "pick.parquet")
        return Path("pick.parquet")

    return put


def test_pick_a_pics_columns(parquet) -> None:
    found = read_answers(parquet([pick(1.0), pick(0.0), pick(0.5), pick(1.0, has_label=False), pick(None)]))
    assert [answer.label for answer in found.answers] == [1.0, 0.0, 0.5]
    assert found.skipped == 2
    first = found.answers[0]
    assert first.first.picture().getpixel((4, 4)) == pytest.approx((254, 0, 0), abs=2)
    assert first.first.key == found.answers[1].first.key != first.second.key


def test_pick_a_pic_lacks_a_column(parquet) -> None:
    row = pick(1.0)
    del row["caption"]
    with pytest.raises(InputError, match="lacks Pick-a-Pic's caption; its columns are: jpg_0"):
        read_answers(parquet([row]))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([rated("maybe")], "p.jsonl line 1: answer is 'maybe'; it can be left, right, neither, skip"),
        ([rated(["left"])], "line 1: answer is"),
        ([rated("skip"), rated("skip")], r"there is no answer in it \(2 skipped\); rate some pairs first"),
        ([rated("neither")], "all 1 answers are ties"),
        ([rated("left"), {"undo": 5}], "line 2: undo is 5; it is the number of an earlier line"),
        ([rated("left"), {"undo": 0}], "there is no answer in it"),
        ([{"prompt": "a", "image": "b"}], "an answer has prompt, left, right and answer"),
        ([rated("left", prompt=3)], "prompt is 3; it must be text"),
        ([{**rated("left"), "left": {}}], "left is {}; it must say which image"),
        ([[1, 2]], "is no JSON object"),
        ([rated("left", "x.png", "y.png")], "no image is where it says, the first is x.png"),
    ],
)
def test_what_cannot_be_learned_from_is_one_line(items, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_answers(lines(*items))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.jsonl", None, "there is no such file or folder"),
        ("p.txt", "a", "not a layout of preferences that is known"),
        ("p.json", "{", r"p.json: not JSON \("),
        ("p.json", "{}", "no list of answers"),
        ("p.json", '[{"prompt": "a", "image_path": ["a.png"], "human_preference": [1]}]', "two images or more"),
        ("p.json", '[{"prompt": "a", "image_path": ["a.png", "b.png"], "rank": [1]}]', "a number for each of 2"),
        ("p.json", "[3]", "item 0: 3 is no JSON object"),
    ],
)
def test_files_of_no_layout(name, content, words) -> None:
    if content is not None:
        Path(name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_answers(Path(name))


@pytest.mark.parametrize(
    ("folders", "words"),
    [(["chosen"], "has no folder rejected"), (["chosen", "rejected"], "no image of chosen/ has the name of one")],
)
def test_folders_of_no_pairs(folders, words) -> None:
    for name in folders:
        Path("liked", name).mkdir(parents=True)
    with pytest.raises(InputError, match=words):
        read_answers(Path("liked"))


def test_pairs_without_their_pictures_are_left_out_and_counted() -> None:
    found = read_answers(lines(rated("left"), rated("right", "gone.png"), rated("left", "a.png", "gone.png")))
    assert len(found.answers) == 1
    assert found.left_out == ("p.jsonl: 2 of 3 pairs are left out, their images are not there: gone.png",)


@pytest.mark.parametrize(("left", "right", "is_habit"), [(95, 5, True), (5, 95, True), (55, 45, False), (5, 0, False)])
def test_one_side_far_too_often_is_a_habit_of_the_hand(left, right, is_habit) -> None:
    found = read_answers(lines(*[rated("left")] * left, *[rated("right")] * right, *[rated("neither")] * 9))
    warning = found.habit()
    assert (warning is not None) is is_habit
    if warning:
        side, count = ("left", left) if left > right else ("right", right)
        assert f"the {side} image was chosen in {count} of {left + right} pairs" in warning


def answer(prompt: str, first: str, second: str) -> Answer:
    return Answer(prompt, Shown(first, Path(first)), Shown(second, Path(second)), 1.0)


@pytest.mark.parametrize(
    ("pairs", "groups"),
    [
        ([("a", "1", "2"), ("b", "3", "4"), ("a", "5", "6")], [0, 1, 0]),
        ([("", "1", "2"), ("", "3", "4"), ("", "4", "1")], [0, 0, 0]),
        ([("a", "1", "2"), ("a", "3", "4"), ("a", "2", "5")], [0, 1, 0]),
        ([("a", "1", "2"), ("", "3", "4"), ("a", "5", "6"), ("", "4", "1")], [0, 0, 0, 0]),
    ],
)
def test_what_must_stay_on_one_side_of_a_split(pairs, groups) -> None:
    found = Answers("p", tuple(answer(*pair) for pair in pairs))
    assert found.groups.tolist() == groups

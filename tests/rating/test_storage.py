"""preferences.jsonl: nothing that was answered is lost, and nothing that was not answered is in it."""

import errno
import json
import os
from pathlib import Path

import pytest

from draftcli.errors import DraftpError, InputError
from draftcli.preferences.reading import PREFERENCES
from draftcli.rating.storage import open_preferences, read_preferences
from tests.rating.example import NASTY

ANSWER = {
    "prompt": NASTY,
    "left": {"picture": "a.png", "seed": 0, "column": "base"},
    "right": {"picture": "b.png", "seed": 0, "column": "tuned"},
    "answer": "left",
    "seconds": 1.5,
    "repeats": False,
    "time": "2026-11-26T12:00:00.000+00:00",
}


def test_answers_are_lines_and_undo_names_one(tmp_path):
    with open_preferences(tmp_path / "new") as kept:
        assert [kept.append({**ANSWER, "seconds": i}) for i in range(3)] == [0, 1, 2]
        kept.undo(1)
        assert kept.append({**ANSWER, "seconds": 9}) == 4
        kept.undo(4)
    lines = [json.loads(line) for line in kept.path.read_text(encoding="utf-8").splitlines()]
    assert lines[3] == {"undo": 1}
    assert lines[5] == {"undo": 4}
    assert read_preferences(kept.path) == {i: {**ANSWER, "seconds": i} for i in (0, 2)} == kept.answers
    with open_preferences(tmp_path / "new") as again:
        assert again.append(ANSWER) == 6


@pytest.mark.parametrize(
    ("text", "standing"),
    [
        ("", {}),
        ("[]\n{}\nnull\nhello\n", {}),
        ('{"undo": 7}\n{"undo": "x"}\n{"undo": true}\n', {}),
        (json.dumps(ANSWER), {0: ANSWER}),  # whole, but for the end of the line
        (json.dumps(ANSWER) + "\n" + json.dumps(ANSWER)[:40], {0: ANSWER}),
        (json.dumps({**ANSWER, "answer": "both"}) + "\n" + json.dumps(ANSWER) + "\n", {1: ANSWER}),
        (json.dumps({**ANSWER, "left": "a.png"}) + "\n", {}),
    ],
)
def test_damaged_lines_are_left_out_and_what_comes_after_is_a_line_of_its_own(tmp_path, text, standing):
    path = tmp_path / PREFERENCES
    path.write_text(text, encoding="utf-8")
    assert read_preferences(path) == standing
    with open_preferences(tmp_path) as kept:
        number = kept.append(ANSWER)
        assert kept.answers == {**standing, number: ANSWER}
    assert read_preferences(path) == {**standing, number: ANSWER}
    assert path.read_text(encoding="utf-8").startswith(text)


def test_half_a_letter_at_the_end_is_no_trouble(tmp_path):
    path = tmp_path / PREFERENCES
    path.write_bytes(json.dumps({**ANSWER, "prompt": "ö"}, ensure_ascii=False).encode()[:13])
    with open_preferences(tmp_path) as kept:
        assert kept.append(ANSWER) == 1
    assert read_preferences(path) == {1: ANSWER}


def test_only_one_process_writes(tmp_path):
    with open_preferences(tmp_path), pytest.raises(InputError, match="another draftp rate"), open_preferences(tmp_path):
        pass
    with open_preferences(tmp_path):
        pass


def test_an_answer_that_the_disk_refuses_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    with open_preferences(tmp_path) as kept:
        kept.append(ANSWER)
        before = kept.path.read_bytes()

        def full(handle: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DraftpError, match="No space left"):
                kept.append(ANSWER)
        assert kept.path.read_bytes() == before
        assert kept.append(ANSWER) == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_preferences(Path(tmp_path) / "none.jsonl")

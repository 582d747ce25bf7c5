"""Files of lines: what ends a line, and what editors put before the first one."""

import json
from pathlib import Path

import pytest

from draftcli.config import load_config
from draftcli.evaluation.pictures import read_entries
from draftcli.lines import json_line, text_lines
from draftcli.runs import Run
from draftcli.sampling.files import read_index
from tests.command import draftp

# What ends a line for some reader, `str.splitlines` among them, and for JSON is a letter like any other.
BREAKS = ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1e", "\r"]
EDITORS = {
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "both": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "no end of the last line": lambda text: text.rstrip("\n").encode(),
}


def test_an_index_is_read_as_it_was_written_whatever_its_prompts_hold(tiny_sdxl):
    prompts = [f"a red fox{c}in the snow" for c in BREAKS]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    small = ["--steps", 1, "--height", 64, "--width", 64, "--scale", 1]
    result = draftp("sample", "--model", tiny_sdxl, "--prompts", "p.jsonl", *small, "--output", "out")
    assert result.code == 0, result.err
    index = Path("out/index.jsonl")
    assert [entry["prompt"] for entry in read_entries(index.parent)] == prompts
    text = index.read_text(encoding="utf-8")
    assert text.splitlines() == text[:-1].split("\n"), "other programs' readers find the same lines"
    assert len(read_index(index)) == len(prompts)


@pytest.mark.parametrize("c", BREAKS)
def test_a_line_is_one_line_and_keeps_its_letters(c):
    item = {"prompt": f"a{c}ü{c}"}
    line = json_line(item)
    assert "ü" in line
    assert len(line.splitlines()) == 1
    assert json.loads(line) == item


@pytest.mark.parametrize("edited", EDITORS.values(), ids=EDITORS)
def test_files_that_an_editor_saved_are_the_same(edited):
    Path("plain.txt").write_bytes(edited("a\u2028b\nc\n"))
    assert [line for line in text_lines(Path("plain.txt")) if line] == ["a\u2028b", "c"]

    folder = Path("pictures")
    folder.mkdir()
    lines = [{"file": f"{i}.png", "prompt": f"a\u2028{i}", "seed": i} for i in range(2)]
    (folder / "index.jsonl").write_bytes(edited("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in lines)))
    assert read_entries(folder) == list(read_index(folder / "index.jsonl").values()) == lines

    run = Run(Path("run"))
    run.folder.mkdir()
    for path in (run.metrics, run.validation):
        path.write_bytes(edited('{"step": 1, "note": "a\u2028b"}\n{"step": 2}\n'))
    assert [line["step"] for line in run.steps()] == [line["step"] for line in run.validations()] == [1, 2]
    run.forget_after(1)
    assert [line["step"] for line in run.steps()] == [1]

    Path("mine.yaml").write_bytes(edited("optim:\n  lr: 0.002\n"))
    assert load_config("mine.yaml").optim.lr == 0.002


def test_a_last_line_that_a_kill_cut_short_is_no_line():
    run = Run(Path("run"))
    run.folder.mkdir()
    run.metrics.write_text('{"step": 1}\n{"step": 2, "los')
    assert run.steps() == [{"step": 1}]

"""Prompts in .csv, .tsv and .parquet."""

import importlib.util
from pathlib import Path

import pytest

from draftcli.errors import InputError
from draftcli.prompts import Prompt, read_prompts
from tests.command import draftp, recipe

ALL = "prompt,negative_prompt,seed,height,width\n"
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
OWL = Prompt("an owl")

READ = {  # the file's name and text, and its prompts
    "one column": ("p.csv", "prompt\na fox\nan owl\n", [Prompt("a fox"), OWL]),
    "quoted": ("p.csv", 'prompt\n"a fox, red"\n"two\nlines"\n"say ""hi"""\n',
               [Prompt("a fox, red"), Prompt("two\nlines"), Prompt('say "hi"')]),
    "everything": ("p.csv", ALL + "a fox,blurry,7,832,1216\nan owl,,,,\n",
                   [Prompt("a fox", "blurry", 7, (832, 1216)), OWL]),
    "a short row": ("p.csv", ALL + "an owl\n", [OWL]),
    "rows of nothing": ("p.csv", ALL + ",,,,\n\nan owl,,,,\n", [OWL]),
    "an empty prompt with a seed": ("p.csv", ALL + ",,3,,\n", [Prompt("", seed=3)]),
    "other letters": ("P.CSV", "Note,Text\nx,an owl\n", [OWL]),
    "prompt before caption": ("p.csv", "caption,prompt\nx,an owl\n", [OWL]),
    "tabs": ("p.tsv", "Prompt\tCategory\nan owl\tAnimals, all\n", [OWL]),
    "semicolons": ("p.csv", "prompt;seed\na fox, red;3\n", [Prompt("a fox, red", seed=3)]),
    "Windows and a byte order mark": ("p.csv", "\ufeffprompt\r\nan owl\r\n", [OWL]),
    "other line breaks": ("p.csv", "prompt\na\u2028b\x85c\n", [Prompt("a\u2028b\x85c")]),
    "switches are text": ("p.csv", "prompt\na fox --s 30\n", [Prompt("a fox --s 30")]),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_a_row_is_a_prompt(what):
    name, text, prompts = READ[what]
    Path(name).write_text(text, encoding="utf-8", newline="")
    found = read_prompts(name)
    assert list(found) == prompts
    assert found.sha256 == read_prompts(name).sha256


def test_columns_that_were_not_read_are_told():
    Path("p.csv").write_text("prompt,id,aesthetic\na fox,1,5.0\n")
    assert read_prompts("p.csv").notes == ("data.prompts p.csv: columns that were not read: id, aesthetic",)


REFUSED = {
    "prompts\na fox\n": "name its column of prompts prompt, text or caption; its columns are: prompts",
    "": "its columns are: none",
    "prompt\n": "there is no prompt in it",
    "prompt,seed\na fox,many\n": "p.csv line 2: seed 'many' must be a whole number",
    "prompt,seed\na fox,-1\n": "seed '-1' must be a whole number",
    "prompt,seed\na fox,99999999999\n": "line 2: seed 99999999999 must be a whole number from 0 to 4294967295",
    "prompt,seed\na fox,²\n": "must be a whole number",
    "prompt,height\na fox,512\n": "of the columns height and width one is missing",
    "prompt,height,width\na fox,512,\n": "size [512, None] must be",
    "prompt,height,width\na fox,100,100\n": "must be [height, width], multiples of 8",
    "prompt\na fox, red\n": "line 2: more cells than columns; quote a cell with commas",
    'prompt\n"a fox\n': "unexpected end of data",
    "prompt\na\0fox\n": "not text, as it holds zero bytes",
    "version https://git-lfs.github.com/spec/v1\n": "it is a git-lfs pointer",
    "<!DOCTYPE html><html>": "it is a web page",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_read_is_one_line(text):
    Path("p.csv").write_text(text, encoding="utf-8")
    result = draftp("train", "--prompts", "p.csv", "--dry-run")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert REFUSED[text] in result.err


def test_another_encoding_is_named():
    Path("p.csv").write_bytes("prompt\nein Fuchs, grün\n".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8 text; save it as UTF-8"):
        read_prompts("p.csv")


def test_a_training_takes_a_table(tiny_sdxl):
    Path("p.csv").write_text("prompt\na red cat\na blue dog\n")
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--prompts", "p.csv", "--output", "run")
    assert result.code == 0, result.err
    assert "p.csv" in Path("run/config.yaml").read_text()


@pytest.mark.skipif(HAS_PYARROW, reason="pyarrow is installed")
def test_a_parquet_needs_the_package_of_datasets():
    Path("p.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"pip install 'draftp\[datasets\]'"):
        read_prompts("p.parquet")


@pytest.mark.skipif(not HAS_PYARROW, reason="pyarrow is not installed")
def test_a_parquet_of_a_dataset_is_read():
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "TEXT": ["a fox", "an owl", None],
        "seed": [7, None, 3],
        "id": [1, 2, 3],
        "embedding": [[1.0], [2.0], None],
    }
    pyarrow.parquet.write_table(pa.table(columns), "p.parquet")
    found = read_prompts("p.parquet")
    assert list(found) == [Prompt("a fox", seed=7), OWL, Prompt("", seed=3)]
    assert found.notes == ("data.prompts p.parquet: columns that were not read: id, embedding",)
    pyarrow.parquet.write_table(pa.table({"prompt": ["a fox"], "height": [512], "width": [100]}), "size.parquet")
    with pytest.raises(InputError, match=r"row 1: size \[512, 100\] must be"):
        read_prompts("size.parquet")
    pyarrow.parquet.write_table(pa.table({"prompt": [1, 2]}), "numbers.parquet")
    with pytest.raises(InputError, match="row 1: prompt must be text"):
        read_prompts("numbers.parquet")
    Path("torn.parquet").write_bytes(Path("p.parquet").read_bytes()[:40])
    with pytest.raises(InputError, match="not a parquet file, or a damaged one"):
        read_prompts("torn.parquet")

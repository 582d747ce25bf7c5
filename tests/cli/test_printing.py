"""Names of people's files in what is printed: whole in any encoding, and as they are on the disk."""

import ast
import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import typer
from packaging.version import Version
from rich.console import Console

from draftcli.cli import main
from draftcli.cli.console import literal_console
from draftcli.core.models.family import find_family
from draftcli.export.card import opening
from draftcli.sampling.job import progress_bar
from tests.command import draftp
from tests.evaluation.test_command import make_folder

# ------------------------------------------------------------------------------------------------------ encodings

ODD = "é → 火 🎉"
ESCAPED = {
    "ascii": r"\xe9 \u2192 \u706b \U0001f389",
    "cp1252": r"é \u2192 \u706b \U0001f389",
    "latin-1": r"é \u2192 \u706b \U0001f389",
    "cp437": r"é \u2192 \u706b \U0001f389",
    "utf-8": ODD,
}


def draftp_in(encoding, *arguments):
    """`draftp ARGUMENTS` with streams of this encoding, strict as Python opens them: exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    code = 0
    with (
        mock.patch.object(sys, "argv", ["draftp", *map(str, arguments)]),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
    ):
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(encoding), err.buffer.getvalue().decode(encoding)


def train(run):
    return ("train", "--preset", run.parent / "tiny.yaml", "--output", ODD)


def sample(run):
    return ("sample", run, "--prompt", ODD, "--output", ODD)


def compare(run):
    return ("eval", make_folder(ODD), make_folder("b"), "--reward", "toy", "--features", "toy", "--output", f"e {ODD}")


def merge(run):
    return ("merge-lora", run, "--format", "kohya", "--verify", "keys", "--output", f"{ODD}/x.safetensors")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    ("command", "made"),
    [
        (train, "final/pytorch_lora_weights.safetensors"),
        (sample, "sample-sheet.png"),
        (compare, "index.jsonl"),
        (merge, "x.safetensors"),
    ],
)
def test_a_console_that_lacks_letters_does_not_end_a_command(lora_run, command, made, encoding):
    code, out, err = draftp_in(encoding, *command(lora_run))
    assert code == 0, err
    assert "\\u" not in out.replace(ESCAPED[encoding], ""), "what is ours is plain letters"
    assert ESCAPED[encoding] in out
    assert Path(ODD, made).is_file()


@pytest.mark.parametrize("encoding", ESCAPED)
def test_an_error_is_one_line_in_any_encoding(encoding):
    code, out, err = draftp_in(encoding, "train", "--preset", f"{ODD}.yaml")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert ESCAPED[encoding] in err


@pytest.mark.parametrize(
    "arguments", [("sample", "caf\udce9"), ("train", "--output=\udcff"), ("eval", "a", "b/\udc80")]
)
def test_a_name_of_another_encoding_is_refused(arguments):
    code, out, err = draftp_in("utf-8", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "not UTF-8" in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("rewards", "list"), ("--version",)])
def test_help_and_lists_are_plain_letters(encoding, arguments):
    code, out, err = draftp_in(encoding, *arguments)
    assert (code, err) == (0, "")
    assert "draft" in out.lower()
    assert "\\u" not in out


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({"PYTHONIOENCODING": "ascii"}, ESCAPED["ascii"]),
        ({"PYTHONIOENCODING": "cp1252"}, ESCAPED["cp1252"]),
        ({"PYTHONIOENCODING": "ascii:replace"}, "? ? ? ?"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, ESCAPED["ascii"]),
        ({"LC_ALL": "C.UTF-8"}, ODD),
    ],
    ids=str,
)
def test_a_process_prints_in_the_encoding_it_was_started_with(variables, printed):
    code = f"from draftcli.cli.console import literal_console; literal_console().print({ODD!a})"
    environment = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, cwd=Path(__file__).parents[2],
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    encoding = variables.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    assert done.stdout.decode(encoding) == f"{printed}\n"


# ---------------------------------------------------------------------------------------------------------- names

NAMES = [
    "[hyper] v1", "my:fire:run", "[/] [bold]x [link=y]", "it's $HOME `x` \"y\"", "-dash", "two  blanks", "a~b",
    "a;b&c|d", "%s {0} {name}", "x" * 150,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_train_prints_works_when_it_is_copied(lora_run, name):
    shutil.copytree(lora_run, Path(name))
    result = draftp("train", "--preset", lora_run.parent / "tiny.yaml", f"--output={name}")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert f"run {name}: " in result.out
    assert f"settings    {name}/config.yaml" in lines
    commands = [shlex.split(line) for line in lines if " draftp " in line]
    commands = [words[words.index("draftp") :] for words in commands]
    assert [words[1] for words in commands] == ["sample", "anneal", "eval", "merge-lora"]
    assert all(Path(words[2]).samefile(name) for words in commands)
    merged = draftp(*commands[-1][1:], "--format", "kohya", "--verify", "keys")
    assert merged.code == 0, merged.err
    written = Path(name, "export", f"{Path(name).name}-kohya.safetensors")
    assert f"written  {written}" in merged.out.splitlines()
    assert written.is_file()


@pytest.mark.parametrize("name", ["[a] style", "b:fire:c", "[bold]", "y" * 150])
def test_tables_and_verdicts_of_eval_show_whole_names(name):
    make_folder("base"), make_folder(name, colour="red")
    result = draftp("eval", "base", name, "--reward", "toy", "--features", "toy", "--output", f"{name}/e")
    assert result.code == 0, result.err
    table, _, rest = result.out.partition("trained on")
    assert any(line.startswith(f"{name} ") for line in table.splitlines())
    assert f"recommended: {name}" in rest or "recommended: base" in rest or "recommended: nothing" in rest
    assert f"{name}/e/report.html" in rest


@pytest.mark.parametrize("name", ["[a] style", "b:fire:c", "[bold]", "z" * 150])
def test_doctor_shows_whole_names(tiny_sdxl, name):
    Path(name).mkdir()
    settings = ("--set", f"model.pretrained={tiny_sdxl}")
    result = draftp("doctor", *settings, "--output", name)
    assert f"GB free at {name}" in result.out


@pytest.mark.parametrize("name", ["[a] style", "b:fire:c", "[bold]", "{0} {x}"])
def test_a_progress_bar_shows_the_name(name):
    file = io.StringIO()
    with progress_bar(Console(file=file, force_terminal=True, width=120), f"drawing {name}", 3) as advance:
        advance(1)
    assert f"drawing {name}" in file.getvalue()


@pytest.mark.parametrize("name", ["[a] style", "b:fire:c", "[bold]", "{0} {x}"])
def test_errors_show_the_name(name):
    for command in ("sample", "eval", "merge-lora"):
        result = draftp(command, name)
        assert result.code == 2
        assert name in result.err


def test_help_keeps_its_brackets():
    with mock.patch.dict(os.environ, COLUMNS="200"):
        text = draftp("merge-lora", "--help").out
    newest = ["[default: the newest run]"] if Version(typer.__version__) >= Version("0.26") else []  # of an argument
    assert "[default: None]" not in text
    for words in ("LORA[=SCALE]", *newest, "[default: RUN/export/NAME-...]"):
        assert words in text


@pytest.mark.parametrize("where", ['a "b"', "c\\d", "[e] {f}", "it's"])
@pytest.mark.parametrize("kind", ["diffusers", "single-file", "kohya"])
def test_the_code_of_a_card_names_the_file(kind, where):
    line = opening(kind, where, "base", find_family()).splitlines()[-1]
    assert ast.literal_eval(line[line.rindex("(") + 1 : -1]) == where


def test_styled_text_and_long_lines_stay_whole(capsys):
    literal_console().print("[red]x[/red] :fire: " + "y" * 3000)
    assert capsys.readouterr().out == "[red]x[/red] :fire: " + "y" * 3000 + "\n"

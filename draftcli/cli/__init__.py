"""The `draftp` command. One file per command: parse, call, print; nothing is computed here.

Torch is imported inside commands only, so that `draftp --help` is instant.
"""

from __future__ import annotations

import errno
import os
import re
import sys

import typer

from draftcli import __version__
from draftcli.cli import anneal, doctor, eval, merge_lora, presets, rate, rewards, runs, sample, settings, train
from draftcli.cli.console import escape_unencodable, literal_console
from draftcli.cli.help import PlainCommand, PlainGroup
from draftcli.errors import DraftpError, InputError

app = typer.Typer(
    name="draftp",
    cls=PlainGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune Stable Diffusion (XL, 1.x, 2.x) on differentiable rewards with DRaFT+.\n\n"
    "To start: `draftp train --preset toy` trains a tiny SDXL on this computer (50 seconds on two cores).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
_TEXTS = ("--prompt", "--negative-prompt", "--set")  # options whose words are no paths, or hold them inside

app.command("train", cls=PlainCommand)(train.train)
app.command("sample", cls=PlainCommand)(sample.sample)
app.command("anneal", cls=PlainCommand)(anneal.anneal)
app.command("eval", cls=PlainCommand)(eval.evaluate)
app.command("merge-lora", cls=PlainCommand)(merge_lora.merge_lora)
app.command("rate", cls=PlainCommand)(rate.rate)
app.command("doctor", cls=PlainCommand)(doctor.doctor)
app.add_typer(rewards.app, name="rewards")
app.command("presets", cls=PlainCommand)(presets.presets)
app.command("runs", cls=PlainCommand)(runs.runs)
app.command("settings", cls=PlainCommand)(settings.settings)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    if version:
        literal_console().print(f"draftp {__version__}")
        raise typer.Exit


def _at_home(words: list[str]) -> list[str]:
    """The command line's words, each ~ that begins a path replaced by the home folder.

    A shell does that where a space stands before it, and neither in --output=~/runs nor within quotes.
    """
    expanded = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, path = word.partition("=") if word.startswith("--") else (before, "", word)
        is_path = re.match(r"~([/\\]|$)", path) and option not in _TEXTS
        home = os.path.expanduser(path)  # noqa: PTH111, as text may stand before it
        expanded.append((f"{option}={home}" if equals else home) if is_path else word)
    return expanded


def main() -> None:
    """Entry point: our own errors become one line on stderr and an exit code; `--debug` shows where they come from."""
    sys.argv[1:] = _at_home(sys.argv[1:])
    debug = "--debug" in sys.argv[1:]
    escape_unencodable()
    try:
        _check_letters(sys.argv[1:])
        app()
    except BrokenPipeError:
        # `draftp ... | head`: nobody reads any more, so there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        explained = None if debug else explain(error)
        if explained is None:
            raise
        print(f"draftp: {explained[0]}", file=sys.stderr)
        sys.exit(explained[1])


def _check_letters(arguments: list[str]) -> None:
    for text in arguments:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of another encoding, which safetensors opens no file by
            raise InputError(
                f"{text!a}: a name or text that is not UTF-8; rename the file, or set a locale of UTF-8"
            ) from error


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line for people and the exit code of an error that they can do something about; None for our mistakes."""
    if isinstance(error, DraftpError):
        return " ".join(str(error).split()), error.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported here
        return (
            "the GPU is out of memory; train with --fit and its size, such as --fit 24GB, or a smaller "
            "trainer.micro_batch_size (--batch-size in sample and anneal), sampling.height and width"
        ), 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:80]}...: the name is too long for a file", 2
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else None

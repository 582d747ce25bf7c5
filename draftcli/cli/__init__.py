"""The `draftp` command. One file per command: parse, call, print; nothing is computed here.

Torch is imported inside commands only, so that `draftp --help` is instant.
"""

from __future__ import annotations

import os
import sys

import typer

from draftcli import __version__
from draftcli.cli import anneal, eval, merge_lora, rewards, sample, train
from draftcli.errors import DraftpError

app = typer.Typer(
    name="draftp",
    help="Fine-tune Stable Diffusion XL on differentiable rewards with DRaFT+.\n\n"
    "New here? `draftp train --preset toy` trains a tiny SDXL on this computer in a minute or two.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("anneal")(anneal.anneal)
app.command("eval")(eval.evaluate)
app.command("merge-lora")(merge_lora.merge_lora)
app.add_typer(rewards.app, name="rewards")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(f"draftp {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: our own errors become one line on stderr and an exit code; `--debug` shows where they come from."""
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except DraftpError as error:
        if debug:
            raise
        print(f"draftp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported here
            raise
        print(
            "draftp: the GPU is out of memory; try a smaller trainer.micro_batch_size (--batch-size in sample and "
            "anneal), sampling.height and width, or sharding.activation_checkpointing true",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        if debug:
            raise
        print("draftp: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # `draftp ... | head`: nobody reads any more, so there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

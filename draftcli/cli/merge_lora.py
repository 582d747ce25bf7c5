"""draftp merge-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftcli.cli.completion import complete_runs


def merge_lora(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|LORA[=SCALE]",
            help="Runs and LoRA files.  [default: the newest run]",
            autocompletion=complete_runs,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder, hub id or .safetensors.  [default: the run's]")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Diffusers folder with configuration and tokenizers for a .safetensors base."),
    ] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which files of the base, such as fp16.")] = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="diffusers, single-file, lora or kohya.")
    ] = "diffusers",
    scale: Annotated[float, typer.Option(metavar="X", help="How much of everything together.")] = 1.0,
    rank: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="For lora and kohya: compress to at most this rank.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="fp32, fp16 or bf16.  [default: as the base has it]")
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(metavar="GB", min=0.001, help="For diffusers: largest file of weights.")
    ] = 10.0,
    verify: Annotated[
        str, typer.Option(metavar="LEVEL", help="keys: count; forward: also load and compare outputs.")
    ] = "forward",
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder.  [default: RUN/export/NAME-...]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what merge-lora wrote before.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it, with a model card, to the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository on the hub private.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Put what was trained into the files that other programs open, and check them before they are handed over.

    **Examples**

    `draftp merge-lora` (the newest run, merged into its base: a diffusers folder)

    `draftp merge-lora runs/mine --format kohya` (a LoRA for ComfyUI, A1111 and Forge)

    `draftp merge-lora runs/mine --format single-file --dtype fp16` (one checkpoint for ComfyUI, A1111 and Forge)

    `draftp merge-lora runs/mine=0.8 style.safetensors=0.5 --format lora --rank 32` (two LoRAs as one)

    `draftp merge-lora style.safetensors --base checkpoint.safetensors --format single-file`
    """
    from draftcli.cli.console import open_console
    from draftcli.export.arguments import check_arguments, check_options

    check_options(format_, scale, dtype, verify)
    check_arguments(inputs or (), base)
    console = open_console(quiet, debug)
    from draftcli.export.merge import MergeRequest, merge

    result = merge(
        MergeRequest(
            inputs=tuple(inputs or ()),
            base=base,
            config=config,
            variant=variant,
            format=format_,
            scale=scale,
            rank=rank,
            dtype=dtype,
            shard_size=int(max_shard_gb * 1e9),
            output=output,
            overwrite=overwrite,
            verify=verify,
            hub=push_to_hub,
            private=private,
        ),
        console,
    )
    for line in result.lines:
        console.print(line)
    console.print(f"report   {result.report}")
    console.print(f"written  {result.artefact}")
    if result.url:
        console.print(f"uploaded {result.url}")

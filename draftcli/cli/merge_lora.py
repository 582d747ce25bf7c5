"""draftp merge-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftcli.cli.completion import complete_runs
from draftcli.cli.options import Debug, Quiet


def merge_lora(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|LORA[=SCALE]",
            help="Runs and LoRA files to export together.  [default: the newest run]",
            autocompletion=complete_runs,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Base model: folder, hub id or .safetensors.  [default: the run's]"),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Diffusers folder with the configuration and tokenizers of a .safetensors base."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variant of the base's files, such as fp16.")
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="VAE of the merged model: folder, hub id or .safetensors.  [default: the run's]"
        ),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="diffusers, single-file, lora or kohya.")
    ] = "diffusers",
    scale: Annotated[float, typer.Option(metavar="X", help="Multiply the merged update by this factor.")] = 1.0,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Compress a LoRA (formats lora and kohya) to at most this rank."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="fp32, fp16 or bf16.  [default: that of the base]")
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(metavar="GB", min=0.001, help="Largest weight file of a diffusers folder.")
    ] = 10.0,
    verify: Annotated[
        str,
        typer.Option(
            metavar="LEVEL", help="keys: check every tensor; forward: also load the result and compare outputs."
        ),
    ] = "forward",
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder to write.  [default: RUN/export/NAME-...]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload the result with a model card to the Hugging Face Hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository on the hub as private.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export a run as a LoRA or checkpoint for ComfyUI, A1111, Forge or diffusers, and verify it.

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
    check_arguments(inputs or (), base, config, vae)
    console = open_console(quiet, debug)
    from draftcli.export.merge import MergeRequest, merge

    result = merge(
        MergeRequest(
            inputs=tuple(inputs or ()),
            base=base,
            config=config,
            variant=variant,
            vae=vae,
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

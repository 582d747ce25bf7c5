"""draftp anneal."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.sample import DrawingOptions, print_result, with_drawing_options


@with_drawing_options
def anneal(
    options: DrawingOptions,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="base, draft (or tuned), linear, cosine, power_P, step_F, constant_W, interval_A_B, reverse_KIND or "
            "package.module:function; shown between base and tuned. Repeatable, or separated by commas.  "
            "[default: linear]",
        ),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Generate only the named weightings, without base and tuned.")
    ] = False,
    stochastic: Annotated[
        bool,
        typer.Option(
            "--stochastic", help="Choose one network at random in each step, by the weight: AIG at half the cost."
        ),
    ] = False,
) -> None:
    """Blend the base and the fine-tuned model with Annealed Importance Guidance, at the same seeds.

    The weight of the fine-tuned network rises from noise to image: the base decides the layout, the fine-tuned network
    finishes the image. Images of both are generated too, unless --only leaves them out. Writes the images, a contact
    sheet, and compare.html with a slider between any two columns.

    **Examples**

    `draftp anneal --weight linear` (the newest run, its validation prompts)

    `draftp anneal runs/mine --weight linear,power_2 --prompt "a red fox in fresh snow" --num-images 4`

    `draftp anneal --weight linear --stochastic`

    `draftp anneal --model stabilityai/stable-diffusion-xl-base-1.0 --lora style.safetensors --prompt "a fox"`
    """

    source = options.source()
    kinds = [kind.strip() for text in weight or ["linear"] for kind in text.split(",")]
    kinds = ["base", *kinds] if options.base else kinds
    kinds = source.annealed_columns(kinds, only)
    options.check(source, kinds)
    from draftcli.cli.console import open_console

    console = open_console(options.quiet, options.debug)  # before torch and its companions are imported
    from draftcli.sampling.job import run as run_job

    print_result(run_job(options.job("anneal", source, kinds, stochastic, page=True), console), console)

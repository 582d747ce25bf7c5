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
            "package.module:function; a column each, between base and tuned. Repeatable, or with commas.  "
            "[default: linear]",
        ),
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Draw the named weights only, without base and tuned beside them.")
    ] = False,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Ask one network a step, drawn by the weight: AIG at half the price.")
    ] = False,
) -> None:
    """Draw with Annealed Importance Guidance: the whole range between base and tuned, at the same seeds.

    The weight of the tuned network rises from noise to image: the base lays the picture out, the tuned network finishes
    it. Base and tuned are drawn beside the weights, unless --only leaves them out. Leaves the pictures, a sheet, and
    compare.html with a slider between any two columns.

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

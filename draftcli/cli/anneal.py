"""draftp anneal."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.sample import (
    BatchSize,
    Debug,
    Format,
    Height,
    Images,
    Loras,
    Model,
    Negative,
    Output,
    Override,
    Precision,
    PromptFile,
    Prompts,
    Quiet,
    RunName,
    Sampler,
    Scale,
    Schedule,
    Seed,
    Steps,
    Width,
    drawing_settings,
    print_outcome,
)


def anneal(
    run: RunName = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="base, draft (or tuned), linear, cosine, power_P, step_F, constant_W, interval_A_B, reverse_KIND or "
            "package.module:function; a column each. Repeatable, or with commas.  [default: base,linear,tuned]",
        ),
    ] = None,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Ask one network a step, drawn by the weight: AIG at half the price.")
    ] = False,
    model: Model = None,
    lora: Loras = None,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    negative_prompt: Negative = None,
    seed: Seed = None,
    num_images: Images = 1,
    base: Annotated[bool, typer.Option("--base", help="The same as --weight base beside the others.")] = False,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    scale: Scale = None,
    sampler: Sampler = None,
    schedule: Schedule = None,
    precision: Precision = None,
    batch_size: BatchSize = None,
    format_: Format = "png",
    override: Override = None,
    output: Output = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw with Annealed Importance Guidance: the whole range between base and tuned, at the same seeds.

    The weight of the tuned network rises from noise to image: the base lays the picture out, the tuned network finishes
    it. Leaves the pictures, a sheet, and compare.html with a slider between any two columns.

    **Examples**

    `draftp anneal --weight linear` (the newest run, its validation prompts)

    `draftp anneal runs/mine --weight base,linear,power_2,tuned --prompt "a red fox in fresh snow" --num-images 4`

    `draftp anneal --weight linear --stochastic`

    `draftp anneal --model stabilityai/stable-diffusion-xl-base-1.0 --lora style.safetensors --prompt "a fox"`
    """
    from draftcli.sampling.source import find_source

    settings = drawing_settings(negative_prompt, height, width, steps, scale, sampler, schedule, precision)
    source = find_source(run, model, lora or (), override or (), settings)
    from draftcli.cli.console import open_console

    console = open_console(quiet, debug)
    from draftcli.sampling.job import Job
    from draftcli.sampling.job import run as run_job

    kinds = [kind.strip() for text in weight or ["base,linear,tuned"] for kind in text.split(",")]
    job = Job(
        name="anneal",
        source=source,
        kinds=["base", *kinds] if base else kinds,
        stochastic=stochastic,
        prompts=prompt or (),
        prompt_file=prompts,
        images=num_images,
        seed=seed,
        size=(height, width),
        batch_size=batch_size,
        suffix=format_,
        output=output,
    )
    print_outcome(run_job(job, console), console)

"""draftp sample, and the options that it shares with draftp anneal."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from draftcli.cli.completion import complete_runs
from draftcli.cli.console import written_label
from draftcli.cli.options import BatchSize, Debug, Override, Quiet, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.sampling.job import DrawingResult, Job
    from draftcli.sampling.source import DrawingSource

RunName = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN",
        help="A run's folder or one of its checkpoints.  [default: the newest run]",
        autocompletion=complete_runs,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Use this model instead of a run: diffusers folder, hub id, .safetensors or toy.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="PATH[=SCALE]", help="Add a LoRA in diffusers, peft or kohya format. Repeatable."),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Prompt. Repeatable.")]
PromptFileOption = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="File of prompts, as for train: .txt, .jsonl, ..., or a built-in set.  "
        "[default: the run's validation prompts]",
    ),
]
Negative = Annotated[str | None, typer.Option("--negative-prompt", metavar="TEXT", help="Negative prompt.")]
Images = Annotated[int, typer.Option("--num-images", min=1, metavar="N", help="Images per prompt.")]
Height = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="A multiple of 8.  [default: the run's, or the model's]")
]
Width = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="A multiple of 8.  [default: the run's, or the model's]")
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Sampler steps.  [default: the run's, or 25]")]
Scale = Annotated[
    float | None, typer.Option(metavar="X", help="Guidance scale; 1 turns guidance off.  [default: the run's, or 5]")
]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="euler, heun, ddim, dpmpp_2m, euler_ancestral or lcm.  [default: the run's, or euler]"
    ),
]
ScheduleOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="trailing or leading.  [default: the run's, or trailing]")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "--dtype",
        metavar="NAME",
        help="fp32, bf16, fp16 or fp64.  [default: the run's, or the device's]",
    ),
]
Format = Annotated[str, typer.Option("--format", metavar="NAME", help="png, jpg or webp.")]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for the images.  [default: in the run's folder]")
]


@dataclass(frozen=True)
class DrawingOptions:
    """The options that `draftp sample` and `draftp anneal` share."""

    run: RunName = None
    model: Model = None
    lora: Loras = None
    prompt: Prompts = None
    prompts: PromptFileOption = None
    negative_prompt: Negative = None
    seed: Seed = None
    num_images: Images = 1
    base: Annotated[bool, typer.Option("--base", help="Generate images with the base too, at the same seeds.")] = False
    height: Height = None
    width: Width = None
    steps: Steps = None
    scale: Scale = None
    sampler: SamplerOption = None
    schedule: ScheduleOption = None
    precision: PrecisionOption = None
    batch_size: BatchSize = None
    format_: Format = "png"
    override: Override = None
    output: Output = None
    quiet: Quiet = False
    debug: Debug = False

    def settings(self) -> dict[str, Any]:
        """Those that are settings, by dotted key, without those that were not given."""
        sampling = ("negative_prompt", "height", "width", "steps", "scale", "sampler", "schedule")
        settings = {f"sampling.{name}": getattr(self, name) for name in sampling}
        settings["model.precision"] = self.precision
        return {key: value for key, value in settings.items() if value is not None}

    def source(self) -> DrawingSource:
        """What to draw with; see `find_source`."""
        from draftcli.sampling.source import find_source

        return find_source(self.run, self.model, self.lora or (), self.override or (), self.settings())

    def check(self, source: DrawingSource, kinds: Sequence[str]) -> None:
        """What `check_drawing` checks; call it before torch is imported."""
        from draftcli.sampling.source import check_drawing

        check_drawing(source, kinds, self.prompt or (), self.prompts, self.format_)

    def job(
        self, name: str, source: DrawingSource, kinds: Sequence[str], stochastic: bool = False, page: bool = False
    ) -> Job:
        """What the command `name` draws: a column for each of the annealing weights `kinds`. See `Job`."""
        from draftcli.sampling.job import Job

        return Job(
            name=name,
            source=source,
            kinds=kinds,
            stochastic=stochastic,
            prompts=self.prompt or (),
            prompt_file=self.prompts,
            images=self.num_images,
            seed=self.seed,
            batch_size=self.batch_size,
            suffix=self.format_,
            output=self.output,
            page=page,
        )


def with_drawing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give Typer a parameter for each field of `DrawingOptions` where `command` takes all of them as its first one."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    types = get_type_hints(DrawingOptions, include_extras=True)
    shared = {f.name: f.default for f in fields(DrawingOptions)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=keyword) for parameter in own]
    parameters += [
        inspect.Parameter(name, keyword, default=default, annotation=types[name]) for name, default in shared.items()
    ]

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        command(DrawingOptions(**{name: given.pop(name) for name in shared}), **given)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


@with_drawing_options
def sample(options: DrawingOptions) -> None:
    """Generate images with a run, or with any model and LoRAs. Existing images are kept; only missing ones are made.

    **Examples**

    `draftp sample` (the newest run, its validation prompts)

    `draftp sample runs/mine --base --prompt "a red fox in fresh snow" --num-images 4`

    `draftp sample --model stabilityai/stable-diffusion-xl-base-1.0 --lora style.safetensors=0.7 --prompt "a fox"`

    `torchrun --nproc-per-node 4 -m draftcli sample runs/mine --prompts many.jsonl --format webp`
    """
    source = options.source()
    kinds = source.columns(options.base)
    options.check(source, kinds)
    from draftcli.cli.console import open_console

    console = open_console(options.quiet, options.debug)  # before torch and its companions are imported
    from draftcli.sampling.job import run as run_job

    print_result(run_job(options.job("sample", source, kinds), console), console)


def print_result(result: DrawingResult, console: Console) -> None:
    """What each column costs, what was done, and where it is."""
    for name, count in result.evaluations.items():
        console.print(f"{name}: {count} UNet evaluations per image")
    there = result.total - result.drawn
    drawn = f"{result.total} image{'' if result.total == 1 else 's'}"
    console.print(f"{drawn}{f', {there} of them existed already' if there else ''}")
    for what, path in result.written.items():
        console.print(f"{written_label(what):<8} {path}")

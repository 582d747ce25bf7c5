"""draftp eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftcli.cli.completion import complete_rewards, complete_runs
from draftcli.cli.console import written_label
from draftcli.cli.options import BatchSize, Debug, Override, Quiet, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.evaluation.evaluate import EvaluationResult


def evaluate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Runs, checkpoints, or image folders with an index.jsonl.  [default: the newest run]",
            autocompletion=complete_runs,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Weighting of draftp anneal to compare with base and tuned. Repeatable, or separated by commas.  "
            "[default: linear]",
        ),
    ] = None,
    lora_scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X", help="Scale of the LoRA to compare too, such as 0.5. Repeatable, or separated by commas."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help=".txt, .jsonl, .tar, .csv, .parquet, folder of .txt, built-in set or a dataset such as "
            "nateraw/parti-prompts.  [default: the run's validation prompts]",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images per prompt; diversity needs at least 2.")
    ] = 4,
    seed: Seed = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Score with this reward too, besides the run's trained and held-out ones. Repeatable.",
            autocompletion=complete_rewards,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[=FOLDER]",
            help="Features that measure diversity: dinov2, a CLIP-based reward, or package.module:object.  "
            "[default: dinov2, else a CLIP that no trained reward uses; in the toy world what its oracle reads]",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Reward that decides the recommendation.  [default: the first held-out one]"),
    ] = None,
    prefer: Annotated[
        float,
        typer.Option(
            min=0, max=1, metavar="P", help="Trade-off of the recommendation: 1 is reward only, 0 diversity only."
        ),
    ] = 0.5,
    batch_size: BatchSize = None,
    override: Override = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the report.  [default: eval in the run's folder]")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the fine-tuned model with its base: rewards, diversity, drift, and signs of reward hacking.

    Writes report.html, a self-contained page with intervals, win rates and a recommendation, as well as metrics.json
    and metrics.csv. Run the same command again to resume.

    **Examples**

    `draftp eval` (the newest run: base, tuned and linear annealing)

    `draftp eval runs/mine --weight linear,power_2,step_0.6 --lora-scale 0.5,0.75 --num-images 8`

    `draftp eval runs/mine runs/mine/step-000200 runs/other --reward pickscore --features dinov2`

    `draftp eval pictures/base pictures/theirs --reward pickscore`
    """
    from draftcli.evaluation.request import DEFAULT_WEIGHTS, Request, check_request, parse_scales

    request = Request(
        names=names or (),
        weights=_split(weight) if weight else DEFAULT_WEIGHTS,
        scales=parse_scales(_split(lora_scale or [])),
        prompts=prompts,
        images=num_images,
        seed=seed,
        rewards=reward or (),
        features=features,
        judge=judge,
        prefer=prefer,
        overrides=override or (),
        batch_size=batch_size,
        output=output,
    )
    check_request(request)
    from draftcli.cli.console import open_console

    console = open_console(quiet, debug)
    from draftcli.evaluation.evaluate import evaluate as run_evaluation

    result = run_evaluation(request, console)
    if result is not None:  # None in all processes but the main one
        _print_result(result, console)


def _split(texts: list[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",")]


def _print_result(result: EvaluationResult, console: Console) -> None:
    from rich.table import Table

    from draftcli.evaluation.report import cell

    comparison = result.comparison
    shown = [metric for metric in comparison.metrics if metric.group == "reward"]
    table = Table(box=None, pad_edge=False)
    for label in ("", *(metric.label for metric in shown), "diversity"):
        table.add_column(label, justify="left" if label in ("", "diversity") else "right", overflow="fold")
    for name, figures in comparison.figures.items():
        kept = figures.diversity.diversity_kept
        diversity = "100 %" if name == comparison.base else "-" if kept is None else kept.words
        table.add_row(name, *(cell(figures[metric]) for metric in shown), diversity)
    console.print(table)
    console.print(f"diversity in percent of {comparison.base}'s: 1 - cosine on {result.features}")
    trained = comparison.trained_in_words or "none of these"
    console.print(f"trained on: {trained}; * differs from {comparison.base} beyond its 95 % interval")
    for warning in comparison.warnings:
        console.print(f"warning: {warning}")
    recommended = comparison.recommendation
    console.print(f"recommended: {recommended.column or 'nothing'}; {recommended.why}")
    for what, path in result.written.items():
        console.print(f"{written_label(what):<8} {path}")

"""One `draftp sample` or `draftp anneal` from its source to its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import open_ranks
from draftcli.core.models.places import unread_prompts
from draftcli.errors import Interrupted, warn
from draftcli.pictures import open_picture
from draftcli.prompts import PromptList, PromptSequence, read_prompts
from draftcli.runs import disk_errors
from draftcli.sampling.draw import Column, plan
from draftcli.sampling.embedded import read_key
from draftcli.sampling.files import File, Written, write_pictures
from draftcli.sampling.load import load_source
from draftcli.sampling.loras import named_loras
from draftcli.sampling.names import free_path
from draftcli.sampling.page import PageText, read_page_key, write_page
from draftcli.sampling.scores import KnownScores, known_scores
from draftcli.sampling.sheet import (
    Cell,
    Heading,
    Row,
    made_by_line,
    score_line,
    sheet_edge,
    spread,
    write_sheet,
    write_table,
)
from draftcli.sampling.source import DrawingSource, check_drawing

SHEET_CELLS, SHEET_ROWS, SHEET_ACROSS = 24, 12, 6
LARGE_EDGE = 320  # longest side on a sheet of an image that is not small, in pixels


@dataclass(frozen=True)
class Job:
    """What is to be drawn.

    Attributes:
        name: of the command: sample or anneal; names the sheet and the folder.
        source: the model.
        kinds: annealing weights, a column each.
        stochastic: AIG at the price of plain sampling.
        prompts: texts.
        prompt_file: a file or built-in set; with neither, the run's validation prompts.
        images: pictures per prompt.
        seed: of a prompt's first picture; None: the run's.
        batch_size: pictures drawn together; None: by their size.
        suffix: png, jpg or webp.
        output: folder; None: in the source's.
        page: write compare.html for one column too; for several it is written anyway.
    """

    name: str
    source: DrawingSource
    kinds: Sequence[str]
    stochastic: bool = False
    prompts: Sequence[str] = ()
    prompt_file: str | None = None
    images: int = 1
    seed: int | None = None
    batch_size: int | None = None
    suffix: str = "png"
    output: Path | None = None
    page: bool = False


@dataclass
class DrawingResult:
    """What came of a job.

    Attributes:
        evaluations: UNet evaluations a picture, by column.
        drawn: files that were not there already.
        total: files in all.
        written: what people will want to open, by what it is.
        files: the pictures: prompt by prompt, seed by seed, column by column.
    """

    evaluations: dict[str, int]
    drawn: int
    total: int
    written: dict[str, Path] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def run(job: Job, console: Console, progress: Callable[[str, int, int], None] | None = None) -> DrawingResult:
    """Draw the pictures, the sheet and, where there is something to compare, the page.

    Args:
        job: what is to be drawn.
        console: where people look.
        progress: see `progress_bar`.

    Raises:
        InputError: nothing to anneal, no prompts, an unknown weight, or a model that cannot be loaded.
        DraftpError: the disk refuses.
        Interrupted: by Ctrl-C.
    """
    check_drawing(job.source, job.kinds, job.prompts, job.prompt_file, job.suffix)
    columns = list({column.name: column for column in (Column.of(k, job.stochastic) for k in job.kinds)}.values())
    warnings = [*job.source.warnings]
    if job.stochastic and not any(column.stochastic for column in columns):
        warnings.append("--stochastic has no effect on base and tuned, which ask one network anyway")
    prompts = _prompts(job)
    warnings += prompts.notes_for(job.source.cfg.sampling)
    unread = unread_prompts(job.source.cfg.model.pretrained, (prompt.text for prompt in prompts))
    warnings += [] if unread is None else [unread]
    folder = job.output or job.source.folder / job.name
    with open_ranks() as ranks:
        console.quiet = console.quiet or not ranks.is_main
        for line in warnings if ranks.is_main else ():
            warn(line)
        model, loras = load_source(job.source), named_loras(job.source.loras, job.source.base_loras)
        console.print(f"{job.source.name} on {model.runtime.reason}")
        pictures = plan(prompts, job.images, _seed(job), picture_size(job.source, model))
        share = -(-len(pictures) * len(columns) // ranks.size)
        try:
            with progress_bar(console, "drawing", share, progress) as advance:
                written = write_pictures(
                    model,
                    columns,
                    pictures,
                    folder,
                    batch_size=job.batch_size,
                    suffix=job.suffix,
                    ranks=ranks,
                    loras=loras,
                    progress=advance,
                )
        except KeyboardInterrupt:
            raise Interrupted("interrupted; run the same command to resume") from None
        files = [file.path for file in written.files]
        result = DrawingResult(written.evaluations, written.drawn, len(files), {"pictures": folder}, files)
        if beside := [file.path.name for file in written.files if file.is_beside_another]:
            count = f"{len(beside)} of {result.total}"
            text = f"other images have the same names, so these got a hash: {count}, such as {beside[0]}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        if ranks.is_main:
            _overviews(job, model, written, result)
    return result


def _prompts(job: Job) -> PromptSequence:
    given = [read_prompts(job.prompts, "--prompt")]
    if job.prompt_file is not None:
        given.append(read_prompts(job.prompt_file, "--prompts"))
    if any(given):
        return PromptList((p for some in given for p in some), [note for some in given for note in some.notes])
    return read_prompts(job.source.cfg.data.validation_prompts or (), "data.validation_prompts")


def _seed(job: Job) -> int:
    return job.source.cfg.trainer.seed if job.seed is None else job.seed


def picture_size(source: DrawingSource, model: DRaFTPModel) -> tuple[int, int]:
    """(height, width) in pixels as the settings say: those that somebody gave, or the run's. Else what the model was
    made for.
    """
    sampling = model.cfg.sampling
    if source.from_run:
        return sampling.height, sampling.width
    factor, native = 2 ** (len(model.vae.config.block_out_channels) - 1), model.unet.config.sample_size
    height, width = native if isinstance(native, list | tuple) else (native, native)
    given = sampling.model_fields_set
    return (
        sampling.height if "height" in given else factor * height,
        sampling.width if "width" in given else factor * width,
    )


@contextmanager
def progress_bar(
    console: Console, what: str, total: int, told: Callable[[str, int, int], None] | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, in a terminal; yields what to call with how many more are done.

    Args:
        console: where people look.
        what: goes on.
        total: how many there are.
        told: also called each time, as told(what, done, total).
    """
    name = TextColumn("{task.description}", markup=False)  # may be that of a folder
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)

        def advance(count: int) -> None:
            progress.advance(bar, count)
            if told is not None:
                told(what, int(progress.tasks[bar].completed), total)

        yield advance


def _overviews(job: Job, model: DRaFTPModel, written: Written, result: DrawingResult) -> None:
    source = job.source
    counts = written.evaluations
    title = f"{source.name}: " + ("from base to tuned" if len(counts) > 1 else next(iter(counts)))
    settings = model.cfg.sampling.summary
    folder = written.index.parent
    key = hashlib.sha256(json.dumps([file.key for file in written.files]).encode()).hexdigest()[:16]
    sheet = free_path(folder, f"{job.name}-sheet", ".png", key, read_key)
    scores, made_by = known_scores(source.folder), made_by_line(source.name, settings)
    with disk_errors(sheet):
        _write_overview(sheet, written, scores, title, key, made_by)
        result.written |= {"index": written.index, "sheet": sheet}
        if job.page or len(counts) > 1:
            result.written["page"] = free_path(folder, "compare", ".html", key, read_page_key)
            note = f"{len(counts)} columns at the same seeds; {settings}."
            write_page(result.written["page"], written, PageText(title, job.name, note, made_by), scores, key)


def _write_overview(path: Path, written: Written, scores: KnownScores, title: str, key: str, made_by: str) -> None:
    """Up to two columns as cells, several across; more as a table. Prompts are spread over the whole set."""
    counts, rows = written.evaluations, written.rows()
    edge = max(sheet_edge(row[0].picture.size, LARGE_EDGE) for row in rows)
    if len(counts) > 2:
        shown = [rows[i] for i in spread(len(rows), SHEET_ROWS)]
        headings = [Heading(name, f"{count} evaluations") for name, count in counts.items()]
        lines = [
            Row(
                row[0].picture.prompt.text,
                f"seed {row[0].picture.seed}",
                [open_picture(file.path) for file in row],
                _notes([""] * len(row), row, scores),
            )
            for row in shown
        ]
        note = _with_count(_cost(), len(shown), len(rows), "rows")
        write_table(path, headings, lines, title, note, edge, key, made_by)
        return
    prompts = dict.fromkeys(file.number for file in written.files)
    cells = [[file for row in rows if row[0].number == number for file in row] for number in prompts]
    cells = [cells[i] for i in spread(len(cells), SHEET_CELLS)]
    columns = len(counts) if len(counts) > 1 else 0  # the seeds of one column are side by side, those of two below
    shown = [files[: (columns or 2) * SHEET_ACROSS] for files in cells]
    across = max(1, SHEET_ACROSS // (columns or max(map(len, shown))))
    write_sheet(
        path,
        [
            Cell(
                [open_picture(file.path) for file in files],
                files[0].picture.prompt.text,
                _notes([_name(file, columns > 0) for file in files], files, scores),
                columns,
            )
            for files in shown
        ],
        title,
        across,
        edge,
        _with_count(_cost(counts), len(shown), len(prompts), "prompts"),
        key,
        made_by,
    )


def _name(file: File, with_column: bool) -> str:
    return (f"{file.column.name}, " if with_column else "") + f"seed {file.picture.seed}"


def _notes(names: Sequence[str], files: Sequence[File], scores: KnownScores) -> list[str]:
    """What is written under images: a name, and the scores, with the change against the base where it is in a row."""
    base = {file.picture.seed: scores.of(file.key) for file in files if file.column.name == "base"}
    notes = []
    for name, file in zip(names, files, strict=True):
        against = {} if file.column.name == "base" else base.get(file.picture.seed, {})
        lines = [score_line(reward, score, against.get(reward)) for reward, score in scores.of(file.key).items()]
        notes.append("\n".join(filter(None, [name, *lines])))
    return notes


def _cost(evaluations: Mapping[str, int] | None = None) -> str:
    """What the figures of UNet evaluations mean, or where nothing else shows them, those of each column."""
    if evaluations is None:
        return "UNet evaluations are an image's, guidance counted twice."
    each = ", ".join(f"{name} {count}" for name, count in evaluations.items())
    return f"UNet evaluations an image: {each}, guidance counted twice."


def _with_count(note: str, shown: int, there: int, what: str) -> str:
    return note if shown == there else f"{note} {shown} of {there} {what} are shown."

"""What `draftp rate` was asked for: found and checked before anything is loaded, and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from draftcli.config import check_device_name
from draftcli.core.models.places import check_model_files
from draftcli.errors import InputError
from draftcli.prompts import PromptList, PromptSequence, find_prompts, read_prompts
from draftcli.rewards import check_names
from draftcli.sampling.names import INDEX, short_names
from draftcli.sampling.source import DrawingSource, find_source

FOLDER = "rate"  # where answers and pictures go, unless somebody says otherwise
_PACKAGES = ("starlette", "uvicorn")


@dataclass(frozen=True)
class RatingRequest:
    """Which pictures are rated, and where.

    Attributes:
        names: a run, two runs, a folder with an index.jsonl, or two; empty: the newest run, unless model or preset is
            given.
        model: as `find_source`.
        preset: likewise.
        loras: likewise.
        overrides: likewise.
        prompts: texts.
        prompt_file: a file, built-in set or dataset; with neither, the prompts that the run trains on.
        base: compare a run with its base.
        pairs: how many different pairs.
        seed: of a prompt's first picture, and of order and sides; None: the run's.
        device: that draws and judges; None: the run's.
        batch_size: pictures drawn together; None: by their size.
        judges: rewards that are compared with the answers afterwards.
        port: of the page; 0: any free one.
        output: folder; None: rate/ in that of the run.
    """

    names: Sequence[str] = ()
    model: str | None = None
    preset: str | None = None
    loras: Sequence[str] = ()
    overrides: Sequence[str] = ()
    prompts: Sequence[str] = ()
    prompt_file: str | None = None
    base: bool = False
    pairs: int = 100
    seed: int | None = None
    device: str | None = None
    batch_size: int | None = None
    judges: Sequence[str] = ()
    port: int = 0
    output: Path | None = None


@dataclass(frozen=True)
class Candidates:
    """Where the two pictures of a pair come from.

    Attributes:
        sources: what draws them, at most two; none where they are there already.
        folders: folders with an index.jsonl; none where they are drawn.
        columns: with two, a pair has one picture of each at the same seed; with one, two seeds. Of a single folder, the
            name of pictures whose line does not say what drew them.
        output: folder of preferences.jsonl.
        seed: of a prompt's first picture, and of order and sides.
        notes: what people should know.
    """

    sources: Sequence[DrawingSource]
    folders: Sequence[Path]
    columns: Sequence[str]
    output: Path
    seed: int
    notes: Sequence[str] = ()


def check_rating(request: RatingRequest) -> Candidates:
    """Find what is rated, and see that it can be.

    Raises:
        InputError: it does not exist, cannot be compared, or packages are missing.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise InputError(f"the page needs {' and '.join(missing)}: pip install 'draftp[rate]'")
    check_names(request.judges)
    if request.device is not None:
        check_device_name(request.device, "--device")
    if len(request.names) > 2:
        raise InputError(f"{len(request.names)} names were given; a pair shows two images, so give one or two")
    folders = [Path(name) for name in request.names if (Path(name) / INDEX).is_file()]
    if folders and len(folders) < len(request.names):
        (other,) = (name for name in request.names if Path(name) not in folders)
        raise InputError(f"{folders[0]} is a folder of images and {other} is not; give two runs or two folders")
    return _of_folders(request, folders) if folders else _of_sources(request)


def read_request_prompts(request: RatingRequest, source: DrawingSource) -> PromptSequence:
    """The prompts that were given, else those that the run or recipe trains on: its validation prompts stay unseen by
    a reward that learns from the answers.

    Raises:
        InputError: they cannot be read, or there are none.
    """
    if not request.prompts and request.prompt_file is None:
        return read_prompts(source.cfg.data.prompts, "data.prompts")
    given = [read_prompts(request.prompts, "--prompt")]
    if request.prompt_file is not None:
        given.append(read_prompts(request.prompt_file, "--prompts"))
    return PromptList((p for some in given for p in some), [note for some in given for note in some.notes])


def _of_folders(request: RatingRequest, folders: Sequence[Path]) -> Candidates:
    given = {
        "--model": request.model,
        "--preset": request.preset,
        "--lora": request.loras,
        "--set": request.overrides,
        "--prompt": request.prompts,
        "--prompts": request.prompt_file,
        "--base": request.base,
        "--batch-size": request.batch_size,
        "--device": None if request.judges else request.device,
    }
    notes = [f"{option} has no effect on folders of images" for option, value in given.items() if value]
    output = request.output or folders[0] / FOLDER
    return Candidates((), folders, short_names(folders), output, request.seed or 0, notes)


def _of_sources(request: RatingRequest) -> Candidates:
    settings = {} if request.device is None else {"model.device": request.device}
    run, *other = request.names or (None,)
    if other and request.loras:
        raise InputError("--lora: two runs are compared as they are; name one run, or leave it out")
    first = find_source(run, request.model, request.loras, request.overrides, settings, request.preset)
    sources, notes = [first], []
    if other:
        sampling = {"sampling": first.cfg.sampling.model_dump()}
        sources.append(find_source(other[0], None, (), (), {**sampling, **settings}))
        columns = short_names([Path(name) for name in request.names])
        notes += ["--base has no effect on two runs, which are compared with each other"] if request.base else []
    else:
        columns = first.columns(request.base)
        if request.base and len(columns) == 1:
            raise InputError(
                f"--base: {first.name} is the base alone; name a run or give --lora, or leave --base out to compare "
                "two seeds"
            )
    for source in sources:
        check_model_files(source.cfg.model)
    _check_prompts(request, first)
    seed = first.cfg.trainer.seed if request.seed is None else request.seed
    notes += [text for source in sources for text in source.warnings]
    return Candidates(sources, (), columns, request.output or first.folder / FOLDER, seed, notes)


def _check_prompts(request: RatingRequest, source: DrawingSource) -> None:
    if request.prompt_file is not None:
        find_prompts(request.prompt_file, "--prompts")
    elif not request.prompts and not source.from_run:
        raise InputError("no prompt was given; give --prompt TEXT or --prompts FILE")
    elif not request.prompts and isinstance(source.cfg.data.prompts, str):
        find_prompts(source.cfg.data.prompts, "data.prompts")

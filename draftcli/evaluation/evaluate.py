"""One `draftp eval` from what was asked for to its files: draw what is missing, measure, compare, write."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from draftcli import __version__
from draftcli.config import RewardSource
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks, open_ranks
from draftcli.core.engine.runtime import choose_runtime
from draftcli.core.models.places import BUILT_IN, unread_prompts
from draftcli.core.models.recognition import family_of
from draftcli.errors import InputError, warn
from draftcli.evaluation.citations import bibtex
from draftcli.evaluation.compare import ColumnComparison, compare
from draftcli.evaluation.features import choose_features
from draftcli.evaluation.measure import Judges, Measured, collect, measure
from draftcli.evaluation.outputs import write_outputs
from draftcli.evaluation.pictures import Gallery, Item, folder_gallery, items_of, read_entries, read_picture
from draftcli.evaluation.report import About
from draftcli.evaluation.request import (
    Request,
    check_request,
    command_line,
    find_compared,
    find_judges,
    opposite_aims,
    trained_by,
)
from draftcli.metrics.diversity import NEIGHBOURS
from draftcli.metrics.roles import trained_in_words
from draftcli.prompts import read_prompts
from draftcli.rewards.fingerprint import settings_and_files
from draftcli.rewards.first_call import ask_once
from draftcli.rewards.registry import load_from
from draftcli.runs import disk_errors, write_aside
from draftcli.sampling.draw import Column, Picture, plan
from draftcli.sampling.files import write_pictures
from draftcli.sampling.job import progress_bar
from draftcli.sampling.load import load_source
from draftcli.sampling.loras import NamedLora, named_loras
from draftcli.sampling.names import short_names
from draftcli.sampling.source import DrawingSource


@dataclass(frozen=True)
class EvaluationResult:
    """The comparison, the features of its diversity, and the files that were written, by what they are."""

    comparison: ColumnComparison
    features: str
    written: dict[str, Path]


def evaluate(
    request: Request, console: Console, progress: Callable[[str, int, int], None] | None = None
) -> EvaluationResult | None:
    """Draw, measure, compare, write. What is there already is not done again.

    Args:
        request: what is to be compared.
        console: where people look.
        progress: see `progress_bar`.

    Returns:
        None in all processes but the main one.

    Raises:
        InputError: what was asked for does not exist or cannot be combined.
        DraftpError: the disk refuses.
    """
    check_request(request)  # what is wrong is refused before anything is loaded
    sources, folders = find_compared(request)
    rewards, trained = find_judges(request, sources)
    judge = request.judge or next((r for r in rewards if r not in trained), next(iter(rewards)))
    output = request.output or (sources[0].folder if sources else Path()) / "eval"
    with open_ranks() as ranks:
        console.quiet = console.quiet or not ranks.is_main
        for text in dict.fromkeys(text for source in sources for text in source.warnings) if ranks.is_main else ():
            warn(text)
        judges = load_judges(rewards, request.features, sources)
        pictures, notes = _plan(request, sources)
        for text in notes if ranks.is_main else ():
            warn(text)
        _warn_of_unread_prompts(sources, pictures, ranks)
        items = [Item(p.prompt.text, p.seed) for p in pictures] or items_of(read_entries(folders[0]))
        named = [Path(name) for name in request.names if Path(name) not in folders]  # a checkpoint by its own name
        labels = short_names((named or [Path(source.name) for source in sources]) + folders)
        elsewhere = [folder_gallery(f, items, label) for f, label in zip(folders, labels[len(sources) :], strict=True)]
        size = pictures[0].size if pictures else read_picture(elsewhere[0].files[0]).shape[1:]
        ask_once(judges.rewards, [item.prompt for item in items[:2]], (size[0], size[1]), judges.device)
        galleries: list[Gallery] = []
        for label, source in zip(labels, sources, strict=False):
            galleries += _draw(
                request, source, label, pictures, output / "pictures", not galleries, ranks, console, progress
            )
        galleries += elsewhere
        measured = _measure(galleries, items, judges, output / "measured", ranks, console, progress)
        if not ranks.is_main:
            return None
        cautions = [*filter(None, [judges.features.caution]), *opposite_aims(sources)]
        comparison = compare(galleries, items, measured, trained, judge, request.prefer, cautions)
        settings = _settings(request, sources, items, judges, trained)
        about = About(_title(labels[0], judges), settings, _bibtex(request, sources, judges))
        written = write_outputs(output, comparison, about, items, measured)
        return EvaluationResult(comparison, judges.features.name, written)


def load_judges(rewards: dict[str, RewardSource], features: str | None, sources: Sequence[DrawingSource]) -> Judges:
    """Every reward with its settings, and the features (None: the default), on the device of the first run.

    Where there are only folders, any reward may have been trained on.

    Raises:
        InputError: one is unknown, or its weights cannot be loaded.
    """
    device = choose_runtime(sources[0].cfg.model.device if sources else "auto", "fp32").device
    loaded = {name: load_from(name, setting) for name, setting in rewards.items()}
    for reward in loaded.values():
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
    model = sources[0].cfg.model.pretrained if sources else ""
    chosen = choose_features(features, model, loaded, sorted(trained_by(sources) if sources else rewards))
    return Judges(loaded, chosen.to(device), device, settings_and_files(rewards))


def _title(label: str, judges: Judges) -> str:
    """The report's headline, which says so where diversity is measured in what was trained on."""
    title = f"{label}: fine-tuned against base"
    shared = " and ".join(judges.features.trained_on)
    return f"{title} (diversity in features of {shared}, which was or may have been trained on)" if shared else title


def _plan(request: Request, sources: Sequence[DrawingSource]) -> tuple[list[Picture], Sequence[str]]:
    """What every run draws, and what people should know of its prompts; nothing where there are only folders."""
    if not sources:
        if request.prompts is not None:
            raise InputError("--prompts: only image folders were given, which have their own prompts")
        return [], ()
    cfg = sources[0].cfg
    source = request.prompts or cfg.data.validation_prompts
    if not source:
        raise InputError(f"{sources[0].name} has no validation prompts; give --prompts FILE")
    prompts = read_prompts(source, "--prompts" if request.prompts else "data.validation_prompts")
    once = {prompt.text: prompt for prompt in reversed(prompts)}  # the same prompt twice is one prompt
    seed = cfg.trainer.seed if request.seed is None else request.seed
    size = (cfg.sampling.height, cfg.sampling.width)
    notes = prompts.notes_for(cfg.sampling)
    if others := len(set(prompts)) - len(once):
        notes.append(f"{others} prompts differ from another in negative prompt, seed or size alone, and are left out")
    return plan(list(reversed(once.values())), request.images, seed, size), notes


def _warn_of_unread_prompts(sources: Sequence[DrawingSource], pictures: Sequence[Picture], ranks: Ranks) -> None:
    texts = list(dict.fromkeys(picture.prompt.text for picture in pictures))
    for name in dict.fromkeys(source.cfg.model.pretrained for source in sources) if ranks.is_main else ():
        if (text := unread_prompts(name, texts)) is not None:
            warn(text)


def _draw(
    request: Request,
    source: DrawingSource,
    label: str,
    pictures: Sequence[Picture],
    folder: Path,
    is_first: bool,
    ranks: Ranks,
    console: Console,
    progress: Callable[[str, int, int], None] | None,
) -> list[Gallery]:
    """The columns of one run; the base is the first run's."""
    model = load_source(source)
    console.print(f"{source.name} on {model.runtime.reason}")
    kinds = [*(["base"] if is_first else []), "tuned", *request.weights]
    columns = [*map(Column.of, kinds), *map(Column.scaled, request.scales)]
    columns = list({column.name: column for column in columns}.values())
    loras = named_loras(source.loras, source.base_loras)
    target = folder / label.replace("/", "-")
    galleries = []
    share = -(-len(columns) * len(pictures) // ranks.size)
    with progress_bar(console, f"drawing {label}", share, progress) as advance:
        for column in columns:
            seconds, files = _draw_column(request, model, loras, column, pictures, target, ranks, advance)
            name = column.name if is_first else f"{label} {column.name}"
            evaluations = column.evaluations(model)
            galleries.append(Gallery(name, files, f"{source.name}, {column.name}", evaluations, seconds))
    return galleries


def _draw_column(
    request: Request,
    model: DRaFTPModel,
    loras: Sequence[NamedLora],
    column: Column,
    pictures: Sequence[Picture],
    folder: Path,
    ranks: Ranks,
    advance: Callable[[int], None],
) -> tuple[float | None, tuple[Path, ...]]:
    """Seconds a picture (those of an earlier session where nothing was drawn now) and the files."""
    began = time.perf_counter()
    written = write_pictures(
        model, [column], pictures, folder, batch_size=request.batch_size, ranks=ranks, loras=loras, progress=advance
    )
    elapsed = time.perf_counter() - began
    path, key = folder / "seconds.json", written.files[0].key
    known = read_seconds(path)
    if written.drawn and ranks.is_main:
        known[key] = elapsed / written.drawn
        with disk_errors(path):
            write_aside(path, lambda aside: aside.write_text(json.dumps(known), encoding="utf-8"))
    return known.get(key), tuple(file.path for file in written.files)


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds a picture, by its hash; what is not a number is dropped."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in known.items() if type(value) is float} if isinstance(known, dict) else {}


def _measure(
    galleries: Sequence[Gallery],
    items: Sequence[Item],
    judges: Judges,
    cache: Path,
    ranks: Ranks,
    console: Console,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, Measured]:
    share = -(-len(galleries) * len(items) // ranks.size)
    with progress_bar(console, "measuring", share, progress) as advance, ranks.all_or_none():
        measure(galleries, items, judges, cache, (ranks.rank, ranks.size), advance)
    if not ranks.is_main:
        return {}
    return {gallery.name: collect(gallery, items, judges, cache) for gallery in galleries}


def _settings(
    request: Request,
    sources: Sequence[DrawingSource],
    items: Sequence[Item],
    judges: Judges,
    trained: Mapping[str, int],
) -> dict[str, str | float]:
    """What a reader needs to repeat it."""
    prompts = len({item.prompt for item in items})
    seeds = [item.seed for item in items]
    prompts_from = request.prompts or (sources[0].cfg.data.validation_prompts if sources else "of the folders")
    settings: dict[str, str | float] = {
        "features": judges.features.name,
        "k": NEIGHBOURS,
        "prompts": prompts_from if isinstance(prompts_from, str) else "the run's own list",
        "number_of_prompts": prompts,
        "pictures_per_prompt": len(items) // prompts,
        "seeds": f"{min(seeds)} to {max(seeds)}",
        "trained_on": trained_in_words(trained) or "unknown",
        "held_out": ", ".join(name for name in judges.rewards if name not in trained) or "none",
        "intervals": "95 %, percentile bootstrap over prompts, 10,000 resamples",
    }
    if sources:
        cfg = sources[0].cfg
        settings |= {
            "model": cfg.model.pretrained,
            "size": f"{cfg.sampling.height} x {cfg.sampling.width} (height x width)",
            "sampler": f"{cfg.sampling.steps} steps of {cfg.sampling.sampler}, {cfg.sampling.grid}",
            "guidance": cfg.sampling.guidance,
            "precision": cfg.model.precision,
        }
    return settings | {"command": command_line(request), "versions": _versions()}


def _versions() -> str:
    """Of everything that makes or scores an image."""
    packages = ("torch", "diffusers", "transformers", "peft", "numpy", "scipy")
    return ", ".join([f"draftp {__version__}", *(f"{name} {version(name)}" for name in packages)])


def _bibtex(request: Request, sources: Sequence[DrawingSource], judges: Judges) -> str:
    models = [source.cfg.model for source in sources if source.cfg.model.pretrained not in BUILT_IN]
    families = {family_of(model).name for model in models}
    return bibtex(judges.rewards, judges.features.name, bool(sources), bool(sources and request.weights), families)

"""Merge LoRAs and full fine-tunings into a model, or into one LoRA, and hand over what passed its checks."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from draftcli import __version__
from draftcli.core.lora.files import Lora
from draftcli.core.models.meta import PARTS, modules_on_meta
from draftcli.core.models.sdxl import SDXL_CONFIG
from draftcli.core.precision import DTYPES
from draftcli.errors import DraftpError, InputError
from draftcli.export import verify
from draftcli.export.base import Base, clean_key, open_base
from draftcli.export.card import merge_card, push_to_hub
from draftcli.export.compress import Loss, combine, compress, extract
from draftcli.export.inputs import Changes, Source, base_of, find_sources, read_changes
from draftcli.export.tensors import Entry, close_files
from draftcli.export.write import (
    DTYPE_NAMES,
    Merger,
    kohya_metadata,
    modelspec,
    write_folder,
    write_lora,
    write_single_file,
    written_as,
)
from draftcli.runs import disk_errors

Format = Literal["diffusers", "single-file", "lora", "kohya"]
Verify = Literal["keys", "forward"]
REPORT = "draftp-merge.json"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Order:
    """What the command was asked for.

    Attributes:
        inputs: runs and LoRAs, each with =SCALE or without; none: the newest run.
        base: model to merge into; None: the run's.
        config: for a single-file base: folder with configuration and tokenizers.
        variant: which files of a base folder, such as fp16.
        kind: the output's format.
        scale: of everything together.
        rank: for LoRA formats: at most this much in each layer.
        dtype: fp32, fp16, bf16; None: as they are.
        shard_size: of a diffusers folder's weight files, in bytes.
        output: file or folder.
        overwrite: replace what merge-lora wrote there before.
        verify: how far the result is checked.
        hub: repository to upload to.
        private: whether that is made private.
    """

    inputs: tuple[str, ...] = ()
    base: str | None = None
    config: str | None = None
    variant: str | None = None
    kind: Format = "diffusers"
    scale: float = 1.0
    rank: int | None = None
    dtype: str | None = None
    shard_size: int = 10**10
    output: Path | None = None
    overwrite: bool = False
    verify: Verify = "forward"
    hub: str | None = None
    private: bool = False


@dataclass
class Outcome:
    """What was written, and what is to be said of it."""

    artefact: Path
    report: Path
    lines: list[str] = field(default_factory=list)
    url: str | None = None


def merge(order: Order, console: Console) -> Outcome:
    """Do it.

    Raises:
        InputError: an input, the base, the output or an option is wrong.
        DraftpError: the disk refuses, or the result fails its verification, in which case nothing is kept.
    """
    _check_options(order)
    sources = find_sources(order.inputs)
    output = _output(order, sources)
    base, shapes = _base(order, sources)
    _check_output(order, output, sources, base)
    changes = read_changes(sources, base, shapes, order.scale)
    name = base.name if base else "SDXL's configuration"
    report = {
        "draftp": __version__,
        "title": output.stem,
        "format": order.kind,
        "base": name,
        "inputs": [{"name": s.text, "weights": str(s.path), "scale": s.scale * order.scale} for s in sources],
    }
    listed = ", ".join(f"{s.text} x {s.scale * order.scale:g}" for s in sources)
    console.print(f"{order.kind} from {name} and {listed}", highlight=False, soft_wrap=True)
    with disk_errors(output), _staged(output) as staged:
        if order.kind in ("diffusers", "single-file"):
            assert base is not None
            checks = _merge_model(order, base, changes, staged, report, console)
        else:
            checks = _merge_lora(order, base, changes, shapes, staged, report, console)
        report |= {"checks": checks}
        if staged.is_dir():
            (staged / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
            (staged / "README.md").write_text(merge_card(report, output.name), encoding="utf-8")
    written = output / REPORT if output.is_dir() else output.with_suffix(".merge.json")
    if not output.is_dir():
        with disk_errors(written):
            written.write_text(json.dumps(report, indent=2), encoding="utf-8")
    outcome = Outcome(output, written, checks)
    if order.hub:
        outcome.url = push_to_hub(output, order.hub, merge_card(report, order.hub), order.private)
    return outcome


def _check_options(order: Order) -> None:
    is_lora = order.kind in ("lora", "kohya")
    if order.rank is not None and not is_lora:
        warnings.warn(f"--rank has no effect with --format {order.kind}: a merged model has no rank", stacklevel=3)
    if order.scale == 0 or not abs(order.scale) < float("inf"):
        raise InputError(f"--scale {order.scale:g} would change nothing; give a finite number that is not 0")
    if order.dtype is not None and order.dtype not in DTYPES:
        raise InputError(f"--dtype {order.dtype}: allowed are {', '.join(DTYPES)}")
    if order.kind not in get_args(Format):
        raise InputError(f"--format {order.kind}: allowed are {', '.join(get_args(Format))}")
    if order.verify not in get_args(Verify):
        raise InputError(f"--verify {order.verify}: allowed are {', '.join(get_args(Verify))}")


def _base(order: Order, sources: list[Source]) -> tuple[Base | None, Any]:
    """The base, and the shapes of its weights. Formats of LoRAs can do with SDXL's shapes alone."""
    found = (order.base, order.config, order.variant) if order.base else base_of(sources)
    if found is None:
        if order.kind in ("diffusers", "single-file"):
            raise InputError(f"--format {order.kind} needs the model to merge into: give --base MODEL")
        if order.verify == "forward":
            warnings.warn("without --base only the keys are checked, against SDXL's configuration", stacklevel=3)
        modules = modules_on_meta(SDXL_CONFIG)
        return None, {
            part: {
                clean_key(part, key).removesuffix(".weight"): tuple(tensor.shape)
                for key, tensor in modules[part].state_dict().items()
                if key.endswith(".weight") and tensor.ndim in (2, 4)
            }
            for part in PARTS
            if part != "vae"
        }
    pretrained, config, variant = found
    base = open_base(pretrained, order.config or config, order.variant or variant)
    return base, base.shapes()


def _merge_model(
    order: Order, base: Base, changes: Changes, staged: Path, report: dict[str, Any], console: Console
) -> list[str]:
    merger = Merger(base, changes, DTYPES[order.dtype] if order.dtype else None)
    entries = (
        merger.original_entries() if order.kind == "single-file" else [e for p in PARTS for e in merger.entries(p)]
    )
    size = _check_space(entries, staged)
    with _progress(console, size) as wrote:
        if order.kind == "single-file":
            merged_from = ", ".join([base.name, *(str(item["name"]) for item in report["inputs"])])
            write_single_file(merger, staged, str(report["title"]), merged_from, wrote)
        else:
            staged.mkdir()
            write_folder(merger, staged, order.shard_size, wrote)
    kept = len(entries) - len(merger.written)
    rounding = {
        DTYPE_NAMES.get(dtype, str(dtype)): (merger.rounded[dtype] / moved) ** 0.5 if moved else 0.0
        for dtype, moved in merger.moved.items()
    }
    report |= {"bytes": size, "changed": len(merger.written), "rounding": rounding}
    recast = f", the others cast to {order.dtype} (VAE as it was)" if order.dtype else f", {kept} kept bit for bit"
    checks = [f"keys: {verify.check_model_keys(merger, staged, order.kind)}{recast}"]
    checks += [f"weights: rounding to {name} is {part:.2g} of the change" for name, part in rounding.items()]
    close_files()
    if order.verify == "forward":
        console.print("verifying with diffusers' own loader", highlight=False)
        dtype = max(merger.moved, key=lambda d: verify.TOLERANCE.get(d, 1.0))
        checks += _said(verify.compare_model(base, changes, staged, order.kind, dtype), report)
        checks.append("vae: bit for bit the base's, encoder included")
    return checks


def _merge_lora(
    order: Order,
    base: Base | None,
    changes: Changes,
    shapes: Any,
    staged: Path,
    report: dict[str, Any],
    console: Console,
) -> list[str]:
    lora, loss = _one_lora(order, base, changes, console)
    dtype = DTYPES[order.dtype] if order.dtype else None
    file = staged
    if staged.suffix != ".safetensors":
        staged.mkdir()
        file = staged / LORA_FILE
    metadata = {"format": "pt"} if order.kind == "lora" else kohya_metadata(lora)
    if order.kind == "kohya":
        prediction = base.prediction if base else "epsilon"
        named = ", ".join(str(item["name"]) for item in report["inputs"])
        metadata |= modelspec(str(report["title"]), named, prediction, lora=True)
    write_lora(lora, file, order.kind, dtype, metadata, shapes["unet"])
    checks = [f"keys: {verify.check_lora_keys(written_as(lora, dtype), file, shapes)}"]
    if loss is not None:
        report["compression"] = vars(loss)
        checks.append(
            f"rank {order.rank}: error {loss.relative:.2%} of the update, at most {loss.worst:.2%} in {loss.layer}"
            if loss.relative
            else f"rank {order.rank}: nothing is lost"
        )
        if loss.left_out:
            checks.append(f"left out: {loss.left_out:.2%} of the change is in biases and norms, which no LoRA holds")
    if order.verify == "forward" and base is not None:
        console.print("verifying with diffusers' own loader", highlight=False)
        written = dtype or next(update.up.dtype for _, _, update in lora.updates())
        checks += _said(verify.compare_lora(base, lora, file, written), report)
    return checks


def _one_lora(order: Order, base: Base | None, changes: Changes, console: Console) -> tuple[Lora, Loss | None]:
    if changes.full:
        assert base is not None
        if order.rank is None:
            raise InputError("a run that trained the whole UNet has no rank; say with --rank what the LoRA may have")
        with _progress(console, len(base.tensors["unet"])) as wrote:
            return extract(changes, base, order.rank, lambda: wrote(1))
    lora = combine(changes.loras)
    return compress(lora, order.rank) if order.rank is not None else (lora, None)


def _said(comparisons: list[verify.Comparison], report: dict[str, Any]) -> list[str]:
    report["verification"] = [vars(comparison) for comparison in comparisons]
    return [
        f"{c.part}: loaded again it differs from base + adapter by at most {c.difference:.2g} "
        f"(allowed {c.tolerance:.2g}; " + (f"the adapter moves it by {c.effect:.2g})" if c.effect else "not adapted)")
        for c in comparisons
    ]


def _output(order: Order, sources: list[Source]) -> Path:
    if order.output is None:
        only = sources[0] if len(sources) == 1 else None
        name = only.run.folder.name if only and only.run else f"{sources[0].path.stem}-merged"
        folder = only.run.folder / "export" if only and only.run else Path()
        ending = {
            "diffusers": "-diffusers",
            "single-file": ".safetensors",
            "lora": "-lora",
            "kohya": "-kohya.safetensors",
        }
        return folder / f"{name}{ending[order.kind]}"
    is_file = order.output.suffix == ".safetensors"
    if order.kind == "diffusers" and is_file:
        raise InputError(f"--output {order.output}: --format diffusers writes a folder; leave out .safetensors")
    if order.kind in ("single-file", "kohya") and not is_file:
        raise InputError(f"--output {order.output}: --format {order.kind} writes one file; end it with .safetensors")
    return order.output


def _check_output(order: Order, output: Path, sources: list[Source], base: Base | None) -> None:
    read = [source.path for source in sources] + ([base.path, base.config] if base else [])
    for path in read:
        if output.resolve() == path.resolve() or output.resolve() in path.resolve().parents:
            raise InputError(f"--output {output} is what is read ({path}); choose another")
    if not output.exists():
        return
    if not order.overwrite:
        raise InputError(f"{output} exists; choose another --output, or replace it with --overwrite")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT).is_file():
        raise InputError(f"{output} was not written by merge-lora (it has no {REPORT}); remove it yourself")


def _check_space(entries: list[Entry], staged: Path) -> int:
    size = sum(entry.size for entry in entries)
    free = shutil.disk_usage(staged.parent).free
    if size > free:
        raise DraftpError(f"{staged.parent}: {size / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free")
    return size


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A place beside `output` under its own name, moved to it at the end; after an error nothing is left.

    Under its own name, because loaders go by the ending.
    """
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir(parents=True)
    try:
        yield aside / output.name
        if output.is_dir():
            shutil.rmtree(output)
        (aside / output.name).replace(output)
    finally:
        close_files()
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Any]:
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda amount: progress.advance(task, amount)

"""Merge LoRAs and full fine-tunings into a model, or into one LoRA, and hand over what passed its checks."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from draftcli import __version__
from draftcli.core.lora.files import Shapes
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import FAMILIES, Family, find_family
from draftcli.core.precision import DTYPES
from draftcli.errors import InputError
from draftcli.export.arguments import check_options
from draftcli.export.base import Base, family_shapes, open_base
from draftcli.export.card import merge_card, push_to_hub
from draftcli.export.formats import OUTPUT_FORMATS, MergeJob, OutputFormat
from draftcli.export.inputs import (
    MergeInput,
    base_loras_of,
    base_of,
    find_inputs,
    read_base_loras,
    read_changes,
    vae_of,
)
from draftcli.export.lineage import lineage_of_merge
from draftcli.export.other_vae import open_vae
from draftcli.export.report import REPORT, MergeReport, ReportedInput
from draftcli.export.tensors import Wrote, close_files
from draftcli.runs import disk_errors


@dataclass(frozen=True)
class MergeRequest:
    """What the command was asked for.

    Attributes:
        inputs: runs and LoRAs, each with =SCALE or without; none: the newest run.
        base: model to merge into; None: the run's.
        config: for a single-file base: folder with configuration and tokenizers.
        variant: which files of a base folder, such as fp16.
        vae: as `model.vae`, of a merged model; None: the runs'.
        format: the output's, a name in OUTPUT_FORMATS.
        scale: multiplies the scales of all inputs; finite and not 0.
        rank: for LoRA formats: at most this much in each layer.
        dtype: fp64, fp32, fp16, bf16; None: as they are.
        shard_size: of a diffusers folder's weight files, in bytes.
        output: file or folder; None: in the run's folder.
        overwrite: replace what merge-lora wrote there before.
        verify: how far the result is checked: keys, or forward as well.
        hub: repository to upload to.
        private: whether that is made private.
    """

    inputs: tuple[str, ...] = ()
    base: str | None = None
    config: str | None = None
    variant: str | None = None
    vae: str | None = None
    format: str = "diffusers"
    scale: float = 1.0
    rank: int | None = None
    dtype: str | None = None
    shard_size: int = 10**10
    output: Path | None = None
    overwrite: bool = False
    verify: str = "forward"
    hub: str | None = None
    private: bool = False

    def check(self) -> None:
        """Check the options, each by itself and with the others.

        Raises:
            InputError: one is not.
        """
        check_options(self.format, self.scale, self.dtype, self.verify)
        if self.rank is not None and not OUTPUT_FORMATS[self.format].is_lora:
            warnings.warn(f"--rank has no effect with --format {self.format}: a merged model has no rank", stacklevel=3)
        if self.vae is not None and OUTPUT_FORMATS[self.format].is_lora:
            warnings.warn(f"--vae has no effect with --format {self.format}: a LoRA has no VAE", stacklevel=3)


@dataclass
class MergeResult:
    """What was written.

    Attributes:
        artefact: the file or folder.
        report: the JSON that describes it.
        lines: the checks that it passed, for people.
        url: where it was uploaded to.
    """

    artefact: Path
    report: Path
    lines: list[str]
    url: str | None = None


def merge(request: MergeRequest, console: Console) -> MergeResult:
    """Merge what was asked for, write it in the format asked for, and check it; nothing is left where a check fails.

    Raises:
        InputError: an input, the base, the output or an option is wrong.
        DraftpError: the disk refuses, or the result fails its verification.
    """
    request.check()
    kind = OUTPUT_FORMATS[request.format]
    inputs = find_inputs(request.inputs)
    output = _output(request.output, kind, inputs)
    base, family, shapes = _base(request, kind, inputs)
    _check_output(output, request.overwrite, inputs, base)
    changes = read_changes(inputs, base, family, shapes, request.scale)
    needed = not kind.is_lora or changes.full or request.base is None
    read_base_loras(base_loras_of(inputs) if needed else (), changes, shapes, own_alone=kind.is_lora)
    merged = [ReportedInput(i.text, str(i.path), i.scale * request.scale) for i in inputs]
    report = MergeReport(__version__, output.stem, kind.name, family.name, base.name if base else None, merged)
    listed = ", ".join(f"{i.name} x {i.scale:g}" for i in merged)
    if base is not None and base.vae is not None:
        report.vae = base.vae.name
    decoder = f", VAE: {report.vae}" if report.vae else ""
    console.print(f"writing {kind.name} from {listed} (base: {report.origin}{decoder})")
    job = MergeJob(
        base,
        changes,
        shapes,
        lineage_of_merge(report.title, inputs, base, family, shapes),
        dtype=DTYPES[request.dtype] if request.dtype else None,
        rank=request.rank,
        shard_size=request.shard_size,
        progress=partial(_progress, console),
    )
    with disk_errors(output), _staged(output) as staged:
        result = kind(job)
        report.figures = result.write(staged)
        report.checks = [*changes.readings, *result.check_keys(staged)]
        if request.verify == "forward" and base is not None:
            close_files()  # mapped pages would count beside those of the loaded networks
            console.print("verifying with diffusers' own loader")
            report.verification = result.verify(staged)
            report.checks += [*(comparison.line() for comparison in report.verification), *result.also_verified]
        if staged.is_dir():
            (staged / REPORT).write_text(report.to_json(), encoding="utf-8")
            (staged / "README.md").write_text(merge_card(report, output.name), encoding="utf-8")
    written = output / REPORT if output.is_dir() else output.with_suffix(".merge.json")
    if not output.is_dir():
        with disk_errors(written):
            written.write_text(report.to_json(), encoding="utf-8")
    url = push_to_hub(output, request.hub, merge_card(report, request.hub), request.private) if request.hub else None
    return MergeResult(output, written, report.checks, url)


def _base(
    request: MergeRequest, kind: type[OutputFormat], inputs: Sequence[MergeInput]
) -> tuple[Base | None, Family, Shapes]:
    """The base, its family and the shapes of its weights. Formats that need no base can do with a family's shapes."""
    found = (request.base, request.config, request.variant) if request.base else base_of(inputs)
    if found is None:
        if kind.needs_base:
            raise InputError(f"--format {kind.name} needs the model to merge into: give --base MODEL")
        family, shapes = _family_of_inputs(inputs)
        if request.verify == "forward":
            warnings.warn(
                f"without --base only the keys are checked, against {family.short}'s configuration", stacklevel=3
            )
        return None, family, shapes
    pretrained, config, variant = found
    vae = None if kind.is_lora else (request.vae, request.variant) if request.vae else vae_of(inputs)
    elsewhere = ["vae"] if kind.is_lora or vae else []
    base = open_base(pretrained, request.config or config, request.variant or variant, elsewhere)
    if vae:
        base.take_vae(open_vae(*vae, base.location.config, base.family))
    if not request.base:
        _predicts_as_trained(base, inputs)
    return base, base.family, base.shapes()


def _family_of_inputs(inputs: Sequence[MergeInput]) -> tuple[Family, Shapes]:
    """The first family whose model the first LoRA fits, with the shapes of that model's weights; else SDXL, for which
    it is then refused.
    """
    for family in map(find_family, FAMILIES):
        shapes = family_shapes(family)
        with suppress(InputError), warnings.catch_warnings(action="ignore"):  # it is read again
            read_lora(inputs[0].path, shapes)
            return family, shapes
    return find_family(), family_shapes(find_family())


def _predicts_as_trained(base: Base, inputs: Sequence[MergeInput]) -> None:
    """A run may have been told what its model predicts, against the model's own files; the result predicts the same."""
    for model in (i.cfg.model for i in inputs if i.cfg):
        base.prediction = model.prediction_type or base.prediction
        if model.zero_terminal_snr is not None:
            base.zero_terminal_snr = model.zero_terminal_snr


def _output(asked: Path | None, kind: type[OutputFormat], inputs: Sequence[MergeInput]) -> Path:
    if asked is None:
        run = inputs[0].run if len(inputs) == 1 else None
        if run is None:
            return Path(f"{inputs[0].path.stem}-merged{kind.ending}")
        return run.folder / "export" / f"{run.folder.name}{kind.ending}"
    is_file = asked.suffix == ".safetensors"
    if kind.writes == "folder" and is_file:
        raise InputError(f"--output {asked}: --format {kind.name} writes a folder; leave out .safetensors")
    if kind.writes == "file" and not is_file:
        raise InputError(f"--output {asked}: --format {kind.name} writes one file; end it with .safetensors")
    return asked


def _check_output(output: Path, overwrite: bool, inputs: Sequence[MergeInput], base: Base | None) -> None:
    read = [i.path for i in inputs] + ([base.location.path, base.location.config] if base else [])
    read += base.vae.files.files if base and base.vae else []
    for path in read:
        if output.resolve() == path.resolve() or output.resolve() in path.resolve().parents:
            raise InputError(f"--output {output} is what is read ({path}); choose another")
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} exists; choose another --output, or replace it with --overwrite")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT).is_file():
        raise InputError(f"{output} was not written by merge-lora (it has no {REPORT}); remove it yourself")


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
def _progress(console: Console, total: int) -> Iterator[Wrote]:
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda amount: progress.advance(task, amount)

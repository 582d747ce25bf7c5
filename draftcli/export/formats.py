"""What merge-lora can write: one class a format, found in OUTPUT_FORMATS by the name that --format takes.

The attributes of a class say what the format is. An object of it is one result: it is written, its keys are checked,
and diffusers' own loader opens it again. A new format is a class here and its place in OUTPUT_FORMATS;
tests/export/test_formats.py then tries it without another line.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import Lora, Shapes
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import Family
from draftcli.core.models.weight_files import clean_key
from draftcli.errors import DraftpError, InputError, warn
from draftcli.export import verify
from draftcli.export.base import Base, ModelLocation
from draftcli.export.compress import Loss, combine, compress, extract
from draftcli.export.inputs import Changes
from draftcli.export.kohya import ignored_by_kohya, kohya_hashes, kohya_metadata, kohya_tensors
from draftcli.export.lineage import Lineage, modelspec
from draftcli.export.report import MergeFigures
from draftcli.export.tensors import PlannedTensor, Wrote
from draftcli.export.write import (
    DTYPE_NAMES,
    Merger,
    diffusers_metadata,
    diffusers_tensors,
    write_folder,
    write_lora,
    write_single_file,
    written_as,
)


@dataclass(frozen=True)
class MergeJob:
    """All that a format needs to know of a merge.

    Attributes:
        base: the model; None: there is none, only its shapes.
        changes: what is done to it.
        shapes: of the weights that a LoRA can change, by part and module.
        lineage: what is known of where the result comes from.
        dtype: to write in; None: as the tensors are.
        rank: for LoRAs: at most this much in each layer; None: as it is.
        shard_size: for folders: largest size of a file of weights, in bytes.
        progress: context in which progress is shown: progress(total) gives the function to call with what was done.
    """

    base: Base | None
    changes: Changes
    shapes: Shapes
    lineage: Lineage
    dtype: torch.dtype | None
    rank: int | None
    shard_size: int
    progress: Callable[[int], AbstractContextManager[Wrote]]

    @property
    def family(self) -> Family:
        """Of the model that the result is, or is for."""
        return self.lineage.family


class OutputFormat(ABC):
    """A format; made of a job, one result in that format.

    Attributes:
        name: as --format takes it.
        ending: of the default output, after its name.
        writes: a file, a folder, or (either) what the name of the output asks for.
        needs_base: whether it cannot be written without a model.
        is_lora: whether it is to be applied to a model, rather than a whole one.
        programs: for the card: what it is, and where programs look for it.
        opening: for the card: Python that opens it as `pipe`, {where} standing for its name as a literal. A LoRA's
            finds the model that it is for in `pipe` already.
    """

    name: ClassVar[str]
    ending: ClassVar[str]
    writes: ClassVar[Literal["file", "folder", "either"]]
    needs_base: ClassVar[bool]
    is_lora: ClassVar[bool]
    programs: ClassVar[str]
    opening: ClassVar[str]

    @abstractmethod
    def __init__(self, job: MergeJob) -> None: ...

    @property
    def also_verified(self) -> tuple[str, ...]:
        """Lines on what `verify` proves beside its comparisons."""
        return ()

    @abstractmethod
    def write(self, target: Path) -> MergeFigures:
        """Write it to `target`, which does not exist yet.

        Raises:
            InputError: the dtype cannot hold a value.
            DraftpError: there is too little space.
        """

    @abstractmethod
    def check_keys(self, target: Path) -> list[str]:
        """See that everything that was meant is in `target`, and nothing else; lines for people.

        Raises:
            DraftpError: it is not.
        """

    @abstractmethod
    def verify(self, target: Path) -> list[verify.Comparison]:
        """Load `target` with diffusers' own loader and compare outputs with base + adapter. Needs the base.

        Raises:
            DraftpError: it does not load, or differs by more than rounding.
        """


class ModelFormat(OutputFormat):
    """A whole model with the changes in its weights."""

    needs_base = True
    is_lora = False

    def __init__(self, job: MergeJob) -> None:
        assert job.base is not None, "needs_base"
        self.job, self.base = job, job.base
        self.merger = Merger(job.base, job.changes, job.dtype)

    @property
    def also_verified(self) -> tuple[str, ...]:
        """That of the VAE."""
        whose = f"that of model.vae {self.base.vae.name}" if self.base.vae else "the base's"
        return (f"vae: bit for bit {whose}, encoder included",)

    @abstractmethod
    def entries(self) -> Mapping[str, PlannedTensor]:
        """Every tensor of the result, by a name that `found` has as well."""

    @abstractmethod
    def found(self, target: Path) -> verify.Tensors:
        """What is in `target`."""

    @abstractmethod
    def stream(self, target: Path, wrote: Wrote) -> None:
        """Write it, tensor by tensor."""

    @abstractmethod
    def location(self, target: Path) -> ModelLocation:
        """`target` as a loader wants to know it."""

    def write(self, target: Path) -> MergeFigures:
        """Stream it where there is space for it."""
        size = sum(entry.size for entry in self.entries().values())
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise DraftpError(f"{target.parent}: {size / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are free")
        with self.job.progress(size) as wrote:
            self.stream(target, wrote)
        return MergeFigures(size, len(self.merger.written), self._rounding())

    def check_keys(self, target: Path) -> list[str]:
        """Each change found its tensor, and each tensor is there with its dtype and shape."""
        if missed := self.merger.touched - self.merger.written:
            raise DraftpError(f"{len(missed)} changes found no tensor, the first is {'.'.join(min(missed))}")
        expected = {key: (entry.dtype, entry.shape) for key, entry in self.entries().items()}
        counted, changed = verify.check_tensors(target, expected, self.found(target)), len(self.merger.written)
        kept = f"{len(expected) - changed} kept bit for bit"
        if self.job.dtype:
            kept = f"the others cast to {DTYPE_NAMES[self.job.dtype]} (VAE as it was)"
        lines = [f"weights: rounding to {n} is {part:.2g} of the change" for n, part in self._rounding().items()]
        return [f"keys: {counted}; {changed} of them changed, {kept}", *lines]

    def verify(self, target: Path) -> list[verify.Comparison]:
        """Every network but the VAE by its output, the VAE by its weights."""
        coarsest = max(self.merger.moved, key=lambda dtype: verify.TOLERANCE.get(dtype, 1.0))
        base, result = self.base, self.location(target)
        return verify.compare_model(base.location, self.job.changes, result, coarsest, base.vae)

    def _rounding(self) -> dict[str, float]:
        """By dtype written: the norm of what casting moved over the norm of the change."""
        return {
            DTYPE_NAMES.get(dtype, str(dtype)): (self.merger.rounded[dtype] / moved) ** 0.5 if moved else 0.0
            for dtype, moved in self.merger.moved.items()
        }


class DiffusersFolder(ModelFormat):
    """Configuration, tokenizers and weights by diffusers' names, in shards where they are large."""

    name = "diffusers"
    ending = "-diffusers"
    writes = "folder"
    programs = "A diffusers folder."
    opening = "pipe = {pipeline}.from_pretrained({where})"

    def entries(self) -> Mapping[str, PlannedTensor]:
        """By `part.key`, in our own naming of keys."""
        parts = ((part, entry) for part in self.job.family.networks for entry in self.merger.entries(part))
        return {f"{part}.{clean_key(part, entry.key)}": entry for part, entry in parts}

    def found(self, target: Path) -> verify.Tensors:
        """All its files of weights."""
        return verify.tensors_of_folder(target, self.job.family)

    def stream(self, target: Path, wrote: Wrote) -> None:
        """Shards, and everything but the weights copied from the base."""
        write_folder(self.merger, target, self.job.shard_size, wrote)

    def location(self, target: Path) -> ModelLocation:
        """The folder."""
        return ModelLocation(self.job.family, target, self.base.location.config, single_file=False)


class SingleFile(ModelFormat):
    """One checkpoint in the original layout."""

    name = "single-file"
    ending = ".safetensors"
    writes = "file"
    programs = (
        "One checkpoint in the original layout: `models/checkpoints` in ComfyUI, "
        "`models/Stable-diffusion` in A1111 and Forge."
    )
    opening = "pipe = {pipeline}.from_single_file({where})"

    def __init__(self, job: MergeJob) -> None:
        super().__init__(job)
        if self.base.prediction == "sample":
            raise InputError(
                f"--format single-file: {self.base.name} predicts the image (sample), and a single file has no mark "
                "that tells other programs so; use --format diffusers"
            )
        if self.base.vae:
            self.base.vae.check_single_file(self.base.name)

    def entries(self) -> Mapping[str, PlannedTensor]:
        """By their keys in the original layout."""
        return {entry.key: entry for entry in self.merger.original_entries()}

    def found(self, target: Path) -> verify.Tensors:
        """The file as it is."""
        return verify.tensors_of_file(target)

    def stream(self, target: Path, wrote: Wrote) -> None:
        """With modelspec metadata."""
        write_single_file(self.merger, target, self.job.lineage, wrote)

    def location(self, target: Path) -> ModelLocation:
        """The file, with the base's configuration."""
        return ModelLocation(self.job.family, target, self.base.location.config, single_file=True)


class LoraFormat(OutputFormat):
    """The changes as one LoRA; making one combines and compresses them."""

    needs_base = False
    is_lora = True
    opening = "pipe.load_lora_weights({where})"

    def __init__(self, job: MergeJob) -> None:
        self.job = job
        self.lora, self.loss = _one_lora(job)

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The LoRA by this format's names."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Text beside the tensors."""

    def hashes(self, entries: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """More of it, made of the tensors as they will stand in the file and of `metadata`."""
        return {}

    def file(self, target: Path) -> Path:
        """The LoRA's own file: `target`, or the one in it."""
        return target if target.suffix == ".safetensors" else target / LORA_FILE

    def write(self, target: Path) -> MergeFigures:
        """One file, made in memory: it is small."""
        write_lora(self.tensors(), self.file(target), self.job.dtype, self.metadata(), self.hashes)
        return MergeFigures(compression=self.loss)

    def check_keys(self, target: Path) -> list[str]:
        """Read it back and compare every layer's update."""
        wanted, loss = written_as(self.lora, self.job.dtype), self.loss
        lines = [f"keys: {verify.check_lora(self.file(target), wanted, self.job.shapes)}"]
        if loss is not None:
            error = f"error {loss.relative:.2%} of the update, at most {loss.worst:.2%} in {loss.layer}"
            lines.append(f"rank {self.job.rank}: {error if loss.relative else 'nothing is lost'}")
        if loss is not None and loss.left_out:
            lines.append(f"left out: {loss.left_out:.2%} of the change is in biases and norms, which no LoRA holds")
        return lines

    def verify(self, target: Path) -> list[verify.Comparison]:
        """Put it on the base, network after network."""
        assert self.job.base is not None, "there is nothing to put it on"
        dtype = self.job.dtype or next(update.up.dtype for _, _, update in self.lora.updates())
        return verify.compare_lora(self.job.base.location, self.lora, self.file(target), dtype)


class DiffusersLora(LoraFormat):
    """By diffusers' names."""

    name = "lora"
    ending = "-lora"
    writes = "either"
    programs = (
        "A LoRA by diffusers' names, for diffusers: ComfyUI applies only a part of it, without an error, Forge refuses "
        "it, and A1111 ignores it; for them take `--format kohya`."
    )

    def tensors(self) -> Mapping[str, Tensor]:
        """unet.….lora_A.weight and lora_B.weight; the scale is in B."""
        return diffusers_tensors(self.lora)

    def metadata(self) -> dict[str, str]:
        """peft's settings, as diffusers stores them."""
        return diffusers_metadata(self.lora)


class KohyaLora(LoraFormat):
    """By kohya's names."""

    name = "kohya"
    ending = "-kohya.safetensors"
    writes = "file"
    programs = "A LoRA by kohya's names: `models/loras` in ComfyUI, `models/Lora` in A1111 and Forge."

    def tensors(self) -> Mapping[str, Tensor]:
        """lora_unet_….lora_down.weight, lora_up.weight and alpha."""
        return kohya_tensors(self.lora, self.job.shapes["unet"], self.job.family)

    def metadata(self) -> dict[str, str]:
        """kohya's own, and modelspec's."""
        return kohya_metadata(self.lora, self.job.lineage) | modelspec(self.job.lineage, lora=True)

    def hashes(self, entries: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Those that programs know a LoRA by."""
        return kohya_hashes(entries, metadata)

    def write(self, target: Path) -> MergeFigures:
        """As every LoRA, with a warning of what some programs will not apply."""
        if (text := ignored_by_kohya(self.lora.parts)) is not None:
            warn(text)
        return super().write(target)


OUTPUT_FORMATS: dict[str, type[OutputFormat]] = {
    kind.name: kind for kind in (DiffusersFolder, SingleFile, DiffusersLora, KohyaLora)
}


def write_as_kohya(source: Path, target: Path, shapes: Shapes, lineage: Lineage) -> None:
    """Write a LoRA once more, by kohya's names, and check it as merge-lora checks its own.

    Args:
        source: its file.
        target: the new one.
        shapes: of the weights of the networks that it is for.
        lineage: for the metadata.

    Raises:
        InputError: it cannot be read, changes nothing, or changes a module that kohya's naming has no name for.
        DraftpError: what was written is not what was meant.
    """
    changes = Changes([read_lora(source, shapes)])
    job = MergeJob(None, changes, shapes, lineage, None, None, 0, lambda _: nullcontext(lambda _: None))
    lora = KohyaLora(job)
    lora.write(target)
    lora.check_keys(target)


def _one_lora(job: MergeJob) -> tuple[Lora, Loss | None]:
    """All changes as one LoRA, and what its rank lost; None: it keeps the rank that it has."""
    if job.changes.full:
        assert job.base is not None
        if job.rank is None:
            raise InputError("a run that trained the whole UNet has no rank; give the rank of the LoRA with --rank")
        with job.progress(len(job.base.tensors["unet"])) as wrote:
            return extract(job.changes, job.base, job.rank, lambda: wrote(1))
    lora = combine(job.changes.loras)
    return compress(lora, job.rank) if job.rank is not None else (lora, None)

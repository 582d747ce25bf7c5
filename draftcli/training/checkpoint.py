"""Checkpoints: written aside, checksummed, renamed when whole; read back exactly.

A checkpoint holds

    pytorch_lora_weights.safetensors, or unet/    the trained weights, as diffusers reads them
    training/*.safetensors                        the optimizer's moments and the moving average
    state.pt                                      step, schedule, loss scale, running statistics of the rewards, and
                                                  the latents that draftp.reuse keeps for later steps: small
    manifest.json                                 a checksum of every file

for any number of processes: another number of them reads the same, bit for bit. training/ is written by
torch.distributed.checkpoint, each process its own part of split weights, in the safetensors form of its Hugging Face
storage: its other form keeps an index that is a pickle. state.pt is read with weights_only=True. There is no random
state to keep: noise and prompts are functions of the seed and the image's number.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.ranks import Ranks, is_lost_connection
from draftcli.core.engine.sharding import split_like, whole
from draftcli.core.lora.adapters import load_lora_state_dict, lora_state_dict, save_lora
from draftcli.disk import beside, disk_errors, remove_folder, set_aside, write_aside
from draftcli.errors import DraftpError, first_line
from draftcli.runs import Run
from draftcli.training.step import Trainer

MANIFEST = "manifest.json"
FILE = 2**30  # bytes that one process writes to one file of training/, about


def save_weights(model: DRaFTPModel, folder: Path, write: bool = True) -> None:
    """Write what was trained as diffusers reads it: pytorch_lora_weights.safetensors, or unet/.

    Args:
        model: collective where its network is split over processes: each gives its parts.
        folder: where to.
        write: False in those processes that only give.
    """
    is_lora = model.cfg.peft.peft_scheme == "lora"
    weights: dict[str, Tensor] = {}
    for name, tensor in (lora_state_dict(model.unet) if is_lora else model.unet.state_dict()).items():
        gathered = whole(tensor)
        if write:
            # Safetensors takes no other layout, such as channels last.
            weights[name] = (gathered if gathered is tensor else gathered.cpu()).contiguous()
    if write and is_lora:
        save_lora(model.unet, folder, weights)
    elif write:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(model.unet.config))
        unet.load_state_dict(weights, assign=True)
        unet.save_pretrained(folder / "unet")


def load_weights(model: DRaFTPModel, folder: Path) -> None:
    """Read what `save_weights` wrote, in place and exactly."""
    if model.cfg.peft.peft_scheme == "lora":
        own, state = lora_state_dict(model.unet), load_file(folder / "pytorch_lora_weights.safetensors")
        named = {name.removeprefix("unet."): tensor for name, tensor in state.items()}
        split = {name: split_like(tensor, own[name]) if name in own else tensor for name, tensor in named.items()}
        load_lora_state_dict(model.unet, split)
        return
    own = model.unet.state_dict()
    for shard in sorted((folder / "unet").glob("*.safetensors")):
        state = {name: split_like(tensor, own[name]) for name, tensor in load_file(shard).items()}
        model.unet.load_state_dict(state, strict=False)
        own = {name: tensor for name, tensor in own.items() if name not in state}
    assert not own, f"{folder} lacks {next(iter(own))}"


def save_tensors(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Write large tensors (collective where some are split over processes).

    Raises:
        DraftpError: the disk refuses, in any of the processes.
    """
    if not tensors:
        return
    sizes = accumulate(tensor.nbytes for tensor in tensors.values())
    # A file is put together in memory before it is written.
    files = {name: 1 + size // (FILE * ranks.size) for name, size in zip(tensors, sizes, strict=True)}
    files = {name: 1 + sorted(set(files.values())).index(i) for name, i in files.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone: just so
            packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
            dcp.save(packed, storage_writer=writer, no_dist=ranks.size == 1)
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        who = f" by process {rank}" if ranks.size > 1 else ""
        raise DraftpError(f"{folder.parent}: cannot be written{who} ({cause})") from error


def load_tensors(folder: Path, pattern: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; each process reads what it needs.

    Args:
        folder: need not exist, when there was nothing to write.
        pattern: by name, a tensor with the split and the device that the one read gets. Where the shapes differ the one
            that was written was not split.
    """
    if not folder.is_dir():
        return {}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, stored in known.items():
        like, dtype = pattern(name), stored.properties.dtype
        alike = stored.size == like.shape
        tensors[name] = torch.zeros_like(like, dtype=dtype) if alike else like.new_zeros(stored.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def save_checkpoint(
    run: Run, step: int, trainer: Trainer, facts: dict[str, Any], keep: int, others: Collection[int] = ()
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`, and those of the steps `others`.

    Where the network is split over processes all of them call it, else the main one alone.

    Args:
        run: where to.
        step: the last finished one.
        trainer: what is saved.
        facts: what else state.pt holds.
        keep: how many checkpoints stay.
        others: the steps whose checkpoints stay whatever their age.

    Raises:
        DraftpError: the disk refuses; earlier checkpoints stay as they were.
    """
    target = run.step_folder(step)
    ranks = trainer.ranks if trainer.ranks.lockstep else Ranks()
    aside = beside(target)

    def finish(folder: Path) -> None:
        torch.save({"step": step, **trainer.state(), **facts}, folder / "state.pt")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
        (folder / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    with disk_errors(target):
        try:
            with ranks.all_or_none():
                if ranks.is_main:
                    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
                    aside.mkdir()
            save_weights(trainer.model, aside, write=ranks.is_main)
            save_tensors(trainer.tensors(), aside / "training", ranks)
            with ranks.all_or_none():
                if ranks.is_main:
                    write_aside(target, finish)
                    stay = {run.step_folder(other) for other in others}
                    for old in run.checkpoints()[keep:]:
                        if old not in stay:
                            remove_folder(old)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise DraftpError(f"{target}: cannot be written ({error})") from error
        except RuntimeError as error:  # and torch.save
            if is_lost_connection(error):
                raise
            raise DraftpError(f"{target}: cannot be written ({error})") from error
        finally:
            if ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)  # where it failed: a full disk gets its room back
    return target


def load_newest(run: Run, trainer: Trainer) -> tuple[dict[str, Any] | None, list[str]]:
    """Put the newest whole checkpoint into `trainer`, in every process the same.

    Returns:
        the rest of its state (None where there is no checkpoint), and a line for each damaged one that was passed over.

    Raises:
        DraftpError: there are checkpoints, and none is whole; or the newest whole one is of something else.
    """
    damaged: list[str] = []
    newest = None
    with trainer.ranks.all_or_none():
        found: list[tuple[Path, str]] = []
        for folder in run.checkpoints() if trainer.ranks.is_main else []:
            problem = _problem(folder)
            if problem is None:
                newest = folder
                break
            found.append((folder, problem))
        for folder, problem in found:
            # Under its name it would be the newest for every command, and push whole ones out.
            where = f"; it is {set_aside(folder)} now" if newest is not None else ""
            damaged.append(f"{folder} is damaged ({problem}) and is passed over{where}")
    newest, damaged = trainer.ranks.broadcast((newest, damaged))
    if newest is None and damaged:
        raise DraftpError(
            f"every checkpoint of {run.folder} is damaged, the newest: {damaged[0]}; put one back from a copy, remove "
            "them all to begin again, or take another --output"
        )
    if newest is None:
        return None, damaged
    return _load(newest, trainer), damaged


def load_step(run: Run, step: int, trainer: Trainer) -> None:
    """Put the checkpoint of `step` into `trainer`, in every process the same.

    Raises:
        DraftpError: it is damaged, or of something else.
    """
    folder = run.step_folder(step)
    with trainer.ranks.all_or_none():
        if trainer.ranks.is_main and (problem := _problem(folder)) is not None:
            raise DraftpError(f"{folder} is damaged ({problem}), and final/ was to be written from it")
    _load(folder, trainer)


def _load(folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a whole checkpoint into `trainer`; the rest of its state."""
    with _as_of_this_run(folder):
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        if type(state["step"]) is not int or not {"sha256", "count"} <= state["prompts"].keys():
            raise ValueError("state.pt lacks its step or its prompts")
        load_weights(trainer.model, folder)
        trainer.load_state(state, load_tensors(folder / "training", trainer.weight_of))
    return state


@contextmanager
def _as_of_this_run(folder: Path) -> Iterator[None]:
    """What fails because a checkpoint is of something else, although its checksums fit, becomes one line."""
    try:
        yield
    except (DraftpError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            raise
        raise DraftpError(
            f"{folder} is whole and yet no checkpoint of this run, or of another version ({type(error).__name__}: "
            f"{first_line(error)}); remove it to take the one before, or take another --output"
        ) from error


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return str(error)
    return None if "state.pt" in sums else f"{MANIFEST} does not name state.pt"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

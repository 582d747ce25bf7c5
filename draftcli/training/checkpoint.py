"""Checkpoints: written aside, checksummed, renamed when whole; read back exactly.

A checkpoint holds the trained weights in diffusers' format (a LoRA file, or the UNet's folder) and `state.pt`: step,
optimizer, schedule, loss scale, moving average and running statistics of the rewards, read with weights_only=True.
There is no random state to keep: noise and prompts are functions of the seed and the image's number.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from draftcli.core.adapters import load_lora_state_dict, save_lora
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.errors import DraftpError
from draftcli.runs import Run, disk_errors, write_aside

MANIFEST = "manifest.json"


def save_weights(model: SDXLDRaFTPModel, folder: Path) -> None:
    """Write what was trained as diffusers reads it: pytorch_lora_weights.safetensors, or unet/."""
    if model.cfg.peft.peft_scheme == "lora":
        save_lora(model.unet, folder)
    else:
        model.unet.save_pretrained(folder / "unet")


def load_weights(model: SDXLDRaFTPModel, folder: Path) -> None:
    """Read what `save_weights` wrote, in place and exactly."""
    if model.cfg.peft.peft_scheme == "lora":
        state = load_file(folder / "pytorch_lora_weights.safetensors")
        load_lora_state_dict(model.unet, {name.removeprefix("unet."): tensor for name, tensor in state.items()})
    else:
        shards = sorted((folder / "unet").glob("*.safetensors"))
        model.unet.load_state_dict({name: tensor for shard in shards for name, tensor in load_file(shard).items()})


def save_checkpoint(
    run: Run, step: int, model: SDXLDRaFTPModel, state: dict[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`, and that of step `best`.

    Raises:
        DraftpError: the disk refuses; earlier checkpoints stay as they were.
    """

    def write(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        folder.mkdir()
        save_weights(model, folder)
        torch.save({"step": step, **state}, folder / "state.pt")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
        (folder / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    target = run.step_folder(step)
    with disk_errors(target):
        try:
            write_aside(target, write)
        except (SafetensorError, RuntimeError) as error:  # how safetensors and torch.save report a full disk
            raise DraftpError(f"{target}: cannot be written ({error})") from error
        for old in run.checkpoints()[keep:]:
            if best is None or old != run.step_folder(best):
                shutil.rmtree(old)
    return target


def load_newest(run: Run, model: SDXLDRaFTPModel) -> tuple[dict[str, Any] | None, list[str]]:
    """Put the newest whole checkpoint's weights into `model`.

    Returns:
        its state (None where there is no checkpoint), and a line for each damaged one that was passed over.
    """
    damaged = []
    for folder in run.checkpoints():
        problem = _problem(folder)
        if problem is None:
            state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
            load_weights(model, folder)
            return state, damaged
        damaged.append(f"{folder} is damaged ({problem}) and is passed over")
    return None, damaged


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _checksum(folder / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

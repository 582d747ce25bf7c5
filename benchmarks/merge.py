"""Time and memory of `draftp merge-lora` at SDXL's real size: random weights, on the CPU.

    python benchmarks/merge.py FOLDER [--format single-file] [--verify keys]

Writes a diffusers folder with random float16 weights of SDXL's shapes (7 GB) and a LoRA of rank 32 on the attention and
feed-forward layers into FOLDER, merges in a process of its own, prints seconds and that process's peak memory, and
removes what it wrote. Needs 15 GB on the disk. Random weights have no picture to show, but every tensor its true size.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from draftcli.core.lora.adapters import DEFAULT_TARGETS
from draftcli.core.models.meta import PARTS, modules_on_meta
from draftcli.core.models.sdxl import SDXL_CONFIG
from draftcli.core.models.weight_files import WEIGHT_NAMES
from draftcli.export.formats import OUTPUT_FORMATS
from draftcli.export.tensors import PlannedTensor, write_safetensors

RANK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", default="single-file", choices=OUTPUT_FORMATS)
    parser.add_argument("--verify", default="keys")
    arguments = parser.parse_args()
    work = arguments.folder / "merge-benchmark"
    work.mkdir(parents=True)
    try:
        write_model(work / "base")
        write_lora(work / "lora.safetensors")
        output = work / f"merged{OUTPUT_FORMATS[arguments.format].ending}"
        command = [sys.executable, "-m", "draftcli", "merge-lora", work / "lora.safetensors", "--base", work / "base"]
        command += ["--format", arguments.format, "--verify", arguments.verify, "--output", output]
        began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        own = watch([*map(str, command)])
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"seconds: {time.perf_counter() - began:.0f}")
        print(f"processor seconds: {spent.ru_utime + spent.ru_stime - cpu.ru_utime - cpu.ru_stime:.0f}")
        print(f"peak memory: {own / 1e6:.2f} GB of its own, {spent.ru_maxrss / 1e6:.2f} GB with mapped file pages")
    finally:
        shutil.rmtree(work)


def watch(command: list[str]) -> int:
    """Run a command; the most kB it held at once besides pages of files, sampled ten times a second (Linux)."""
    most, process = 0, subprocess.Popen(command)
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
        most = max(most, int(found[1]) if found else 0)
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most


def write_model(folder: Path) -> None:
    """A diffusers folder, tensor by tensor, as the merge itself writes."""
    generator = torch.Generator().manual_seed(0)
    for part, module in modules_on_meta(SDXL_CONFIG).items():
        (folder / part).mkdir(parents=True)
        shutil.copyfile(SDXL_CONFIG / part / "config.json", folder / part / "config.json")
        entries = [
            PlannedTensor(key, torch.float16, tuple(t.shape), lambda shape=tuple(t.shape): normal(shape, generator))
            for key, t in module.state_dict().items()
        ]
        write_safetensors(folder / part / f"{WEIGHT_NAMES[part]}.safetensors", entries, {"format": "pt"})
    shutil.copyfile(SDXL_CONFIG / "model_index.json", folder / "model_index.json")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "EulerDiscreteScheduler"}), encoding="utf-8"
    )
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {*PARTS, "scheduler"}


def write_lora(file: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    ending = re.compile(rf"\.({'|'.join(map(re.escape, DEFAULT_TARGETS))})\.weight")
    tensors = {}
    for key, tensor in modules_on_meta(SDXL_CONFIG)["unet"].state_dict().items():
        if ending.search(key):
            stem, (out, width) = key.removesuffix(".weight"), tensor.shape
            tensors[f"unet.{stem}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) / RANK
            tensors[f"unet.{stem}.lora_B.weight"] = 0.02 * torch.randn(out, RANK, generator=generator)
    save_file(tensors, file)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (0.02 * torch.randn(shape, generator=generator)).half()


if __name__ == "__main__":
    main()

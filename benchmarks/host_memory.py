"""How much of the machine's memory each of several processes takes while a model is loaded and split over them.

    python benchmarks/host_memory.py [--processes 2]

A UNet of 331 MB (float32) between the toy's encoders and decoder is written in float32 and in float16, loaded and split
as a run with sharding.strategy fsdp does, and watched every 2 ms. `own` is memory of the process alone (RssAnon of
/proc/self/status), `mapped` are pages of files (RssFile), which all processes of a machine share. Both are what came
on top of the libraries. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch.multiprocessing import start_processes

from draftcli.config import Config, load_config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.ranks import open_ranks
from draftcli.core.models.loading import model_path

MB = 1e6
FULL = ["peft.peft_scheme=none"]
CASES = {
    "full, from float32": ("float32", [*FULL, "model.precision=fp32"]),
    "full, from float16": ("float16", [*FULL, "model.precision=bf16"]),
    "LoRA, float32 from float32": ("float32", ["model.precision=fp32"]),
    "LoRA, bfloat16 from float32": ("float32", ["model.precision=bf16"]),
}


def write_model(folder: Path) -> None:
    """The toy with a larger UNet, in both dtypes."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model_path("toy"), add_watermarker=False)
    settings = {**pipe.unet.config, "block_out_channels": (256, 512), "transformer_layers_per_block": 2}
    pipe.unet = UNet2DConditionModel.from_config(settings)
    for dtype in (torch.float32, torch.float16):
        pipe.to(dtype=dtype).save_pretrained(folder / str(dtype).removeprefix("torch."))


def resident() -> dict[str, float]:
    """Bytes of this process in memory: its own, and those of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    found = {words[0]: float(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}
    return {"own": found["RssAnon:"], "mapped": found["RssFile:"]}


class Watch:
    """`now` and `peak`, above what there was at the start."""

    def __init__(self) -> None:
        self.start = self.peak = resident()

    def now(self) -> dict[str, float]:
        """Above the start."""
        return {name: value - self.start[name] for name, value in resident().items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, `peak` is kept."""
        done = threading.Event()
        self.peak = self.now()

        def watch() -> None:
            while not done.wait(0.002):
                self.peak = {name: max(value, self.peak[name]) for name, value in self.now().items()}

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def config(folder: Path, case: str) -> Config:
    """The settings of a case."""
    dtype, settings = CASES[case]
    common = ["model.device=cpu", "sharding.strategy=fsdp", f"model.pretrained={folder / dtype}"]
    return load_config("toy", [*common, *settings])


def one_process(rank: int, processes: int, folder: Path, case: str, port: int) -> None:
    """Load and split; leave what was held."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open_ranks() as ranks:
        cfg = config(folder, case)
        SDXLDRaFTPModel(load_config("toy"))  # whatever is loaded once, is loaded now
        watch = Watch()
        with watch.watching():
            model = SDXLDRaFTPModel(cfg)
            loaded = watch.now()
            with ranks.all_or_none():
                pass
            model.configure_sharded_model()
        found = {"loaded": loaded, "peak": watch.peak}
        (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        with ranks.all_or_none():
            pass


def main() -> None:
    """Print the table of docs/sharding.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    names = [f"{who}, {when}" for who in ("process 0", "others") for when in ("loaded", "most")]
    print(f"| | {' | '.join([*names, 'mapped, most'])} |\n{'|---' * 6}|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        for i, case in enumerate(CASES):
            start_processes(one_process, (options.processes, folder, case, 29600 + i), options.processes)
            found = [
                json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(options.processes)
            ]
            first, others = found[:1], found[1:]
            columns = [(some, point, "own") for some in (first, others) for point in ("loaded", "peak")]
            columns.append((found, "peak", "mapped"))
            row = (f"{max(f[point][what] for f in some) / MB:.0f} MB" for some, point, what in columns)
            print(f"| {case} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

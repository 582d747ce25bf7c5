"""SDXL at its true shapes with random weights, by the real command lines, on a CPU: what toy-sized tests cannot show.

    make real-size        or, with another folder:        python benchmarks/real_size.py all FOLDER

It writes an SDXL (3.5 billion random numbers in bfloat16, the real CLIP vocabulary) and a PickScore of ViT-H's shapes
as folders that diffusers and transformers know; trains two steps at 64 x 96, killed after the first and resumed; draws
with `sample` and `anneal`; and exports every format with `--verify forward`. Each stage is a process whose seconds and
largest resident memory are written to FOLDER/results.json, beside what was seen; a stage that is done is not done
again, so an interrupted run goes on where it was. `python benchmarks/real_size.py table FOLDER` prints the results.

It needs 24 GiB of memory, 25 GB of disk and about an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZE = (64, 96)
PROMPT = "a large red circle on a white background"
GIB = 2**30


@dataclass
class Seen:
    """What one stage took, and what was seen.

    Attributes:
        command: as it was started, without the folder's path.
        seconds: from start to end.
        memory_gib: largest resident memory of the process.
        notes: facts by name.
    """

    command: str = ""
    seconds: float = 0.0
    memory_gib: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """A stage did not do what it should."""


def resident_gib(pid: int) -> float:
    """Resident memory of a process, pages of the weight files that it maps included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("VmRSS:"))


def run(folder: Path, *command: str, kill_when: Callable[[], bool] | None = None) -> Seen:
    """Run one `draftp` command in `folder` to its end, or until `kill_when`, and watch its memory.

    Raises:
        Failed: it ended otherwise than it should.
    """
    began, peak = time.monotonic(), 0.0
    print("$ draftp", *command, flush=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        print("\n$ draftp", *command, file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "draftcli", *command], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                peak = max(peak, resident_gib(process.pid))
                if kill_when and kill_when():
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.2)
        finally:
            process.kill()
    expected = -signal.SIGKILL if kill_when else 0
    if process.returncode != expected:
        raise Failed(f"draftp {command[0]} ended with {process.returncode}: see {folder / 'log.txt'}")
    return Seen(" ".join(("draftp", *command)), time.monotonic() - began, peak)


def settings(*more: str) -> list[str]:
    """The recipe's settings at this size, as --set."""
    values = [
        "model.pretrained=sdxl",
        "model.precision=bf16",
        "model.device=cpu",
        f"sampling.height={SIZE[0]}",
        f"sampling.width={SIZE[1]}",
        'data.validation_prompts=["a small blue star"]',
        "trainer.max_steps=2",
        "trainer.micro_batch_size=1",
        "trainer.global_batch_size=1",
        "trainer.val_check_interval=2",
        "trainer.save_interval=1",
        'rewards={"pickscore": {"pretrained": "pickscore"}}',
        "held_out_rewards={}",
        *more,
    ]
    return [part for value in values for part in ("--set", value)]


def write_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's tokenizer, from the vocabulary that open_clip_torch carries, as transformers stores it."""
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise Failed("the vocabulary is inside open_clip_torch: pip install --no-deps open_clip_torch")
    packed = (Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    # 256 bytes, each alone and at a word's end, 48,894 merges and two marks make CLIP's 49,408 tokens.
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    extra = [chr(256 + n) for n in range(256 - len(letters))]
    alphabet = [*map(chr, letters), *extra]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**marks, "pad_token": pad, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def make_models(folder: Path) -> Seen:
    """Write both models."""
    began = time.monotonic()
    import torch
    from diffusers import EulerDiscreteScheduler

    from draftcli.core.models.family import find_family
    from draftcli.rewards.registry import blank_reward

    def filled(module: Any) -> Any:
        """The module in bfloat16, with random weights whose outputs stay of the size of their inputs."""
        module = module.to(torch.bfloat16).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
            elif tensor.dim() < 2:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        return module

    family = find_family()
    target, staged = folder / "sdxl", folder / "sdxl.partial"
    for part in family.networks:
        config = json.loads((family.config_folder / part / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            network = family.build(part, config)
        filled(network).save_pretrained(staged / part)
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(staged / "scheduler")
    shutil.copy(family.config_folder / "model_index.json", staged)
    write_tokenizer(staged / "tokenizer", "<|endoftext|>")
    write_tokenizer(staged / "tokenizer_2", "!")
    clip: Any = blank_reward("pickscore")
    filled(clip.clip).save_pretrained(folder / "pickscore")
    write_tokenizer(folder / "pickscore", "<|endoftext|>")
    pixels = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "pickscore" / "preprocessor_config.json").write_text(
        json.dumps({**pixels, "image_processor_type": "CLIPImageProcessor"}), encoding="utf-8"
    )
    staged.rename(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Seen("make", time.monotonic() - began, notes={"model, GB": round(size / 1e9, 2)})


def plan(folder: Path) -> Seen:
    """What the plan foretells of the training below."""
    return run(folder, "train", *RECIPE, "--dry-run")


def train_killed(folder: Path) -> Seen:
    """Two steps, killed when the first is saved."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    saved = folder / "run" / "step-000001"
    return run(folder, "train", *RECIPE, "--output", "run", kill_when=saved.is_dir)


def train_resumed(folder: Path) -> Seen:
    """The same command again."""
    seen = run(folder, "train", *RECIPE, "--output", "run")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    steps = [line for line in map(json.loads, filter(None, lines)) if "loss" in line]
    if [line["step"] for line in steps] != [1, 2]:
        raise Failed(f"steps {[line['step'] for line in steps]} where 1 and 2 were expected")
    seen.notes = {f"step {line['step']}": {k: line[k] for k in ("seconds", "loss", "grad_norm")} for line in steps}
    return seen


def phases(folder: Path) -> Seen:
    """Seconds of one training step by phase, in this process."""
    import torch

    from benchmarks.meter import Meter, clock
    from draftcli.config import load_config
    from draftcli.core.batch import Batch
    from draftcli.core.draftp import SDXLDRaFTPModel
    from draftcli.rewards import get_reward_model

    os.chdir(folder)
    began = time.monotonic()
    cfg = load_config("sdxl-lora", [value for value in settings() if value != "--set"])
    model = SDXLDRaFTPModel(cfg)
    model.reward_model = get_reward_model(cfg)
    loaded, meter = time.monotonic() - began, Meter(clock(torch.device("cpu")))
    with model.watched(meter):
        model.get_loss_and_metrics(Batch([PROMPT], [0], SIZE))
    return Seen(
        "one step",
        time.monotonic() - began,
        resident_gib(os.getpid()),
        {"load": loaded, **{str(phase): seconds for phase, seconds in meter.totals.items()}},
    )


def sample(folder: Path) -> Seen:
    """Base beside tuned."""
    return run(folder, "sample", "run", "--prompt", PROMPT, "--base", "--output", "samples")


def anneal(folder: Path) -> Seen:
    """Annealed."""
    return run(folder, "anneal", "run", "--weight", "linear", "--prompt", PROMPT, "--output", "annealed")


def merge(output: str, format_name: str) -> Callable[[Path], Seen]:
    """Export in one format, verified by running the result."""

    def stage(folder: Path) -> Seen:
        switches = ("--format", format_name, "--output", output, "--overwrite", "--verify", "forward")
        return run(folder, "merge-lora", "run", *switches)

    return stage


RECIPE = ["--preset", "sdxl-lora", *settings()]
STAGES: dict[str, Callable[[Path], Seen]] = {
    "make": make_models,
    "plan": plan,
    "train, killed": train_killed,
    "train, resumed": train_resumed,
    "phases": phases,
    "sample": sample,
    "anneal": anneal,
    "merge kohya": merge("kohya.safetensors", "kohya"),
    "merge lora": merge("lora", "lora"),
    "merge single-file": merge("single.safetensors", "single-file"),
    "merge diffusers": merge("merged", "diffusers"),
}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| stage | seconds | memory, GiB | seen |", "|---|---|---|---|"]
    for name, seen in results.items():
        notes = ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in seen["notes"].items())
        rows.append(f"| {name} | {seen['seconds']:.0f} | {seen['memory_gib']:.1f} | {notes} |")
    return "\n".join(rows)


def main() -> int:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", "table", *STAGES], help="all, table, or one stage to do again")
    parser.add_argument("folder", type=Path, help="where models, run and results lie")
    asked = parser.parse_args()
    folder: Path = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, stage in STAGES.items():
        if asked.stage == name or (asked.stage == "all" and name not in results):
            try:
                seen = stage(folder)
            except Failed as error:
                print(f"real_size: {name}: {error}", file=sys.stderr)
                return 1
            results[name] = vars(seen)
            file.write_text(json.dumps(results, indent=1), encoding="utf-8")
            print(f"{name}: {seen.seconds:.0f} s, {seen.memory_gib:.1f} GiB, {seen.notes}", flush=True)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the toy world's weights: `python -m draftcli.toy.make_weights --output DIR`.

The stages, each saved when done and skipped when its result is already there: the autoencoder, SDXL (UNet and text
encoders), the learned reward, a second judge to be held out, and the LoRA that draws in 4 steps. What was run and
measured is written to DIR/provenance.json after every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline

from draftcli.toy import oracle
from draftcli.toy.train_four_steps import train_four_steps
from draftcli.toy.train_judge import train_judge
from draftcli.toy.train_reward import train_reward
from draftcli.toy.train_sdxl import GUIDANCE, SAMPLER_STEPS, draw_pictures, open_pipeline, train_sdxl
from draftcli.toy.train_vae import train_vae
from draftcli.toy.world import caption, held_out_scenes
from draftcli.umask import follow_umask

VAE_STEPS, SDXL_STEPS, REWARD_STEPS, FOUR_STEPS_STEPS = 3600, 690, 1000, 1200


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args(arguments)
    make_weights(options.output, options.seed, options.quick)


def make_weights(output: Path, seed: int = 0, quick: bool = False) -> None:
    """Train what is missing in `output`: `model/` (a diffusers folder), `reward/` and `judge/` (CLIPs), `toy-4step/` (a
    LoRA), `provenance.json`.
    """
    model, reward, judge, lora = (output / name for name in ("model", "reward", "judge", "toy-4step"))
    vae_steps, sdxl_steps, reward_steps = (3, 3, 3) if quick else (VAE_STEPS, SDXL_STEPS, REWARD_STEPS)
    small = {"pool": 32} if quick else {}
    _stage(output, "vae", model / "vae", seed, lambda: train_vae(model / "vae", seed, vae_steps, **small))
    _stage(output, "sdxl", model / "unet", seed, lambda: train_sdxl(model, seed, sdxl_steps, **small))
    _stage(output, "base", None, seed, lambda: measure_base(model, seed, 4 if quick else 480))
    few = {"families": 2, "batch": 2, "check": 8} if quick else {}
    _stage(output, "reward", reward / "model.safetensors", seed,
           lambda: train_reward(model, reward, seed, reward_steps, **few))  # fmt: skip
    _stage(output, "judge", judge / "model.safetensors", seed,
           lambda: {"seed": seed + 1, **train_judge(model, reward, judge, seed + 1, reward_steps, **few)})  # fmt: skip
    small = {"batch": 2, "walks": 4} if quick else {}
    _stage(output, "four_steps", lora, seed,
           lambda: train_four_steps(model, lora, seed, 3 if quick else FOUR_STEPS_STEPS, **small))  # fmt: skip
    _stage(output, "in_four_steps", None, seed, lambda: measure_four_steps(model, lora, seed, 4 if quick else 480))


def measure_base(model: Path, seed: int, count: int) -> dict[str, Any]:
    """How well the base follows held-out captions."""
    return _measure(open_pipeline(model), seed, count, SAMPLER_STEPS, GUIDANCE)


def measure_four_steps(model: Path, lora: Path, seed: int, count: int) -> dict[str, Any]:
    """The same in 4 steps: of the base without guidance and with it, and of the LoRA without it."""
    pipe = open_pipeline(model)
    found = {f"base, guidance {scale:g}": _measure(pipe, seed, count, 4, scale) for scale in (1.0, GUIDANCE)}
    pipe.load_lora_weights(str(lora))
    return found | {"lora": _measure(pipe, seed, count, 4, 1.0)}


def _measure(pipe: StableDiffusionXLPipeline, seed: int, count: int, steps: int, scale: float) -> dict[str, Any]:
    """How well pictures follow held-out captions, by the oracle: all attributes right, each one, the mean score."""
    prompts = ([caption(scene) for scene in held_out_scenes()] * 2)[:count]
    pictures = draw_pictures(pipe, prompts, seed, steps, scale)
    means = oracle.attributes(pictures, prompts).mean(0).tolist()
    return {
        "captions": count,
        "sampler_steps": steps,
        "guidance": scale,
        "all_right": float(oracle.correct(pictures, prompts).float().mean()),
        "oracle_score": float(oracle.oracle_score(pictures, prompts).mean()),
        "attributes": dict(zip(oracle.CRITERIA, means, strict=True)),
    }


def _stage(output: Path, name: str, result: Path | None, seed: int, run: Callable[[], dict[str, Any]]) -> None:
    path = output / "provenance.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name in record and (result is None or result.exists()):
        print(f"{name}: already there")
        return
    if result is not None and result.is_dir():
        shutil.rmtree(result)
    started = datetime.now(UTC)
    measured = run()
    follow_umask(output)
    measured["total_seconds"] = (datetime.now(UTC) - started).total_seconds()
    circumstances = _circumstances(seed)
    if record:  # a stage made later says what was otherwise then
        measured |= {key: value for key, value in circumstances.items() if record.get(key) != value}
    record |= ({} if record else circumstances) | {name: _rounded(measured), "megabytes": _rounded(_sizes(output))}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: {json.dumps(record[name])}", flush=True)


def _circumstances(seed: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": f"python -m draftcli.toy.make_weights --output DIR --seed {seed}",
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def _sizes(output: Path) -> dict[str, float]:
    weights = {str(p.parent.relative_to(output)): p.stat().st_size / 1e6 for p in output.rglob("*.safetensors")}
    return weights | {"all_files": sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) / 1e6}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()

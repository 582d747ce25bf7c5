"""Makes the runs in this folder; see README.md. Needs nothing of draftp but what its first version had."""

from __future__ import annotations

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from tests.command import draftp, recipe
from tests.tiny import make_sdxl

MODEL = Path("model")  # from where the command runs: config.yaml names it so
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"peft": {"rank": 2, "alpha": 3, "target_modules": ["to_q", "ff.net.2", "conv1"]}},
    "full": {"peft": {"peft_scheme": "none"}, "optim": {"lr": 5e-3}},
}
PROMPT = "a red cat"
LORA = "pytorch_lora_weights.safetensors"


def make_model(folder: Path = MODEL) -> Path:
    """The tests' tiny SDXL with a smaller UNet, so that little has to be kept; the same weights each time."""
    make_sdxl(folder)
    smaller = {
        "down_block_types": ("DownBlock2D",),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (4,),
        "norm_num_groups": 2,
        "attention_head_dim": 2,
    }
    config: Any = UNet2DConditionModel.load_config(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel.from_config({**config, **smaller})
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


def base_digest(part: str = "unet") -> str:
    """The sha256 of a network of the base, to see that it is the one that the runs began with."""
    (file,) = (MODEL / part).glob("*.safetensors")
    tensors = load_file(file)
    return sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def train(kind: str, steps: int) -> None:
    """Train, or take further, the run `kind` in the working directory."""
    rewards = {"tests.example_rewards:red": {"weight": 1.0, "normalise": "std"}, "tests.example_rewards:green": 0.2}
    preset = recipe(MODEL, Path(f"{kind}.yaml"), rewards=rewards, ema={"decay": 0.9}, **KINDS[kind])
    run("train", "--preset", preset, "--output", kind, "--set", f"trainer.max_steps={steps}")


def run(*arguments: object) -> None:
    """`draftp ARGUMENTS`, which has to work."""
    result = draftp(*arguments)
    assert result.code == 0, result.err


def main(folder: Path) -> None:
    """Write to `folder` the runs of two steps, and to expected/ what they draw and what two more steps give."""
    expected = folder / "expected"
    expected.mkdir()
    make_model()
    (expected / "base.json").write_text(json.dumps({"sha256 of the UNet's weights": base_digest()}) + "\n")
    for kind in KINDS:
        train(kind, steps=2)
        shutil.copytree(kind, folder / kind, ignore=shutil.ignore_patterns(".lock"))
        run("sample", kind, "--prompt", PROMPT, "--output", f"{kind}-pictures")
        (picture,) = Path(f"{kind}-pictures").glob("*-tuned.png")
        shutil.copy(picture, expected / f"{kind}.png")
        train(kind, steps=4)
        shutil.copy(Path(kind, "metrics.jsonl"), expected / f"{kind}.jsonl")
    shutil.copy(Path("lora", "final", LORA), expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

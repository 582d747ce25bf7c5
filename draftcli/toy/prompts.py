"""The toy's prompt files: `python -m draftcli.toy.prompts presets/prompts` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path

from draftcli.toy.world import caption, held_out_scenes, parse, training_scenes


def prompt_files() -> dict[str, list[str]]:
    """File names and their captions: 400 to train on, 64 held out and balanced."""
    return {
        "toy-train.txt": [caption(scene) for scene in training_scenes()[:400]],
        "toy-validation.txt": [caption(scene) for scene in held_out_scenes(64)],
    }


def reads(text: str) -> bool:
    """Whether the toy model was made for such a prompt: a caption of its grammar, or none at all."""
    return not text.strip() or parse(text) is not None


if __name__ == "__main__":
    for name, captions in prompt_files().items():
        (Path(sys.argv[1]) / name).write_text("\n".join(captions) + "\n", encoding="utf-8")

"""The model card of what was merged: what it is, how it opens, what was checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

OPENING = {
    "diffusers": 'pipe = StableDiffusionXLPipeline.from_pretrained("{where}")',
    "single-file": 'pipe = StableDiffusionXLPipeline.from_single_file("{where}")',
    "lora": 'pipe = StableDiffusionXLPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{where}")',
    "kohya": 'pipe = StableDiffusionXLPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{where}")',
}
PROGRAMS = {
    "diffusers": "A diffusers folder.",
    "single-file": "One checkpoint in the original layout: `models/checkpoints` in ComfyUI, "
    "`models/Stable-diffusion` in A1111 and Forge.",
    "lora": "A LoRA by diffusers' names.",
    "kohya": "A LoRA by kohya's names: `models/loras` in ComfyUI, `models/Lora` in A1111 and Forge.",
}


def merge_card(report: Mapping[str, Any], where: str) -> str:
    """Markdown with the Hub's YAML head.

    Args:
        report: as written beside the artefact.
        where: file or folder name that the loading example uses.
    """
    base, kind = str(report["base"]), str(report["format"])
    tags = ["stable-diffusion-xl", "text-to-image", *(["lora"] if kind in ("lora", "kohya") else [])]
    head = {"base_model": base, "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    inputs = [f"- {item['name']} (scale {item['scale']:g})" for item in report["inputs"]]
    checks = [f"- {line}" for line in report["checks"]]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "",
            f"# {report['title']}",
            "",
            f"{PROGRAMS[kind]} Made by draftp {report['draftp']} from {base} and:",
            "",
            *inputs,
            "",
            "```python",
            "from diffusers import StableDiffusionXLPipeline",
            "",
            OPENING[kind].format(where=where, base=base),
            "```",
            "",
            "Checked when it was written:",
            "",
            *checks,
            "",
        ]
    )


def push_to_hub(artefact: Any, repository: str, card: str, private: bool) -> str:
    """Upload a file or folder with its card; returns the address.

    Raises:
        DraftpError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    from draftcli.errors import DraftpError, first_line

    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        if artefact.is_dir():
            api.upload_folder(repo_id=repository, folder_path=artefact)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=artefact, path_in_repo=artefact.name)
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:
        raise DraftpError(
            f"{artefact} is written, but was not uploaded to {repository}: {first_line(error)}; "
            "log in with `hf auth login`, or upload it by hand"
        ) from error
    return url

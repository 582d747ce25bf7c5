"""The model card of what was merged: what it is, how it opens, what was checked; and its way to the hub."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import yaml

from draftcli.core.models.family import Family, find_family
from draftcli.core.models.places import BUILT_IN, card_base
from draftcli.errors import DraftpError, first_line
from draftcli.export.formats import OUTPUT_FORMATS
from draftcli.export.report import MergeReport


def merge_card(report: MergeReport, where: str) -> str:
    """Markdown with the Hub's YAML head.

    Args:
        report: of the merge.
        where: file or folder name that the loading example uses.
    """
    kind = OUTPUT_FORMATS[report.format]
    family = find_family(report.family)
    tags = [family.tag, "text-to-image", *(["lora"] if kind.is_lora else [])]
    base = report.base or family.hub_base
    head = {
        **card_base(base, is_lora=kind.is_lora),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": tags,
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "",
            f"# {report.title}",
            "",
            f"{kind.programs} Made by draftp {report.draftp} from {report.origin} and:",
            "",
            *(f"- {item.name} (scale {item.scale:g})" for item in report.inputs),
            *([f"- {report.vae} (the VAE, in the place of the base's own)"] if report.vae else []),
            "",
            "```python",
            opening(report.format, where, base, family),
            "```",
            "",
            "Checked when it was written:",
            "",
            *(f"- {line}" for line in report.checks),
            "",
        ]
    )


def opening(kind: str, where: str, base: str, family: Family) -> str:
    """Python that opens the result as `pipe` of diffusers.

    Args:
        kind: a name in OUTPUT_FORMATS.
        where: the result: path, or repository on the hub.
        base: the model that a LoRA is put on: folder, hub id, single file, or a built-in name.
        family: of that model.
    """
    pipeline = family.pipeline
    lines = [
        f"from diffusers import {pipeline}",
        "",
        OUTPUT_FORMATS[kind].opening.format(where=json.dumps(where, ensure_ascii=False), pipeline=pipeline),
    ]
    if OUTPUT_FORMATS[kind].is_lora and base in BUILT_IN:
        lines.insert(1, "from draftcli.core.models.loading import model_path")
        lines.insert(3, f'pipe = {pipeline}.from_pretrained(model_path("{base}"))')
    elif OUTPUT_FORMATS[kind].is_lora:
        loader = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
        lines.insert(2, f"pipe = {pipeline}.{loader}({json.dumps(base, ensure_ascii=False)})")
    return "\n".join(lines)


def push_to_hub(artefact: Path, repository: str, card: str, private: bool) -> str:
    """Upload a file or folder with its card; returns the address.

    Raises:
        DraftpError: the hub refuses, or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        if artefact.is_dir():
            api.upload_folder(repo_id=repository, folder_path=artefact)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=artefact, path_in_repo=artefact.name)
        api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except Exception as error:  # no rights, no such user, no network: the hub's client has many types of errors
        raise DraftpError(
            f"{artefact} is written, but was not uploaded to {repository}: {first_line(error)}; "
            "log in with `hf auth login`, or upload it by hand"
        ) from error
    return url

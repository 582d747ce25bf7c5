"""The model card of what was merged: what it is, how it opens, what was checked; and its way to the hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import yaml

from draftcli.errors import DraftpError, first_line
from draftcli.export.formats import FORMATS
from draftcli.export.report import MergeReport


def merge_card(report: MergeReport, where: str) -> str:
    """Markdown with the Hub's YAML head.

    Args:
        report: of the merge.
        where: file or folder name that the loading example uses.
    """
    kind = FORMATS[report.format]
    tags = ["stable-diffusion-xl", "text-to-image", *(["lora"] if kind.is_lora else [])]
    head = {"base_model": report.base, "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "",
            f"# {report.title}",
            "",
            f"{kind.programs} Made by draftp {report.draftp} from {report.base} and:",
            "",
            *(f"- {item.name} (scale {item.scale:g})" for item in report.inputs),
            "",
            "```python",
            "from diffusers import StableDiffusionXLPipeline",
            "",
            kind.opening.format(where=where, base=report.base),
            "```",
            "",
            "Checked when it was written:",
            "",
            *(f"- {line}" for line in report.checks),
            "",
        ]
    )


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

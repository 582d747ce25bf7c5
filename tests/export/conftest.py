"""What the tests of merging share: a run on the tiny SDXL, and the same model as a single file."""

from pathlib import Path

import pytest

from tests.command import draftp, recipe
from tests.tiny import write_single_file


@pytest.fixture(scope="session")
def single_file(tiny_sdxl, tmp_path_factory) -> Path:
    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("export") / "tiny.safetensors")


@pytest.fixture(scope="session")
def run(tiny_sdxl, tmp_path_factory) -> Path:
    """A run of four steps with a LoRA of rank 2. Read it; write into copies and --output."""
    return trained(tiny_sdxl, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def full_run(tiny_sdxl, tmp_path_factory) -> Path:
    """A run of four steps that trained the whole UNet."""
    return trained(tiny_sdxl, tmp_path_factory.mktemp("full"), peft={"peft_scheme": "none"})


def trained(base: Path, folder: Path, *options: str, **sections) -> Path:
    preset = recipe(base, folder / "tiny.yaml", optim={"lr": 3e-3}, **sections)
    result = draftp("train", "--preset", preset, "--output", folder / "run", "--quiet", *options)
    assert result.code == 0, result.err
    return folder / "run"

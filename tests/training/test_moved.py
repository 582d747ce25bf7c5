"""A run goes on where its files were moved, and is refused where they are others: what they say is compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcli.contents import WHOLE, fingerprints
from tests.command import Result, draftp, recipe

REWARD = "moved:Scaled"
CODE = """
import json, pathlib

class Scaled:
    name = "scaled"
    def __init__(self, pretrained):
        self.scale = json.loads(pathlib.Path(pretrained, "scale.json").read_text())
    def __call__(self, images, prompts):
        return self.scale * (images[:, 0] - images[:, 1]).mean((1, 2))
"""


def settings(root: Path) -> list[str]:
    return [
        f"model.pretrained={root}/base", f"model.vae={root}/base/vae", f"data.prompts={root}/prompts.txt",
        f"data.validation_prompts={root}/held_out.txt", f"rewards.{REWARD}.pretrained={root}/reward",
    ]  # fmt: skip


def train(root: Path, steps: int, *more: str) -> Result:
    options = [
        text for setting in (*settings(root), f"trainer.max_steps={steps}", *more) for text in ("--set", setting)
    ]
    return draftp("train", "--preset", "tiny.yaml", "--output", "run", *options)


@pytest.fixture(scope="module")
def begun_once(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of two steps in run/, whose files are in first/."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        _begin(tiny_sdxl)
        yield folder


@pytest.fixture
def begun(begun_once: Path) -> Path:
    """The same in the working directory; the path of the run's files."""
    shutil.copytree(begun_once, Path(), dirs_exist_ok=True)
    return Path("first")


def _begin(tiny_sdxl: Path) -> None:
    Path("moved.py").write_text(CODE)
    first = Path("first")
    shutil.copytree(tiny_sdxl, first / "base")
    (first / "reward").mkdir()
    (first / "reward/scale.json").write_text("2.0")
    (first / "prompts.txt").write_text("a red cat\na blue dog\n")
    (first / "held_out.txt").write_text("a green bird\n")
    preset = recipe(tiny_sdxl, rewards={REWARD: 1.0}, trainer={"save_interval": 1, "val_check_interval": 0})
    preset.write_text(preset.read_text().replace("  tests.example_rewards:red: 1.0\n", ""))
    result = train(first, 2)
    assert result.code == 0, result.err


def weights(run: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "final/pytorch_lora_weights.safetensors")


def test_a_run_goes_on_bit_for_bit_where_everything_was_moved(begun: Path) -> None:
    shutil.copytree("run", "stays")
    assert train(begun, 4).code == 0
    expected = weights()
    shutil.rmtree("run")
    Path("stays").rename("run")
    begun.rename("second")
    result = train(Path("second"), 4)
    assert result.code == 0, result.err
    for key in settings(begun):
        name = key.partition("=")[0]
        assert f"changed since the last session: {name} was" in result.out
    assert result.out.count("the same files") == len(settings(begun))
    assert weights().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights().items())
    assert train(Path("second"), 4).code == 0, "and again, without a word"


@pytest.mark.parametrize("what", ["base", "prompts.txt", "held_out.txt", "reward"])
def test_one_file_may_move_alone(begun: Path, what: str) -> None:
    Path("elsewhere").mkdir()
    (begun / what).rename(f"elsewhere/{what}")
    moved = [s.replace("first/", "elsewhere/") for s in settings(begun) if f"first/{what}" in s]
    result = train(begun, 3, *moved)
    assert result.code == 0, result.err
    assert result.out.count("the same files") == len(moved)


def other_weights(root: Path) -> None:
    path = root / "base/unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, path, metadata={"format": "pt"})


EDITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (other_weights, "model.pretrained {0} unet/diffusion_pytorch_model.safetensors is another"),
    "vae": (
        lambda root: (root / "base/vae/config.json").write_text((root / "base/vae/config.json").read_text() + " "),
        "model.vae {0} config.json is another",
    ),
    "reward": (
        lambda root: (root / "reward/scale.json").write_text("3.0"),
        f"rewards.{REWARD}.pretrained {{0}} scale.json is another",
    ),
    "missing": (
        lambda root: (root / "base/scheduler/scheduler_config.json").unlink(),
        "model.pretrained {0} scheduler/scheduler_config.json is not there",
    ),
}


@pytest.mark.parametrize("where", ["in place", "moved"])
@pytest.mark.parametrize("edit", EDITS)
def test_other_files_are_another_run(begun: Path, edit: str, where: str) -> None:
    change, words = EDITS[edit]
    root = begun
    if where == "moved":
        root = begun.rename("second")
    change(root)
    result = train(root, 3)
    assert result.code == 2
    key, _, what = words.partition(" {0} ")
    said = f"{key} is as it was, but {what}" if where == "in place" else f", where {what}"
    assert said in result.err
    assert len(result.err.splitlines()) == 1


def test_prompts_that_were_edited_in_place_are_said_and_moved_ones_must_be_the_same(begun: Path) -> None:
    (begun / "prompts.txt").write_text("a red cat\na blue dog\na fox\n")
    result = train(begun, 3)
    assert result.code == 0
    assert "has changed since this run started: it had 2 prompts and now has 3" in result.err
    (begun / "other.txt").write_text("an owl\n")
    result = train(begun, 4, f"data.prompts={begun}/other.txt")
    assert result.code == 2
    assert "data.prompts was 'first/prompts.txt', is 'first/other.txt', where the file is another" in result.err


def test_files_that_came_since_do_not_matter(begun: Path) -> None:
    (begun / "base/NOTES.md").write_text("downloaded again")
    assert train(begun, 3).code == 0


@pytest.mark.parametrize("text", [None, "", "[]", '{"model.pretrained": 3}'])
def test_a_run_without_hashes_goes_by_its_paths(begun: Path, text: str | None) -> None:
    Path("run/contents.json").unlink()
    if text is not None:
        Path("run/contents.json").write_text(text)
    shutil.copytree(begun, "second")
    refused = train(Path("second"), 3)
    assert refused.code == 2
    assert "was started with other settings" in refused.err
    assert train(begun, 3).code == 0
    assert "model.pretrained" in json.loads(Path("run/contents.json").read_text()), "from now on it has them"


@pytest.mark.parametrize("command", ["sample", "eval", "merge-lora"])
def test_a_moved_run_draws_and_merges_with_its_base_given_anew(begun: Path, command: str) -> None:
    second = begun.rename("second")
    base = ["--set", f"model.pretrained={second}/base", "--set", f"model.vae={second}/base/vae"]
    arguments = {
        "sample": ["--prompt", "a fox", *base],
        "eval": [
            *("--prompts", f"{second}/held_out.txt", "--num-images", 1, "--features", "toy", *base),
            *("--set", f"rewards.{REWARD}.pretrained={second}/reward"),
        ],
        "merge-lora": [
            "--base",
            f"{second}/base",
            "--vae",
            f"{second}/base/vae",
            "--format",
            "diffusers",
            "--output",
            "merged",
        ],
    }[command]
    result = draftp(command, "run", *arguments)
    assert result.code == 0, result.err


def test_large_files_are_known_by_their_size_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(WHOLE + 1000)
    plain = fingerprints(path)
    for place in (0, WHOLE // 2, WHOLE + 999):
        with path.open("r+b") as file:
            file.seek(place // 65536 * 65536 if place < WHOLE else place)
            file.write(b"x" * (2**19 if place < WHOLE else 1))
        assert fingerprints(path) != plain
        plain = fingerprints(path)
    with path.open("ab") as file:
        file.write(b"\0")
    assert fingerprints(path) != plain

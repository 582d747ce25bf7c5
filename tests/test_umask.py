"""Files that other people of a machine may read: every file and folder has the mode that the umask gives it."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from draftcli.disk import write_aside
from draftcli.umask import follow_umask
from tests.command import WITH_VALIDATION, draftp, recipe

UMASKS = {0o022: (0o644, 0o755), 0o002: (0o664, 0o775), 0o077: (0o600, 0o700)}  # modes of files and of folders


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check_modes(umask, *folders):
    """Look at everything in `folders`; how many files that were."""
    modes = {p: stat.S_IMODE(p.stat().st_mode) for folder in map(Path, folders) for p in (folder, *folder.rglob("*"))}
    files, folders = UMASKS[umask]
    assert {
        f"{path}: {mode:o}" for path, mode in modes.items() if mode != (folders if path.is_dir() else files)
    } == set()
    return sum(path.is_file() for path in modes)


@pytest.mark.parametrize("scheme", ["lora", "none"])
def test_a_run_its_cache_and_its_pictures(tiny_sdxl, umask, scheme):
    sections = {"sharding": {"prompt_cache": "cache"}, "ema": {"decay": 0.9}, "data": WITH_VALIDATION}
    trainer = {"max_steps": 1, "val_check_interval": 1, "save_interval": 1}
    preset = recipe(tiny_sdxl, peft={"peft_scheme": scheme}, trainer=trainer, **sections)
    assert draftp("train", "--preset", preset, "--output", "run").code == 0
    assert draftp("anneal", "run", "--weight", "linear", "--format", "webp").code == 0
    assert check_modes(umask, "run", "cache") > 20
    weights = {path.name for path in Path().rglob("*.safetensors")}
    assert {"base.safetensors"} < weights
    assert len(list(Path("cache").iterdir())) > 3
    assert not list(Path().rglob(".*.partial"))


@pytest.mark.parametrize("form", ["diffusers", "single-file", "lora", "kohya"])
def test_what_is_merged(lora_run, umask, form):
    output = Path("out", "merged" if form in ("diffusers", "lora") else "merged.safetensors")
    size = ("--max-shard-gb", "0.001") if form == "diffusers" else ()
    assert draftp("merge-lora", lora_run, "--format", form, "--verify", "keys", *size, "--output", output).code == 0
    assert check_modes(umask, "out") > 1


def test_a_base_that_may_only_be_read_is_merged_into_files_that_may_be_written(lora_run, tiny_sdxl, umask):
    shutil.copytree(tiny_sdxl, "base")
    for path in Path("base").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    merged = draftp("merge-lora", lora_run, "--base", "base", "--verify", "keys", "--output", "out/merged")
    assert merged.code == 0, merged.err
    check_modes(umask, "out")


def test_only_the_new_file_is_changed(umask):
    save_file({"a": torch.ones(1)}, "new.safetensors")
    Path("mine").touch(0o600)
    follow_umask(Path("new.safetensors"))
    assert stat.S_IMODE(Path("new.safetensors").stat().st_mode) == UMASKS[umask][0]
    assert stat.S_IMODE(Path("mine").stat().st_mode) == 0o600


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EROFS, errno.EINVAL], ids=errno.errorcode.get)
def test_a_drive_that_knows_no_modes_takes_files(monkeypatch, code):
    """As network shares, exFAT and mounts of cloud storage answer."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "chmod", refuse)
    write_aside(Path("x.safetensors"), lambda path: save_file({"a": torch.ones(1)}, path))
    write_aside(Path("folder"), lambda path: (path.mkdir(), save_file({"a": torch.ones(1)}, path / "x.safetensors")))
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["folder", "folder/x.safetensors", "x.safetensors"]

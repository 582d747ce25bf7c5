"""What `draftp merge-lora` refuses, warns about, and leaves as it was."""

import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcli.export import write
from tests.export.merging import QUERY, equal, merge, refused, weights


def test_damage_on_the_way_is_noticed_and_nothing_is_handed_over(run):
    honest = write.cast

    def careless(tensor, dtype, name):
        return honest(tensor * (1.5 if name.endswith(f"{QUERY}.weight") else 1), dtype, name)

    with mock.patch.object(write, "cast", careless):
        refused(run, "--output", "x", words=["verification failed", "unet"], code=1)
    assert not Path("x").exists()


def test_an_interruption_leaves_nothing_and_what_was_there_stays(run):
    merge(run, "--output", "x", "--verify", "keys")
    before = weights(Path("x"))
    with mock.patch.object(write, "cast", side_effect=KeyboardInterrupt):
        merge(run, "--output", "x", "--overwrite", code=130)
    after = weights(Path("x"))
    assert all(equal(before[key], after[key]) for key in before)


def test_existing_output_is_kept_without_overwrite_and_foreign_folders_always(run):
    merge(run, "--output", "x", "--verify", "keys")
    refused(run, "--output", "x", words=["x exists", "--overwrite"])
    merge(run, "--output", "x", "--overwrite", "--verify", "keys")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("all of it")
    refused(run, "--output", "mine", "--overwrite", words=["was not written by merge-lora"])
    assert Path("mine/thesis.txt").exists()


def test_output_may_not_be_what_is_read(run, tiny_sdxl):
    copy = shutil.copytree(tiny_sdxl, "base")
    for output in (copy, "."):
        refused(run, "--base", copy, "--output", output, "--overwrite", words=["is what is read"])


def test_no_space(run):
    usage = shutil.disk_usage(".")._replace(free=1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        refused(run, "--output", "x", words=["GB are needed", "GB are free"], code=1)


def test_a_disk_that_refuses_in_the_middle(run):
    """The limit on file sizes is how a process can meet a full disk on a machine that has space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(run, "--output", "x", words=["cannot be written"], code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gguf"], ["--format gguf", "diffusers, single-file, lora, kohya"]),
        (["--dtype", "int8"], ["--dtype int8", "fp16"]),
        (["--verify", "hope"], ["--verify hope", "forward"]),
        (["--scale", "0"], ["--scale 0", "change nothing"]),
        (["--format", "kohya", "--output", "folder"], [".safetensors"]),
        (["--output", "x.safetensors"], ["writes a folder"]),
        (["--base", "nowhere/at/all"], ["--base 'nowhere/at/all'"]),
        (["--base", "nowhere.safetensors"], ["no such file"]),
    ],
)
def test_options_that_cannot_be(run, arguments, words):
    refused(run, *arguments, words=words)


def test_inputs_that_cannot_be(run, tiny_sdxl, single_file):
    refused(words=["no run under runs/", "draftp train"])
    refused("nowhere.safetensors", words=["nowhere.safetensors"])
    refused("a.safetensors=much", words=["PATH=SCALE"])
    refused(f"{run}=0", words=["scale 0"])
    refused(run / "final" / "pytorch_lora_weights.safetensors", words=["--base MODEL"])
    refused(single_file, "--base", tiny_sdxl, words=["not a LoRA"])
    refused(run, "--base", "toy", "--verify", "keys", words=["another model"])
    refused(run, "--base", single_file, words=["--config"])
    Path("empty").mkdir()
    shutil.copy(run / "config.yaml", "empty")
    refused("empty", words=["no weights yet"])


@pytest.mark.filterwarnings("default::UserWarning")
def test_without_a_base_a_lora_of_sdxl_is_converted_and_others_are_refused(run):
    refused(run / "final", "--format", "kohya", "--base", "toy", "--output", "x.safetensors", words=["another model"])
    lora = {f"unet.{QUERY}.lora_A.weight": torch.ones(1, 640), f"unet.{QUERY}.lora_B.weight": torch.ones(640, 1)}
    save_file(lora, "sdxl.safetensors")
    assert (
        "only the keys are checked" in merge("sdxl.safetensors", "--format", "kohya", "--output", "x.safetensors").err
    )
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in load_file("x.safetensors")


@pytest.mark.filterwarnings("default::UserWarning")
def test_rank_without_effect_is_warned_about(run):
    assert "--rank has no effect" in merge(run, "--rank", 4, "--output", "x", "--verify", "keys").err


@pytest.mark.filterwarnings("default::UserWarning")
def test_an_unfinished_run_gives_its_newest_checkpoint_and_a_checkpoint_can_be_named(run):
    copy = Path(shutil.copytree(run, "runs/stopped"))
    shutil.rmtree(copy / "final")
    assert "taking runs/stopped/step-000004" in merge("--output", "x", "--verify", "keys").err
    merge(copy / "step-000002", "--output", "y", "--verify", "keys")
    assert any(not equal(a, b) for a, b in zip(weights(Path("x")).values(), weights(Path("y")).values(), strict=True))

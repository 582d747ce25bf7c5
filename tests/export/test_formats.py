"""Every output format of the registry, by the same table: a new one is tried as soon as it is in OUTPUT_FORMATS."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.models.family import find_family
from draftcli.core.models.sdxl import SDXL_BASE
from draftcli.export.arguments import FORMAT_NAMES
from draftcli.export.base import open_base
from draftcli.export.card import merge_card, opening
from draftcli.export.formats import OUTPUT_FORMATS
from draftcli.export.report import MergeReport
from tests.command import draftp
from tests.core.test_lora_files import ask

every_format = pytest.mark.parametrize("name", OUTPUT_FORMATS)
LEFT_OUT, SCALED = "left out", "scaled"


def output_of(name):
    return Path("out" if OUTPUT_FORMATS[name].writes == "folder" else "out.safetensors")


def merge(run, name, *arguments):
    return draftp("merge-lora", run, "--format", name, "--output", output_of(name), *arguments)


def weight_files(path):
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def test_the_command_line_knows_every_format():
    assert tuple(OUTPUT_FORMATS) == FORMAT_NAMES


@every_format
def test_says_what_it_is(name):
    kind = OUTPUT_FORMATS[name]
    assert kind.name == name
    assert kind.programs.endswith(".")
    assert "{where}" in kind.opening
    assert kind.ending.endswith(".safetensors") == (kind.writes == "file")


def test_default_names_differ():
    assert len({kind.ending for kind in OUTPUT_FORMATS.values()}) == len(OUTPUT_FORMATS)


@every_format
def test_is_written_checked_and_described(run, name):
    result = merge(run, name)
    assert result.code == 0, result.err
    output = output_of(name)
    assert output.is_dir() == (OUTPUT_FORMATS[name].writes == "folder")
    assert result.out.splitlines()[-1] == f"written  {output}"
    assert "keys: " in result.out
    assert "unet: loaded again it differs" in result.out
    report = json.loads((output / "draftp-merge.json" if output.is_dir() else Path("out.merge.json")).read_text())
    assert report["format"] == name
    assert report["inputs"] == [{"name": str(run), "weights": str(run / "final"), "scale": 1.0}]
    assert report["verification"][0]["part"] == "unet"
    assert all(line in result.out.splitlines() for line in report["checks"])


def opened(name, base, config):
    """What the snippet of the card makes in plain diffusers; a single file's configuration, on the hub, is `config`."""

    class Pipeline(StableDiffusionXLPipeline):
        @classmethod
        def from_single_file(cls, file):
            return StableDiffusionXLPipeline.from_single_file(file, config=str(config), add_watermarker=False)

        @classmethod
        def from_pretrained(cls, folder):
            return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)

    found = {}
    # Told to be offline, diffusers 0.36 doesn't look for the LoRA's file, even in a folder here.
    offline = mock.patch("diffusers.loaders.lora_base.HF_HUB_OFFLINE", new=False, create=True)
    with mock.patch("diffusers.StableDiffusionXLPipeline", Pipeline), offline:
        exec(opening(name, str(output_of(name)), str(base), find_family()), found)
    return found["pipe"]


@every_format
def test_the_snippet_of_its_card_opens_it_in_plain_diffusers(run, tiny_sdxl, single_file, name):
    merge(run, name)
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    untuned = ask(pipe.unet)
    pipe.load_lora_weights(run / "final", weight_name=LORA_FILE)
    wanted = ask(pipe.unet)
    assert (wanted - untuned).abs().max() > 1e-3
    for base in (tiny_sdxl, single_file):
        torch.testing.assert_close(ask(opened(name, base, tiny_sdxl).unet), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, kind in OUTPUT_FORMATS.items() if kind.is_lora])
def test_the_card_of_a_lora_opens_the_toy_and_without_a_base_sdxl(tiny_sdxl, name):
    unet = open_base("toy").shapes()["unet"]
    layer, (out, width) = next((key, shape) for key, shape in unet.items() if key.endswith("attn1.to_q"))
    key = f"unet.{layer}.lora_A.weight"
    save_file({key: torch.ones(1, width), key.replace("_A", "_B"): torch.ones(out, 1)}, "toy-lora.safetensors")
    result = merge("toy-lora.safetensors", name, "--base", "toy", "--verify", "keys")
    assert result.code == 0, result.err
    assert opened(name, "toy", tiny_sdxl).unet.peft_config
    report = MergeReport("1", "title", name, "sdxl", None, [])
    assert f'from_pretrained("{SDXL_BASE}")' in merge_card(report, "x")
    assert "from SDXL's configuration and:" in merge_card(report, "x")


@pytest.mark.parametrize(
    ("base", "on_the_hub"),
    [("somebody/their-sdxl", True), ("models/mine.safetensors", False), ("/srv/models/mine", False), ("toy", False)],
)
@every_format
def test_a_base_model_in_the_head_of_a_card_is_one_of_the_hub(name, base, on_the_hub):
    card = merge_card(MergeReport("1", "title", name, "sdxl", base, []), "x")
    head = yaml.safe_load(card.split("---")[1])
    relation = "adapter" if OUTPUT_FORMATS[name].is_lora else "finetune"
    told = {"base_model": base, "base_model_relation": relation} if on_the_hub else {}
    assert {key: value for key, value in head.items() if key.startswith("base_model")} == told
    assert f"from {base} and" in card, "the text says it in any case"


@pytest.mark.parametrize("damage", [LEFT_OUT, SCALED])
@every_format
def test_damage_is_found_and_nothing_is_kept(run, name, damage):
    """What was written really is changed on the disk, before it is checked."""
    honest = OUTPUT_FORMATS[name].write

    def write(self, target):
        figures = honest(self, target)
        harm(target, damage)
        return figures

    with mock.patch.object(OUTPUT_FORMATS[name], "write", write):
        result = merge(run, name)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "not as meant" in result.err or "verification failed" in result.err
    assert not list(Path.cwd().glob(".*.partial"))
    assert not list(Path.cwd().glob("out*"))


def harm(target, damage):
    """Leave out a matrix of the first query of the UNet, or scale it."""
    for file in weight_files(target):
        tensors = load_file(file)
        queries = (key for key in sorted(tensors) if "attn1_to_q" in key.replace(".", "_"))
        hit = next((key for key in queries if tensors[key].ndim > 1), None)
        if hit is None:
            continue
        if damage == LEFT_OUT:
            del tensors[hit]
        else:
            tensors[hit] = 1.5 * tensors[hit]
        save_file(tensors, file, {"format": "pt"})
        return
    raise AssertionError("there was nothing to damage")


@every_format
def test_without_a_base_it_is_refused_or_checked_by_its_keys(run, name):
    lora = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(1, 1280)}
    lora["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.ones(1280, 1)
    save_file(lora, "sdxl.safetensors")
    result = merge("sdxl.safetensors", name, "--verify", "keys")
    assert result.code == (2 if OUTPUT_FORMATS[name].needs_base else 0)
    assert ("--base MODEL" in result.err) == OUTPUT_FORMATS[name].needs_base


def test_a_base_with_a_layer_that_single_files_have_no_place_for_is_refused_in_one_line(run, tiny_sdxl, single_file):
    """As with --config of another kind of model."""
    odd = Path("odd")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (odd / part).mkdir(parents=True)
        config = json.loads((tiny_sdxl / part / "config.json").read_text())
        if part == "unet":
            config |= {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}
        (odd / part / "config.json").write_text(json.dumps(config))
    result = draftp("merge-lora", run, "--base", single_file, "--config", odd, "--output", "x")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "unet.encoder_hid_proj" in result.err
    assert "--config" in result.err

"""A run that was trained with another VAE (model.vae): a merged model decodes with that one, whatever form it has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.export.formats import OUTPUT_FORMATS
from tests.core.test_lora_files import ask
from tests.export.merging import merge, pipeline, refused, report, tuned_unet, weights
from tests.tiny import make_sdxl, vae_forms, write_single_file

PREFIX = "first_stage_model."
FILE = "diffusion_pytorch_model.safetensors"
MODELS = [name for name, kind in OUTPUT_FORMATS.items() if not kind.is_lora]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another model of the same shapes, its VAE in float16."""
    folder = make_sdxl(tmp_path_factory.mktemp("other") / "sdxl", seed=1)
    vae = AutoencoderKL.from_pretrained(folder / "vae").half()
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def checkpoint(other, tmp_path_factory) -> Path:
    """The same as a single file."""
    return write_single_file(other, tmp_path_factory.mktemp("checkpoint") / "other.safetensors")


def with_vae(run: Path, vae: object, name: str = "mine", **model: object) -> Path:
    """A copy of a run whose settings name another VAE."""
    folder = Path(shutil.copytree(run, name))
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    settings["model"] |= {"vae": str(vae), **{key: str(value) for key, value in model.items()}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def opened(name: str, config: Path) -> StableDiffusionXLPipeline:
    return pipeline(Path(output_of(name)), config)


def output_of(name: str) -> Path:
    return Path("out" if OUTPUT_FORMATS[name].writes == "folder" else "out.safetensors")


def same_vae(found: AutoencoderKL, model: Path) -> bool:
    wanted = AutoencoderKL.from_pretrained(model / "vae").float().state_dict()
    state = found.float().state_dict()
    return wanted.keys() == state.keys() and all(torch.equal(wanted[key], state[key]) for key in wanted)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("folder", "diffusers"),
        ("folder", "single-file"),
        ("model", "single-file"),
        ("diffusers' file", "diffusers"),
        ("original file", "diffusers"),
        ("original file", "single-file"),
        ("in a checkpoint", "single-file"),
    ],
)
def test_a_merged_model_has_the_vae_that_the_run_was_trained_with(run, tiny_sdxl, other, checkpoint, name, form):
    vae = vae_forms(other, checkpoint, Path("alone.safetensors"))[form]
    out = merge(with_vae(run, vae), "--format", name, "--output", output_of(name)).out
    assert f"base: {tiny_sdxl}, VAE: {vae})" in out
    assert f"vae: bit for bit that of model.vae {vae}, encoder included" in out
    pipe = opened(name, tiny_sdxl)
    assert same_vae(pipe.vae, other)
    torch.testing.assert_close(ask(pipe.unet), ask(tuned_unet(tiny_sdxl, run / "final")), rtol=0, atol=1e-5)
    assert report(output_of(name))["vae"] == str(vae)


@pytest.mark.parametrize("name", MODELS)
def test_a_single_file_as_base_with_a_vae_of_its_own_or_without(run, tiny_sdxl, single_file, other, name):
    bare = {key: t for key, t in load_file(single_file).items() if not key.startswith(PREFIX)}
    save_file(bare, "bare.safetensors")
    for base in (single_file, "bare.safetensors"):
        mine = with_vae(run, other / "vae", "mine", pretrained=base, config=tiny_sdxl)
        merge(mine, "--format", name, "--output", output_of(name), "--overwrite", "--verify", "keys")
        assert same_vae(opened(name, tiny_sdxl).vae, other)
        if name == "single-file":
            assert load_file("out.safetensors").keys() == load_file(single_file).keys()
        shutil.rmtree(mine)


def test_a_folder_as_base_that_has_no_vae(run, tiny_sdxl, other):
    """Of a model on the hub, nothing of its VAE is fetched where another is taken."""
    base = Path(shutil.copytree(tiny_sdxl, "base"))
    shutil.rmtree(base / "vae")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    mine = with_vae(run, other, pretrained=base)
    merge(mine, "--output", "out")
    assert same_vae(pipeline(Path("out")).vae, other)
    merge(mine, "--format", "kohya", "--output", "out.safetensors", "--verify", "keys")


def test_its_configuration_goes_with_it_and_a_single_file_has_no_place_for_one(run, other):
    vae = AutoencoderKL.from_pretrained(other / "vae")
    vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4, sample_size=32)
    vae.save_pretrained("normalised")
    mine = with_vae(run, "normalised")
    merge(mine, "--output", "out", "--verify", "keys")
    assert json.loads(Path("out/vae/config.json").read_text()) == json.loads(Path("normalised/config.json").read_text())
    refused(
        mine, "--format", "single-file", "--output", "x.safetensors",
        words=["model.vae normalised", "latents_mean, latents_std", "--format diffusers"],
    )  # fmt: skip
    assert not Path("x.safetensors").exists()


def test_what_was_written_is_said_in_the_metadata_and_the_card(run, other):
    mine = with_vae(run, other / "vae")
    merge(mine, "--format", "single-file", "--output", "out.safetensors", "--verify", "keys")
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.merged_from"].endswith(f"{mine}, {other / 'vae'}")
    merge(mine, "--output", "out", "--verify", "keys")
    assert f"- {other / 'vae'} (the VAE, in the place of the base's own)" in Path("out/README.md").read_text()


def test_it_stays_in_its_own_dtype_where_the_others_are_cast(run, other):
    merge(with_vae(run, other), "--dtype", "bf16", "--output", "out", "--verify", "keys")
    dtypes = {key: t.dtype for key, t in weights(Path("out")).items()}
    assert {dtype for key, dtype in dtypes.items() if key.startswith("vae/")} == {torch.float16}
    assert {dtype for key, dtype in dtypes.items() if not key.startswith("vae/")} == {torch.bfloat16}


def test_with_another_base_it_goes_along_and_a_loras_file_takes_the_bases_own(run, tiny_sdxl, other):
    base = make_sdxl(Path("base"), seed=2)
    mine = with_vae(run, other)
    merge(mine, "--base", base, "--output", "out", "--verify", "keys")
    assert same_vae(pipeline(Path("out")).vae, other)
    merge(mine / "final" / LORA_FILE, "--base", base, "--output", "out", "--verify", "keys", "--overwrite")
    assert same_vae(pipeline(Path("out")).vae, base)


@pytest.mark.filterwarnings("default::UserWarning")
def test_another_vae_can_be_given(run, other):
    mine = with_vae(run, "./gone")
    merge(mine, "--vae", other, "--output", "out", "--verify", "keys")
    assert same_vae(pipeline(Path("out")).vae, other)
    refused(mine, "--vae", "./gone", "--output", "no", words=["--vae", "gone"])
    found = merge(mine, "--vae", other, "--format", "lora", "--output", "lora", "--verify", "keys")
    assert "--vae has no effect with --format lora" in found.err


def test_runs_with_different_vaes_make_no_model_but_one_lora(run, other):
    mine = with_vae(run, other)
    both = (mine, run, "--verify", "keys", "--output")
    refused(*both, "x", words=["different VAEs", str(other), "--vae"])
    merge(*both, "x", "--format", "lora")


@pytest.mark.parametrize("name", MODELS)
def test_a_vae_that_is_not_there_or_not_whole_is_refused(run, other, name):
    refused(with_vae(run, "./gone"), "--format", name, "--output", output_of(name), words=["model.vae ./gone"])
    tensors = load_file(other / "vae" / FILE)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors, "part.safetensors")
    short = with_vae(run, "part.safetensors", "short")
    refused(short, "--format", name, "--output", output_of(name), words=["1 of its tensors are missing", "encoder."])


def test_another_vae_in_the_result_is_found(run, tiny_sdxl, other, monkeypatch):
    from draftcli.export.formats import DiffusersFolder

    honest = DiffusersFolder.write

    def write(self, target):
        figures = honest(self, target)
        tensors = load_file(target / "vae" / FILE)
        tensors["decoder.conv_in.weight"] = 1.5 * tensors["decoder.conv_in.weight"]
        save_file(tensors, target / "vae" / FILE)
        return figures

    monkeypatch.setattr(DiffusersFolder, "write", write)
    refused(with_vae(run, other), "--output", "out", words=["its VAE is not model.vae"], code=1)
    assert not Path("out").exists()

"""Weights under other names than ours, in part, or not there: each is read right, or refused with what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.models.loading import load_parts
from draftcli.core.models.weight_files import ensure_loaded, with_text_model
from draftcli.errors import InputError
from draftcli.export.base import open_base
from tests.command import draftp
from tests.tiny import write_single_file

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
STEM = {part: "model" if part.startswith("text") else "diffusion_pytorch_model" for part in NETWORKS}


@pytest.fixture(scope="module")
def single_file(tiny_sdxl, tmp_path_factory):
    return write_single_file(tiny_sdxl, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def model(tiny_sdxl):
    return Path(shutil.copytree(tiny_sdxl, "model"))


def load(pretrained, **settings):
    return load_parts(ModelConfig(pretrained=str(pretrained), **settings))


def refused(pretrained, *words, **settings):
    """By every command in one line, without a guess at damage."""
    with pytest.raises(InputError) as error:
        load(pretrained, **settings)
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert "damaged" not in message
    return message


def same(ours, theirs):
    """Every network of two models, bit for bit."""
    return all(
        torch.equal(tensor, theirs.modules[part].state_dict()[key])
        for part, module in ours.modules.items()
        for key, tensor in module.state_dict().items()
    )


def weights(model, part):
    return model / part / f"{STEM[part]}.safetensors"


def as_variant(model, variant, parts=NETWORKS):
    for part in parts:
        weights(model, part).rename(model / part / f"{STEM[part]}.{variant}.safetensors")


def in_two(model, part):
    """The weights as two shards with their index; returns the names of the shards."""
    tensors = load_file(weights(model, part))
    weights(model, part).unlink()
    names = [f"{STEM[part]}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"{STEM[part]}.safetensors.index.json"
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: t for key, t in tensors.items() if where[key] == name}, model / part / name, {"format": "pt"})
    (model / part / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [model / part / name for name in names]


# ------------------------------------------------------------------------------------------------ which files they are


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "bf16"])
def test_a_variant_is_named_and_read_when_asked_for(tiny_sdxl, model, variant):
    as_variant(model, variant)
    refused(model, f"set model.variant={variant}")
    assert same(load(model, variant=variant), load(tiny_sdxl))
    with pytest.raises(InputError, match=f"take --variant {variant}"):
        open_base(str(model))
    assert open_base(str(model), variant=variant).shapes() == open_base(str(tiny_sdxl)).shapes()


def test_several_variants_are_all_named(model):
    weights(model, "unet").rename(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(
        model / "unet" / "diffusion_pytorch_model.fp16.safetensors",
        model / "unet" / "diffusion_pytorch_model.bf16.safetensors",
    )
    refused(model, "model.variant=bf16", "fp16")
    refused(model, "model.variant=bf16", variant="fp8")


@pytest.mark.parametrize("part", NETWORKS)
def test_a_variant_of_one_network_is_read_beside_the_others(tiny_sdxl, model, part):
    as_variant(model, "fp16", [part])
    refused(model, f"{part}:", "model.variant=fp16")
    assert same(load(model, variant="fp16"), load(tiny_sdxl))


@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_shards(tiny_sdxl, model, part):
    first, second = in_two(model, part)
    assert same(load(model), load(tiny_sdxl))
    second.unlink()
    refused(model, "1 of the 2 files", second.name, "download")
    index = model / part / f"{STEM[part]}.safetensors.index.json"
    index.unlink()
    refused(model, index.name, "missing")
    assert first.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("diffusion_pytorch_model.bin", ["diffusion_pytorch_model.bin", "can run code", "convert", ".safetensors"]),
        ("model.safetensors", ["no diffusion_pytorch_model.safetensors", "only model.safetensors"]),
        ("model.onnx", ["only model.onnx"]),
        ("flax_model.msgpack", ["only flax_model.msgpack"]),
        (None, ["no diffusion_pytorch_model.safetensors"]),
    ],
)
def test_another_format_is_named(model, name, words):
    path = weights(model, "unet")
    path.rename(path.with_name(name)) if name else path.unlink()
    refused(model, *words)


@pytest.mark.parametrize("part", NETWORKS)
def test_a_folder_that_is_missing(model, part):
    shutil.rmtree(model / part)
    refused(model, f"no folder {part}")


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--model", "MODEL", "--prompt", "x", "--output", "out"),
        ("anneal", "RUN", "--set", "model.pretrained=MODEL", "--prompts", "prompts.txt", "--output", "out"),
        ("eval", "RUN", "--set", "model.pretrained=MODEL", "--prompts", "prompts.txt", "--features", "toy"),
        ("doctor", "--set", "model.pretrained=MODEL"),
        ("train", "--preset", "toy", "--set", "model.pretrained=MODEL", "--output", "out"),
        ("merge-lora", "RUN", "--base", "MODEL", "--output", "out"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_says_what_to_set(model, lora_run, command):
    Path("prompts.txt").write_text("a red circle\n")
    as_variant(model, "fp16")
    result = draftp(*(str({"RUN": lora_run}.get(word, word)).replace("MODEL", "./model") for word in command))
    said = result.err or result.out
    assert result.code != 0
    assert ("--variant fp16" if command[0] == "merge-lora" else "model.variant=fp16") in " ".join(said.split())
    assert "damaged" not in said


# --------------------------------------------------------------------------------------------------------- single files


def without(single_file, prefix):
    path = Path("part.safetensors")
    save_file({key: t for key, t in load_file(single_file).items() if not key.startswith(prefix)}, path)
    return path


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("first_stage_model.", ["no VAE", "set model.vae"]),
        ("conditioner.embedders.0.", ["no first text encoder"]),
        ("conditioner.embedders.1.", ["no second text encoder"]),
        ("model.diffusion_model.", ["no UNet"]),
        ("", ["not a checkpoint of Stable Diffusion XL"]),
    ],
)
def test_a_single_file_without_a_network(tiny_sdxl, single_file, lora_run, prefix, words):
    file = without(single_file, prefix)
    message = refused(file, *words, config=str(tiny_sdxl))
    result = draftp("merge-lora", lora_run, "--base", file, "--config", tiny_sdxl, "--output", "out")
    assert (result.code, "damaged" in result.err) == (2, False)
    assert message.split(": ", 1)[1].split(";")[0] in result.err


def test_a_single_file_without_a_vae_takes_one_from_elsewhere(tiny_sdxl, single_file):
    file = without(single_file, "first_stage_model.")
    found = load(file, config=str(tiny_sdxl), vae=str(tiny_sdxl / "vae"))
    assert same(found, load(tiny_sdxl))


def test_a_folder_without_a_vae_takes_one_from_elsewhere(tiny_sdxl, model):
    shutil.rmtree(model / "vae")
    assert same(load(model, vae=str(tiny_sdxl)), load(tiny_sdxl))


# ------------------------------------------------------------------------------------------------ names of the tensors


def rename(model, part, new):
    path = weights(model, part)
    save_file({new(key): t.clone() for key, t in load_file(path).items()}, path, {"format": "pt"})


def short(key):
    return key.removeprefix("text_model.")


def with_old_attention(key):
    for new, old in [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")]:
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize(
    ("part", "new"),
    [
        ("text_encoder", short),
        ("text_encoder", with_text_model),
        ("text_encoder_2", short),
        ("text_encoder_2", with_text_model),
        ("vae", with_old_attention),
    ],
)
def test_both_namings_of_a_network_are_the_same_model(tiny_sdxl, model, part, new):
    """transformers 5 writes the first text encoder without `text_model.`, and 4 reads nothing from such a file."""
    rename(model, part, new)
    assert same(load(model), load(tiny_sdxl))


def test_left_over_position_ids_do_not_matter(tiny_sdxl, model, capsys):
    path = weights(model, "text_encoder")
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(77)[None]}, path, {"format": "pt"})
    assert same(load(model), load(tiny_sdxl))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("part", NETWORKS)
def test_names_that_match_nothing_are_refused(model, part):
    rename(model, part, lambda key: f"other.{key}")
    with pytest.raises(InputError, match=rf"model: \d+ tensors of {part} are missing"):
        load(model)


@pytest.mark.parametrize("part", NETWORKS)
def test_another_tensor_does_not_make_up_for_one_that_is_missing(model, part):
    """Their number is right, and one of the names is not."""
    lost = sorted(load_file(weights(model, part)))[3]
    rename(model, part, lambda key: "something.else" if key == lost else key)
    with pytest.raises(InputError, match=f"1 tensors of {part} are missing"):
        load(model)


@pytest.mark.parametrize("part", NETWORKS)
def test_tensors_without_a_place_are_told(model, part, capsys):
    path = weights(model, part)
    save_file({**load_file(path), "extra.weight": torch.zeros(2)}, path, {"format": "pt"})
    load(model)
    assert f"1 tensors of {part} are not in the model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", NETWORKS)
def test_what_a_library_overlooked_is_filled_in(tiny_sdxl, part, dtype):
    """As transformers 4 does with names of transformers 5: the network is there, with weights of its own."""
    module = load(tiny_sdxl).modules[part].to(dtype)
    expected = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    if part == "vae":  # whose encoder is dropped
        module = type(module).from_config(module.config).to(dtype)
    else:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    ensure_loaded(module, part, [weights(tiny_sdxl, part)], "model")
    found = module.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_a_model_in_the_hubs_cache_is_checked_like_a_folder(tiny_sdxl, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = Path(shutil.copytree(tiny_sdxl, place / "snapshots" / ("0" * 40)))
    assert same(load("some/model"), load(tiny_sdxl))
    lost = sorted(load_file(weights(snapshot, "text_encoder")))[3]
    rename(snapshot, "text_encoder", lambda key: "something.else" if key == lost else key)
    with pytest.raises(InputError, match="some/model: 1 tensors of text_encoder are missing"):
        load("some/model")
    as_variant(snapshot, "fp16")
    refused("some/model", "model.variant=fp16")


# ------------------------------------------------------------------------------------------------------ what is written


def test_folders_that_are_written_have_the_names_that_every_version_reads(tiny_sdxl, model, lora_run):
    rename(model, "text_encoder", short)
    rename(model, "text_encoder_2", short)
    result = draftp(
        "merge-lora", lora_run, "--base", model, "--format", "diffusers", "--verify", "keys", "--output", "out"
    )
    assert result.code == 0, result.err
    for part in ("text_encoder", "text_encoder_2"):
        written, meant = load_file(weights(Path("out"), part)), load_file(weights(tiny_sdxl, part))
        assert written.keys() == {with_text_model(key) for key in meant}
        assert all(torch.equal(written[with_text_model(key)], tensor) for key, tensor in meant.items())


def test_the_toys_text_encoders_have_the_names_that_every_version_reads():
    from draftcli.core.models.loading import model_path

    for part in ("text_encoder", "text_encoder_2"):
        assert all(key == with_text_model(key) for key in load_file(weights(Path(model_path("toy")), part)))


def in_codes(file, ends, network=""):
    """Linear weights of a network as float8 codes with their scale beside, as quantised models have them."""
    tensors = load_file(file)
    for key in [
        key for key in tensors if key.startswith(network) and tensors[key].ndim == 2 and key.endswith("weight")
    ]:
        scale = tensors[key].abs().max() / 448
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
        tensors[key.removesuffix("weight") + ends] = scale
    save_file(tensors, file)


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("ends", ["scale_weight", "weight_scale", "weight.absmax", "weight.SCB", "qzeros"])
def test_weights_that_are_codes_are_refused(model, part, ends):
    in_codes(weights(model, part), ends)
    refused(model, "quantised", ends)
    with pytest.raises(InputError, match=f"--base.*quantised.*{ends}"):
        open_base(str(model))


def test_codes_in_a_single_file_and_in_a_vae(tiny_sdxl, single_file):
    shutil.copy(single_file, "codes.safetensors")
    in_codes("codes.safetensors", "scale_weight", "model.diffusion_model.")
    refused("codes.safetensors", "quantised", "scale_weight", config=str(tiny_sdxl))
    with pytest.raises(InputError, match="quantised"):
        open_base("codes.safetensors", str(tiny_sdxl))
    shutil.copy(weights(tiny_sdxl, "vae"), "vae.safetensors")
    in_codes("vae.safetensors", "weight_scale")
    refused(tiny_sdxl, "model.vae", "quantised", vae="vae.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_plain_weights_of_few_bits_are_the_numbers_they_say(model, tiny_sdxl, dtype):
    file = weights(model, "unet")
    rounded = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(rounded, file)
    parts = load(model)
    assert all(torch.equal(rounded[key].float(), tensor) for key, tensor in parts.unet.state_dict().items())

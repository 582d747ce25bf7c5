"""What a Stable Diffusion 1.x and its LoRAs are called in files: kohya's names, the original layout, metadata; and what
plain diffusers makes of what merge-lora writes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.lora.adapters import DEFAULT_TARGETS
from draftcli.core.models.family import find_family
from draftcli.core.models.loading import load_parts
from draftcli.core.models.meta import modules_on_meta
from draftcli.export.arguments import FORMAT_NAMES
from draftcli.export.base import family_shapes
from draftcli.export.kohya import kohya_tensors
from tests.command import draftp, recipe
from tests.export.merging import merge, refused
from tests.export.test_kohya import clean, described, lora_of, names_in
from tests.tiny import tiny_sd1

# Written out once, as sd-scripts makes them of diffusers' UNet and transformers' text encoder.
TABLE = Path(__file__).with_name("sd1_kohya_names.txt")
TARGETS = {
    "unet": [
        *("to_q", "to_k", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"),
        *("upsamplers.0.conv", "conv_in", "conv_out", "time_embedding.linear_1"),
    ],
    "text_encoder": ["q_proj", "out_proj", "fc1"],  # diffusers knows the old names of the others by the second
}


@pytest.fixture(scope="module")
def lora(tiny_sd, tmp_path_factory):
    """A LoRA of plain diffusers for layers of every kind, its folder."""
    return diffusers_lora(tiny_sd, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def tuned(tiny_sd, lora):
    """What plain diffusers makes of it: the outputs of UNet and text encoder."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    before = outputs(pipe)
    pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
    after = outputs(pipe)
    assert all((one - two).abs().max() > 1e-2 for one, two in zip(before, after, strict=True))
    return after


@pytest.fixture(scope="module")
def single_file(tiny_sd, lora, tmp_path_factory):
    """The model as a single file: a LoRA merged in at a scale that leaves every bit."""
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    merge(lora, "--base", tiny_sd, "--format", "single-file", "--scale", 1e-30, "--verify", "keys", "--output", file)
    return file


def diffusers_lora(model, folder):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    layers = {}
    torch.manual_seed(3)
    for part, targets in TARGETS.items():
        network = getattr(pipe, part)
        network.add_adapter(LoraConfig(r=3, lora_alpha=2, target_modules=targets))
        layers[part] = get_peft_model_state_dict(network)
        layers[part] = {key: 0.3 * torch.randn(tensor.shape) for key, tensor in layers[part].items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"]
    )
    return folder


@torch.no_grad()
def outputs(pipe):
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 32)))
    ids = torch.arange(77)[None] % pipe.text_encoder.config.vocab_size
    return pipe.unet(x, 500, encoder_hidden_states=text).sample, pipe.text_encoder(ids).last_hidden_state


# -------------------------------------------------------------------------------------------------------------- names


def test_kohyas_names_of_the_160_modules_trained_by_default_and_of_all_354():
    family, (first, others) = find_family("sd1"), names_in(TABLE).values()
    shapes = clean(family_shapes(family))
    chosen = {m: s for m, s in shapes["unet"].items() if any(m.endswith(f".{target}") for target in DEFAULT_TARGETS)}
    assert described(kohya_tensors(lora_of({"unet": chosen}), shapes["unet"], family)) == first
    assert described(kohya_tensors(lora_of(shapes), shapes["unet"], family)) == first | others
    assert (len(first), len(first | others)) == (160, 354)


def test_diffusers_own_conversion_takes_each_of_these_names_for_the_same_module():
    shapes = clean(family_shapes(find_family("sd1")))
    names = [name for section in names_in(TABLE).values() for name in section]
    ends = {".lora_down.weight": torch.zeros(1, 1), ".lora_up.weight": torch.zeros(1, 1), ".alpha": torch.tensor(1.0)}
    found, _ = _convert_non_diffusers_lora_to_diffusers({n + end: t for n in names for end, t in ends.items()})
    assert len(found) == 2 * len(names)
    known = {f"{part}.{module}" for part, modules in shapes.items() for module in modules}
    assert {module_of(key) for key in found} == {name for name in known if ".embeddings." not in name}


def module_of(key):
    """diffusers' older names of a LoRA's tensors, as the module's own."""
    key = key.replace(".processor", "").replace(".lora_linear_layer.", ".lora.").replace("_lora.", ".lora.")
    module = key.partition(".lora.")[0]
    if module.startswith("text_encoder"):
        module = module.replace("self_attn.to_out", "self_attn.out_proj")
        for letter in "qkv":
            module = module.replace(f"self_attn.to_{letter}", f"self_attn.{letter}_proj")
    return module + ".0" * module.endswith("to_out")


def test_the_original_layout_of_stable_diffusion_1_5():
    """Spot checks against v1-5-pruned-emaonly.safetensors, at its real size, on the meta device."""
    family, found = find_family("sd1"), {}
    for part, module in modules_on_meta(family.config_folder, family).items():
        keys = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        if part == "text_encoder":
            keys = {key if key.startswith("text_model.") else f"text_model.{key}": s for key, s in keys.items()}
        found |= {original.key: original.sources for original in family.original_layout(part, keys)}
    unet, text = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
    counts = [sum(key.startswith(start) for key in found) for start in (unet, text, "first_stage_model.")]
    assert counts == [686, 196, 248]
    for key, source in {
        f"{unet}input_blocks.1.1.proj_in.weight": "down_blocks.0.attentions.0.proj_in.weight",
        f"{unet}input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        f"{unet}input_blocks.11.0.in_layers.2.weight": "down_blocks.3.resnets.1.conv1.weight",
        f"{unet}middle_block.1.proj_out.bias": "mid_block.attentions.0.proj_out.bias",
        f"{unet}output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        f"{unet}output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        f"{unet}output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
        f"{unet}time_embed.2.bias": "time_embedding.linear_2.bias",
        "first_stage_model.decoder.up.0.block.2.conv2.weight": "decoder.up_blocks.3.resnets.2.conv2.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
        f"{text}embeddings.position_embedding.weight": "text_model.embeddings.position_embedding.weight",
        f"{text}encoder.layers.11.self_attn.q_proj.bias": "text_model.encoder.layers.11.self_attn.q_proj.bias",
    }.items():
        assert found[key] == (source,), key


# ----------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("from_single_file", [False, True], ids=["folder", "single file"])
@pytest.mark.parametrize("kind", FORMAT_NAMES)
def test_every_format_is_what_diffusers_makes_of_the_lora(kind, from_single_file, tiny_sd, single_file, lora, tuned):
    base = ("--base", single_file, "--config", tiny_sd) if from_single_file else ("--base", tiny_sd)
    output = Path("out" if kind == "diffusers" else "out.safetensors")
    result = merge(lora, *base, "--format", kind, "--output", output)
    layers = int(result.out.partition("reading: ")[2].split()[0])
    assert layers == sum(key.endswith("lora_A.weight") for key in load_file(lora / "pytorch_lora_weights.safetensors"))
    assert "text_encoder: loaded again it differs" in result.out
    if kind == "diffusers":
        pipe = StableDiffusionPipeline.from_pretrained(output)
    elif kind == "single-file":
        pipe = StableDiffusionPipeline.from_single_file(str(output), config=str(tiny_sd))
    else:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
        pipe.load_lora_weights(".", weight_name=output.name)
    for found, wanted in zip(outputs(pipe), tuned, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_single_file_is_the_same_model_and_draftp_reads_it_as_one(tiny_sd, single_file, tmp_path):
    folder = load_parts(ModelConfig(pretrained=str(tiny_sd)))
    file = load_parts(ModelConfig(pretrained=str(single_file), config=str(tiny_sd)))
    assert file.family.name == "sd1"
    for name, module in folder.modules.items():
        expected, found = module.state_dict(), file.modules[name].state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    preset = recipe(
        single_file, model={"pretrained": str(single_file), "config": str(tiny_sd)}, trainer={"max_steps": 1}
    )
    result = draftp("train", "--preset", preset, "--output", "run", "--quiet")
    assert result.code == 0, result.err
    kohya = Path("run/final/run-kohya.safetensors")
    assert said_by(kohya)["ss_base_model_version"] == "sd_v1"
    assert all(key.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for key in load_file(kohya))
    before = load_file(single_file)
    save_file(
        {**before, "cond_stage_model.logit_scale": torch.ones(())}, "extra.safetensors", {"modelspec.author": "me"}
    )
    merge(
        "run",
        "--base",
        "extra.safetensors",
        "--config",
        tiny_sd,
        "--format",
        "single-file",
        "--output",
        "m.safetensors",
    )
    after = load_file("m.safetensors")
    assert after.keys() == before.keys() | {"cond_stage_model.logit_scale"}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("model.diffusion_model.") for key in changed)


def said_by(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_metadata_say_which_model_it_is(tiny_sd, lora):
    merge(lora, "--base", tiny_sd, "--format", "kohya", "--verify", "keys", "--output", "lora.safetensors")
    merge(lora, "--base", tiny_sd, "--format", "single-file", "--verify", "keys", "--output", "model.safetensors")
    said = said_by("lora.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.implementation"] == "diffusers"
    assert said["modelspec.resolution"] == "64x64"
    assert (said["ss_base_model_version"], said["ss_v2"]) == ("sd_v1", "False")
    said = said_by("model.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-v1"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    merge(lora, "--base", tiny_sd, "--verify", "keys", "--output", "folder")
    card = Path("folder/README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card
    assert "- stable-diffusion\n" in card
    assert json.loads(Path("folder/draftp-merge.json").read_text())["family"] == "sd1"


def test_a_lora_of_stable_diffusion_2_says_so_and_a_single_file_of_it_is_refused(tmp_path):
    model = tiny_sd1(tmp_path / "v2", "v_prediction", version=2)
    lora = diffusers_lora(model, tmp_path / "lora")
    merge(lora, "--base", model, "--format", "kohya", "--output", "lora.safetensors")
    said = said_by("lora.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (said["ss_base_model_version"], said["ss_v2"]) == ("sd_v2_v", "True")
    words = ["a single file of Stable Diffusion 2", "--format diffusers"]
    refused(lora, "--base", model, "--format", "single-file", "--output", "x.safetensors", words=words)
    merge(lora, "--base", model, "--output", "folder")


@pytest.mark.filterwarnings("default::UserWarning")
def test_without_a_base_the_lora_itself_says_which_family_it_is_for():
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(1, 768), f"{layer}.lora_B.weight": torch.ones(320, 1)}, "in.safetensors"
    )
    result = merge("in.safetensors", "--format", "kohya", "--output", "out.safetensors")
    assert "(base: SD 1.x's configuration)" in result.out
    assert "only the keys are checked, against SD 1.x's configuration" in result.err
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert load_file("out.safetensors").keys() == {
        f"{stem}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")
    }
    assert said_by("out.safetensors")["modelspec.resolution"] == "512x512"


def test_a_lora_for_the_other_family_is_refused_by_name(tiny_sd, tiny_sdxl, lora):
    refused(lora, "--base", tiny_sdxl, "--output", "x", words=["model"])
    refused(lora, "--base", tiny_sdxl, "--output", "x", words=["reads text of width 32", "this model's of 80"])

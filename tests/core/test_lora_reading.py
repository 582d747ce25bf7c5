"""What draftp reads from a LoRA's file is what the ecosystem's own loaders merge of it, for every naming and every way
of saying the scale."""

import copy
import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from draftcli.core.lora.adapters import adapters_off
from draftcli.core.lora.files import Lora, attach_loras, weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.family import find_family
from draftcli.core.models.original_names import original_unet_names
from draftcli.core.models.weight_files import with_text_model
from draftcli.errors import DraftpError
from draftcli.export.inputs import Changes
from draftcli.export.second_reading import compare_reading
from tests.core.test_lora_files import RANKS, TAKES_ALL_OF_KOHYA, ask

PARTS = ("unet", "text_encoder", "text_encoder_2")
DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"
TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "proj_in"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pipe(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)


@pytest.fixture(scope="module")
def shapes(pipe):
    return {part: weight_shapes(getattr(pipe, part)) for part in PARTS}


def with_adapter(network, **settings):
    """A copy with a LoRA whose every tensor is random."""
    network = copy.deepcopy(network)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False} | settings
    network.add_adapter(LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def fused(network):
    """Its parameters with the adapter merged by peft."""
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    }


def assert_merged_alike(base, lora, theirs, part="unet"):
    """Every parameter of the network, so that nothing else may move either."""
    changes = Changes([lora])
    for name, before in base.named_parameters():
        key = name if part == "unet" else with_text_model(name)
        ours = changes.apply(part, key, before).float()
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        assert ((part, key) in changes.touched()) == (not torch.equal(before, theirs[name])), key


SCALES = {
    "one alpha": {},
    "alpha by ending": {"alpha_pattern": {"to_q": 2, "net.2": 24}},
    "alpha by regular expression": {"alpha_pattern": {r".*attn\d\.to_out\.0": 1, "conv[12]": 32}},
    "alpha by a whole name": {"alpha_pattern": {f"^{DOWN}.attn1.to_q": 3, "proj_in": 0.5}},
    "ranks": {"rank_pattern": {"to_q": 2, r"ff\.net\.2": 8}},
    "ranks and alphas": {"rank_pattern": {"attn1.to_q": 1}, "alpha_pattern": {"to_q": 8}},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_q": 2}},
    "DoRA": {"use_dora": True, "alpha_pattern": {"to_q": 2}},
    "bias": {"lora_bias": True, "target_modules": ["to_out.0", "conv1", "proj_in"]},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor")  # peft's guess when it meets a bias
@pytest.mark.parametrize("way", ["save_lora_weights", "save_lora_adapter", "peft"])
@pytest.mark.parametrize("scale", SCALES)
def test_settings_of_peft_mean_what_peft_makes_of_them(pipe, shapes, tiny_sdxl, tmp_path, scale, way):
    made = with_adapter(pipe.unet, **SCALES[scale])
    theirs = copy.deepcopy(pipe.unet)
    if way == "save_lora_adapter":
        made.save_lora_adapter(tmp_path)
        theirs.load_lora_adapter(str(tmp_path), weight_name=FILE, prefix=None)
    elif way == "save_lora_weights":
        settings = {k: sorted(v) if isinstance(v, set) else v for k, v in made.peft_config["default"].to_dict().items()}
        layers = get_peft_model_state_dict(made)
        StableDiffusionXLPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=settings)
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(tmp_path), weight_name=FILE, return_lora_metadata=True
        )
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, theirs, metadata=metadata)
    else:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False} | SCALES[scale]
        model = get_peft_model(copy.deepcopy(pipe.unet), LoraConfig(**settings))
        model.load_state_dict({f"base_model.model.{key}": tensor for key, tensor in made.state_dict().items()})
        model.save_pretrained(tmp_path)
        theirs = PeftModel.from_pretrained(theirs, tmp_path).base_model.model
    lora = read_lora(tmp_path, shapes)
    layers = len(lora.parts["unet"])
    assert f"{layers} of {layers}" in compare_reading(tmp_path, lora, tiny_sdxl, find_family())
    assert_merged_alike(pipe.unet, lora, fused(copy.deepcopy(theirs)))
    ours = copy.deepcopy(pipe.unet)
    attach_loras(ours, [(lora, 1.0)])
    torch.testing.assert_close(ask(ours), ask(theirs), rtol=0, atol=1e-5)
    with adapters_off(ours):
        assert torch.equal(ask(ours), ask(pipe.unet))


# ------------------------------------------------------------------------------------------- namings of other programs

KOHYA = ("lora_unet_", "lora_te1_", "lora_te2_")
CLIP = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
# Prefixes, whether the UNet's layers have the original code's names, whether dots become underscores.
NAMINGS = {
    "kohya": (KOHYA, True, True),
    "kohya by diffusers' names": (KOHYA, False, True),
    "LyCORIS": (("lycoris_", *KOHYA[1:]), False, True),
    "ComfyUI": (("diffusion_model.", *CLIP), True, False),
    "OneTrainer": (("unet.", "clip_l.", "clip_g."), True, False),
    "original": (
        ("model.diffusion_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1."),
        True,
        False,
    ),
    "diffusers": (("unet.", "text_encoder.", "text_encoder_2."), False, False),
}
ALPHAS = {"none": [None], "one": [3.0], "several": [3.0, 1.0, 8.0]}
OPEN_CLIP = [
    ("text_model.encoder.layers.", "model.transformer.resblocks."),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
]


# Text encoders' layers are whole: diffusers tells its conversions of them apart by which are there.
TEXT_LAYERS = [*(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
NAMED = {
    "unet": {
        name: rank
        for name, rank in RANKS["unet"].items()
        if not name.endswith("time_emb_proj") and (TAKES_ALL_OF_KOHYA or "_blocks" in name or "mid_block" in name)
    },
    "text_encoder": {f"text_model.encoder.layers.1.{name}": 2 for name in TEXT_LAYERS},
    "text_encoder_2": {f"text_model.encoder.layers.0.{name}": 3 for name in TEXT_LAYERS[3:]},  # OpenCLIP has no q_proj
}  # diffusers does not find time_emb_proj by its original name


def spelled(naming, part, module, originals):
    prefixes, original, underscored = NAMINGS[naming]
    name = originals[module] if original and part == "unet" else module
    if naming == "original" and part == "text_encoder_2":
        for ours, theirs in OPEN_CLIP:
            name = name.replace(ours, theirs)
    return prefixes[PARTS.index(part)] + (name.replace(".", "_") if underscored else name)


def tensors_in(naming, alphas, shapes):
    """One LoRA by a program's names."""
    generator = torch.Generator().manual_seed(3)
    originals, tensors = original_unet_names(shapes["unet"]), {}
    for part, ranks in NAMED.items():
        known = {name if part == "unet" else with_text_model(name): shape for name, shape in shapes[part].items()}
        for i, (module, rank) in enumerate(ranks.items()):
            out, *rest = known[module]
            stem = spelled(naming, part, module, originals)
            tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator)
            up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
            tensors[f"{stem}.lora_up.weight"] = 0.05 * up
            if (alpha := alphas[(i if part == "unet" else PARTS.index(part)) % len(alphas)]) is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture(scope="module")
def merged(tiny_sdxl, shapes):
    """By way of giving alphas: the networks as diffusers' load_lora_weights and fuse_lora make them of kohya's file.

    It is given the layers of one alpha at a time, or of one rank where there is none: it loses alphas of attention
    where they differ, and older ones take another scale where ranks differ and there is no alpha.
    """
    found = {}
    for way, alphas in ALPHAS.items():
        tensors = tensors_in("kohya", alphas, shapes)
        theirs = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
        alike = defaultdict(set)
        for stem in {key.partition(".")[0] for key in tensors}:
            alpha = tensors.get(f"{stem}.alpha")
            alike[-len(tensors[f"{stem}.lora_down.weight"]) if alpha is None else float(alpha)].add(stem)
        for stems in alike.values():
            theirs.load_lora_weights({key: t.clone() for key, t in tensors.items() if key.partition(".")[0] in stems})
            theirs.fuse_lora()
            theirs.unload_lora_weights()
        found[way] = {part: dict(getattr(theirs, part).named_parameters()) for part in PARTS}
    return found


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_every_programs_names_mean_what_diffusers_makes_of_kohyas(
    pipe, shapes, merged, tiny_sdxl, tmp_path, naming, alphas
):
    path = tmp_path / "x.safetensors"
    save_file(tensors_in(naming, ALPHAS[alphas], shapes), path)
    lora = read_lora(path, shapes)
    for part in PARTS:
        assert_merged_alike(getattr(pipe, part), lora, merged[alphas][part], part)
    count = sum(1 for _ in lora.updates())
    read = re.fullmatch(r"reading: (\d+) of (\d+) layers .*", compare_reading(path, lora, tiny_sdxl, find_family()))
    assert int(read[2]) == count
    # diffusers 0.42 finds add_embedding by its original name only, and has no names of OpenCLIP.
    assert int(read[1]) >= count - {"original": 3}.get(naming, not NAMINGS[naming][1])


@pytest.mark.parametrize("naming", ["kohya", "ComfyUI", "OneTrainer", "diffusers"])
def test_a_wrong_reading_does_not_agree_with_the_second(shapes, tiny_sdxl, tmp_path, naming):
    path = tmp_path / "x.safetensors"
    save_file(tensors_in(naming, ALPHAS["several"], shapes), path)
    lora = read_lora(path, shapes)
    with pytest.raises(DraftpError, match=r"scale .* here, .* there"):
        compare_reading(path, lora.scaled(2), tiny_sdxl, find_family())
    damaged = {part: {m: replace(u, down=-u.down) for m, u in modules.items()} for part, modules in lora.parts.items()}
    with pytest.raises(DraftpError, match="another down"):
        compare_reading(path, Lora("damaged", damaged), tiny_sdxl, find_family())

"""LoRA files in every naming are read into the same updates, do what the ecosystem's own loader makes of them, and
those that can't be are refused in one line."""

import copy
import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from draftcli.core.lora.adapters import adapters_off, attach_lora, lora_layers
from draftcli.core.lora.files import (
    Lora,
    Update,
    attach_loras,
    weight_shapes,
)
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.original_names import original_unet_names
from draftcli.errors import InputError

# diffusers before 0.39 refuses kohya's names of modules outside the blocks.
TAKES_ALL_OF_KOHYA = Version(diffusers.__version__) >= Version("0.39")
# One of each kind of module that files name differently.
RANKS = {
    "unet": {
        "conv_in": 2,
        "time_embedding.linear_1": 2,
        "add_embedding.linear_2": 1,
        "down_blocks.0.resnets.0.time_emb_proj": 2,
        "down_blocks.0.downsamplers.0.conv": 3,
        "down_blocks.1.resnets.0.conv1": 2,
        "down_blocks.1.attentions.0.proj_in": 4,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 4,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 4,
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": 4,
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": 2,
        "mid_block.resnets.1.conv2": 2,
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2": 2,
        "up_blocks.0.upsamplers.0.conv": 2,
        "up_blocks.1.resnets.1.conv_shortcut": 1,
        "conv_out": 2,
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": 2, "text_model.encoder.layers.1.mlp.fc1": 2},
    "text_encoder_2": {"text_model.encoder.layers.1.self_attn.out_proj": 3, "text_model.encoder.layers.0.mlp.fc2": 1},
}


@pytest.fixture(scope="module")
def pipe(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)


@pytest.fixture(scope="module")
def shapes(pipe):
    return {part: weight_shapes(getattr(pipe, part)) for part in RANKS}


@pytest.fixture(scope="module")
def lora(shapes):
    """A LoRA with every kind of layer, several ranks, and scales that are not 1."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for part, ranks in RANKS.items():
        known = {
            n if n.startswith("text_") or part == "unet" else f"text_model.{n}": s for n, s in shapes[part].items()
        }
        for i, (name, rank) in enumerate(ranks.items()):
            out, *rest = known[name]
            down = torch.randn(rank, *rest, generator=generator)
            up = 0.05 * torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
            parts.setdefault(part, {})[name] = Update(down, up, (0.5, 1.0, 2.0)[i % 3])
    return Lora("made here", parts)


def unet_only(lora):
    return Lora(lora.name, {"unet": lora.parts["unet"]})


def write(lora, path, naming, unet_modules):
    """The same LoRA as each program writes it."""
    originals = original_unet_names(unet_modules)
    short = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors, alphas = {}, {}
    for part, name, update in lora.updates():
        alpha = torch.tensor(update.scale * update.rank)
        if naming.startswith("kohya"):
            module = originals[name] if naming == "kohya" and part == "unet" else name
            stem, down, up = short[part] + module.replace(".", "_"), "lora_down", "lora_up"
            tensors[f"{stem}.alpha"] = alpha
        elif naming == "old diffusers":
            down, up = "lora.down", "lora.up"
            stem = f"{part}.{name}"
            if ".attn" in name and "to_" in name:
                stem = stem.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
                stem, down, up = stem.replace("to_out.0", "to_out") + "_lora", "down", "up"
            elif "self_attn" in name:
                stem = stem.replace("q_proj", "to_q").replace("out_proj", "to_out") + "_lora"
                down, up = "down", "up"
            elif "mlp" in name:
                down, up = "lora_linear_layer.down", "lora_linear_layer.up"
            tensors[f"{stem}.alpha"] = alpha
        else:
            stem, down, up = f"{part}.{name}", "lora_A", "lora_B"
            alphas |= {f"{part}.r": 2, f"{part}.lora_alpha": 2}
            alphas.setdefault(f"{part}.target_modules", []).append(name)
            alphas.setdefault(f"{part}.rank_pattern", {})[name] = update.rank
            alphas.setdefault(f"{part}.alpha_pattern", {})[name] = float(alpha)
        tensors |= {f"{stem}.{down}.weight": update.down, f"{stem}.{up}.weight": update.up}
    metadata = {"lora_adapter_metadata": json.dumps(alphas)} if alphas else None
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def ask(unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = {"text_embeds": torch.randn(2, 48, generator=g), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=g), 500, torch.randn(2, 7, 80, generator=g), added_cond_kwargs=keys
        )[0]


def same(one, two):
    assert {p: u.keys() for p, u in one.parts.items()} == {p: u.keys() for p, u in two.parts.items()}
    for part, name, update in one.updates():
        other = two.parts[part][name]
        assert torch.equal(update.down, other.down), name
        assert torch.equal(update.up, other.up), name
        assert update.scale == pytest.approx(other.scale), name


@pytest.mark.parametrize("naming", ["diffusers", "old diffusers", "kohya", "kohya by diffusers' names"])
def test_every_naming_is_the_same_lora(lora, shapes, tmp_path, naming):
    same(read_lora(write(lora, tmp_path / "x.safetensors", naming, shapes["unet"]), shapes), lora)


def test_a_folder_of_diffusers_and_one_of_peft(lora, shapes, pipe, tmp_path):
    write(lora, tmp_path / "pytorch_lora_weights.safetensors", "diffusers", shapes["unet"])
    same(read_lora(tmp_path, shapes), lora)
    model = get_peft_model(
        copy.deepcopy(pipe.unet), LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "peft")
    found = read_lora(tmp_path / "peft", shapes)
    assert len(found.parts["unet"]) == 8
    assert {update.scale for _, _, update in found.updates()} == {1.5}
    unet = copy.deepcopy(pipe.unet)
    attach_loras(unet, [(found, 1.0)])
    torch.testing.assert_close(ask(unet), ask(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_attached_it_does_what_diffusers_own_loader_makes_of_the_file(lora, shapes, tiny_sdxl, tmp_path, naming):
    # Its loader loses the alphas of attention layers unless all layers of the file have the same.
    same_alpha = {k: replace(v, scale=2 / v.rank) for k, v in lora.parts["unet"].items() if "time_emb" not in k}
    if naming == "kohya" and not TAKES_ALL_OF_KOHYA:
        same_alpha = {k: v for k, v in same_alpha.items() if "_blocks" in k or "mid_block" in k}
    path = write(Lora("", {"unet": same_alpha}), tmp_path / "x.safetensors", naming, shapes["unet"])
    theirs = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    before = ask(theirs.unet)
    ours = copy.deepcopy(theirs.unet)
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    attach_loras(ours, [(read_lora(path, shapes), 1.0)])
    assert len(lora_layers(ours)) == len(lora_layers(theirs.unet)) == len(same_alpha)
    torch.testing.assert_close(ask(ours), ask(theirs.unet), rtol=0, atol=1e-5)
    assert (ask(ours) - before).abs().max() > 1e-2


def test_several_with_scales_add_up_and_off_is_the_base(lora, pipe):
    unet, base = copy.deepcopy(pipe.unet), ask(pipe.unet)
    few = Lora("few", {"unet": dict(list(lora.parts["unet"].items())[5:9])})
    attach_loras(unet, [(unet_only(lora), 0.7), (few, -0.3)])
    by_hand = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for one, scale in ((unet_only(lora), 0.7), (few, -0.3)):
            for _, name, update in one.updates():
                by_hand.get_submodule(name).weight += scale * update.delta().float()
    torch.testing.assert_close(ask(unet), ask(by_hand), rtol=0, atol=1e-5)
    with adapters_off(unet):
        assert torch.equal(ask(unet), base)
    torch.testing.assert_close(ask(unet), ask(by_hand), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for n, p in unet.named_parameters() if "lora_" in n)


def test_beside_a_training_adapter_which_stays_trainable(lora, pipe):
    unet = copy.deepcopy(pipe.unet)
    attach_lora(unet, rank=2)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert weight_shapes(unet) == weight_shapes(pipe.unet), "adapters are looked through"
    attach_loras(unet, [(unet_only(lora), 1.0)])
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == trained
    alone = copy.deepcopy(pipe.unet)
    attach_loras(alone, [(unet_only(lora), 1.0)])
    torch.testing.assert_close(ask(unet), ask(alone), rtol=0, atol=1e-6)  # the training adapter starts as zero
    with adapters_off(unet):
        assert torch.equal(ask(unet), ask(pipe.unet))


def test_text_encoders_take_theirs(lora, pipe):
    encoder = copy.deepcopy(pipe.text_encoder)
    attach_loras(encoder, [(lora, 1.0)], "text_encoder")
    assert len(lora_layers(encoder)) == len(RANKS["text_encoder"])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert not torch.allclose(encoder(ids).last_hidden_state, pipe.text_encoder(ids).last_hidden_state)


def test_without_the_text_encoders_shapes_their_part_is_still_told_of(lora, shapes, tmp_path):
    path = write(lora, tmp_path / "x.safetensors", "kohya", shapes["unet"])
    assert read_lora(path, {"unet": shapes["unet"]}).parts.keys() == RANKS.keys()


# ------------------------------------------------------------------------------------------------- what is refused


def tensors_of(lora):
    found = {}
    for part, name, update in lora.updates():
        found |= {f"{part}.{name}.lora_A.weight": update.down, f"{part}.{name}.lora_B.weight": update.up}
    return found


Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
K2 = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_"
FLUX = "transformer.single_transformer_blocks.0.attn.to_q.lora_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q}A.weight": torch.zeros(3, 32)}, ["rank mismatch", "attn1.to_q", "(3, 32)"]),
        ({f"{Q}B.weight": None}, ["no partner", "attn1.to_q.lora_A"]),
        ({f"{Q}A.weight": torch.full((4, 32), torch.nan)}, ["not finite", "attn1.to_q"]),
        ({f"{Q}A.weight": torch.zeros(4, 31)}, ["(32, 31)", "(32, 32)", "another model"]),
        ({f"{K2}A.weight": torch.zeros(4, 768)}, ["Stable Diffusion 1.5", "768"]),
        (
            {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 2)},
            ["2 of its", "unet.nowhere.lora_A.weight", "another model"],
        ),
        ({"unet.conv_in.bias": torch.ones(2)}, ["1 of its", "unet.conv_in.bias"]),
        ({"unet.nothing.alpha": torch.ones(())}, ["unet.nothing.alpha"]),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(2)}, ["LoHa"]),
        ({"lora_unet_conv_in.dora_scale": torch.ones(2)}, ["no partner"]),
        ({f"{FLUX}A.weight": torch.ones(2, 2), f"{FLUX}B.weight": torch.ones(2, 2)}, ["Flux", "SDXL"]),
    ],
)
def test_a_file_that_does_not_fit(lora, shapes, tmp_path, change, words):
    tensors = {k: v for k, v in {**tensors_of(lora), **change}.items() if v is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", shapes, *words)


def refused(path, shapes, *words):
    with pytest.raises(InputError) as error:
        read_lora(path, shapes)
    message = str(error.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def test_files_without_any_effect(lora, shapes, tmp_path):
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors_of(lora).items()}
    save_file(zero, tmp_path / "zero.safetensors")
    refused(tmp_path / "zero.safetensors", shapes, "change nothing")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", shapes, "not a LoRA", "a.weight")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "zero.safetensors").read_bytes()[:300])
    refused(tmp_path / "cut.safetensors", shapes, "damaged")


def test_no_such_thing(shapes, tmp_path):
    refused(tmp_path / "gone", shapes, "no such file or folder")
    refused(tmp_path, shapes, "no LoRA in it")
    (tmp_path / "x.pt").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    refused(tmp_path / "x.pt", shapes, "only .safetensors")
    for name in "ab":
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, shapes, "2 .safetensors")

"""LoRA files that hold more than matrices: applied where that is exact, else called by their name."""

import copy
import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import conv2d

from draftcli.core.lora.files import attach_loras, weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.errors import InputError
from draftcli.export.inputs import Changes
from tests.core.test_lora_reading import DOWN, PARTS, assert_merged_alike, fused, with_adapter


@pytest.fixture(scope="module")
def pipe(tiny_sdxl):
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)


@pytest.fixture(scope="module")
def shapes(pipe):
    return {part: weight_shapes(getattr(pipe, part)) for part in PARTS}


Q = f"{DOWN}.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"


def plain(shapes, *modules, rank=2):
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for module in modules:
        out, *rest = shapes["unet"][module]
        stem = "lora_unet_" + module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def read(tensors, shapes, folder, metadata=None):
    save_file(tensors, folder / "x.safetensors", metadata)
    return read_lora(folder / "x.safetensors", shapes)


def test_scalars_of_lycoris_multiply_the_update(shapes, tmp_path):
    tensors = plain(shapes, Q, CONV)
    before = read(tensors, shapes, tmp_path)
    (tmp_path / "after").mkdir()  # before's tensors are read from its file as they are needed
    scalar = {f"{'lora_unet_' + Q.replace('.', '_')}.scalar": torch.tensor(0.25)}
    after = read(tensors | scalar, shapes, tmp_path / "after")
    weight = torch.zeros(shapes["unet"][Q])
    one, two = (Changes([lora]).apply("unet", f"{Q}.weight", weight) for lora in (before, after))
    torch.testing.assert_close(two, one / 4)
    assert after.parts["unet"][CONV].scale == before.parts["unet"][CONV].scale


def test_a_convolution_in_tucker_form_is_three_convolutions(shapes, tmp_path):
    out, inside = shapes["unet"][CONV][:2]
    generator = torch.Generator().manual_seed(5)
    down, middle, up = (torch.randn(s, generator=generator) for s in ((3, inside, 1, 1), (2, 3, 3, 3), (out, 2, 1, 1)))
    stem = "lora_unet_" + CONV.replace(".", "_")
    tensors = {"lora_down.weight": down, "lora_mid.weight": middle, "lora_up.weight": up, "alpha": torch.tensor(4.0)}
    lora = read({f"{stem}.{key}": tensor for key, tensor in tensors.items()}, shapes, tmp_path)
    weight = Changes([lora]).apply("unet", f"{CONV}.weight", torch.zeros(shapes["unet"][CONV])).float()
    x = torch.randn(1, inside, 6, 6, generator=generator)
    by_hand = 2.0 * conv2d(conv2d(conv2d(x, down), middle, padding=1), up)
    torch.testing.assert_close(conv2d(x, weight, padding=1), by_hand, rtol=1e-4, atol=1e-4)


def test_dora_by_kohyas_names_is_dora_of_peft(pipe, shapes, tmp_path):
    made = with_adapter(pipe.unet, use_dora=True, r=2, lora_alpha=1, target_modules=["attn1.to_q", "conv1"])
    tensors = {}
    for key, tensor in get_peft_model_state_dict(made).items():
        module, _, what = key.partition(".lora_")
        stem = "lora_unet_" + module.replace(".", "_")
        if what == "magnitude_vector":
            tensors[f"{stem}.dora_scale"] = tensor.reshape(-1, 1, 1, 1) if "conv" in module else tensor.reshape(-1, 1)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        else:
            tensors[f"{stem}.lora_{'down' if what.startswith('A') else 'up'}.weight"] = tensor.contiguous()
    assert_merged_alike(pipe.unet, read(tensors, shapes, tmp_path), fused(made))


def test_dora_on_a_layer_that_another_lora_changes_is_refused(pipe, shapes, tmp_path):
    """peft's layers and its merge disagree about it."""
    made = {"dora": {"use_dora": True, "target_modules": ["to_q"]}, "same": {}, "other": {"target_modules": ["to_k"]}}
    for name, settings in made.items():
        with_adapter(pipe.unet, **settings).save_lora_adapter(tmp_path / name)
    loras = {name: read_lora(tmp_path / name, shapes) for name in made}
    for first, second in (("dora", "same"), ("same", "dora"), ("dora", "dora")):
        with pytest.raises(InputError, match=r"both change unet\..*DoRA"):
            attach_loras(copy.deepcopy(pipe.unet), [(loras[first], 1.0), (read_lora(tmp_path / second, shapes), 1.0)])
    attach_loras(copy.deepcopy(pipe.unet), [(loras["dora"], 0.5), (loras["other"], 1.0)])


@pytest.mark.parametrize(
    ("added", "name"),
    [
        ({"bundle_emb.mychar.clip_l": (2, 64), "bundle_emb.mychar.clip_g": (2, 96)}, "mychar"),
        ({"bundle_emb.two.words.string_to_param.*": (2, 64)}, "two.words"),
        ({"emb_params": (1, 64)}, "emb_params"),
    ],
)
def test_embeddings_beside_a_lora_are_left_out_with_a_warning(shapes, tmp_path, added, name):
    tensors = plain(shapes, Q)
    with pytest.warns(UserWarning, match=f"trigger words .*{re.escape(name)}"):
        lora = read(tensors | {key: torch.ones(shape) for key, shape in added.items()}, shapes, tmp_path)
    assert set(lora.parts["unet"]) == {Q}
    save_file({key: torch.ones(shape) for key, shape in added.items()}, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="textual inversion"):
        read_lora(tmp_path / "alone.safetensors", shapes)


STEM = "lora_unet_" + Q.replace(".", "_")


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ({"lora_unet_out_0.w_norm": (16,), "lora_unet_out_0.b_norm": (16,)}, ["norms (LyCORIS)", "2 keys", "b_norm"]),
        ({f"{STEM}.diff": (32, 32)}, ["differences of whole weights"]),
        ({"lora_unet_conv_in.diff_b": (16,)}, ["differences of whole weights"]),
        ({"lora_unet_conv_in.set_weight": (16,)}, ["replace"]),
        ({f"{STEM}.lokr_w1": (2, 2), f"{STEM}.lokr_w2": (16, 16)}, ["LoKr"]),
        ({f"{STEM}.hada_w1_a": (32, 2)}, ["LoHa"]),
        ({f"{STEM}.oft_blocks": (2, 16, 16)}, ["OFT"]),
        ({f"base_model.model.{Q}.boft_R": (1, 2, 4, 4)}, ["BOFT"]),
        ({f"{STEM}.a1.weight": (2, 2)}, ["GLoRA"]),
        ({f"{STEM}.on_input": ()}, ["IA3"]),
        ({f"unet.{Q}.vera_lambda_b": (32,)}, ["VeRA"]),
        ({f"unet.{Q}.lora_E": (2, 1)}, ["AdaLoRA"]),
        ({"text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": (2, 9)}, ["token embeddings"]),
        ({"unet.conv_in.modules_to_save.weight": (16, 4, 3, 3)}, ["trained as a whole"]),
        ({"unet.conv_in.bias": (16,), "unet.conv_out.bias": (4,)}, ["biases", "2 of its 5", "unet.conv_in.bias"]),
        ({f"{STEM}.something": (2,)}, ["1 of its 4 keys are none of a LoRA's", "something"]),
        ({f"{STEM}.dora_scale": (1, 32)}, ["DoRA", "each input", "wd_on_output"]),
        ({f"{STEM}.dora_scale": (31, 1)}, ["(31, 1)", "each of 32 outputs"]),
        ({f"{STEM}.lora_up.bias": (31,)}, ["(31,)", "each of 32 outputs"]),
        ({f"{STEM}.lora_up.bias": (32,), f"{STEM}.dora_scale": (32, 1)}, ["a bias and a DoRA magnitude"]),
        ({f"{STEM}.lora_mid.weight": (2, 2)}, ["lora_mid is (2, 2)"]),
        ({f"unet.{Q}.lora_A.a.weight": (2, 32), f"unet.{Q}.lora_A.b.weight": (2, 32)}, ["more than one adapter"]),
        ({"clip_g.transformer.resblocks.0.attn.in_proj.lora_down.weight": (2, 48)}, ["q, k and v in one matrix"]),
        ({"lora_te3_encoder_block_0.lora_down.weight": (2, 48)}, ["third text encoder"]),
        ({"base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (2, 2)}, ["which of the two"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no adapter_config.json")
def test_what_cannot_be_applied_is_called_by_its_name(shapes, tmp_path, added, words):
    tensors = plain(shapes, Q) | {key: torch.ones(shape) for key, shape in added.items()}
    with pytest.raises(InputError) as error:
        read(tensors, shapes, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "another model" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, ["model's own weights", "pissa_niter_16"]),
        ({"init_lora_weights": "OLoRA"}, ["model's own weights", "OLoRA"]),
        ({"use_qalora": True}, ["QA-LoRA"]),
        ({"layer_replication": [[0, 1]]}, ["replicated"]),
        ({"peft_type": "LOHA"}, ["LOHA"]),
        ({"use_dora": True}, ["DoRA", "no magnitudes"]),
        ({"alpha_pattern": {"(": 1}}, ["alpha_pattern"]),
        ({"alpha_pattern": {"to_q": "much"}}, ["'much'", "number"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_settings_that_mean_something_else_than_a_lora(shapes, tmp_path, prefix, settings, words):
    said = json.dumps({f"{prefix}{name}": value for name, value in settings.items()})
    tensors = {f"{prefix}{Q}.lora_A.weight": torch.ones(2, 32), f"{prefix}{Q}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(InputError) as error:
        read(tensors, shapes, tmp_path, {"lora_adapter_metadata": said})
    for word in words:
        assert word in str(error.value)


def test_settings_without_an_alpha_mean_pefts_own(shapes, tmp_path):
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(2, 32), f"unet.{Q}.lora_B.weight": torch.ones(32, 2)}
    assert read(tensors, shapes, tmp_path).parts["unet"][Q].scale == 1
    lora = read(tensors, shapes, tmp_path, {"lora_adapter_metadata": json.dumps({"unet.r": 2})})
    assert lora.parts["unet"][Q].scale == LoraConfig().lora_alpha / 2


def test_a_file_of_peft_without_its_settings_is_warned_about(shapes, tmp_path):
    stem = f"base_model.model.{Q}.lora_"
    tensors = {f"{stem}A.weight": torch.ones(2, 32), f"{stem}B.weight": torch.ones(32, 2)}
    with pytest.warns(UserWarning, match="no adapter_config.json"):
        read(tensors, shapes, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": {"to_q": 5}}))
    assert read(tensors, shapes, tmp_path).parts["unet"][Q].scale == 2.5

"""Single files, as models come from Civitai: their layout, their marks, and what they are made of."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.config import ModelConfig
from draftcli.core.models.family import find_family
from draftcli.core.models.loading import load_parts
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.sdxl import SDXL_CONFIG
from draftcli.core.schedule import sigma_table
from tests.core.test_lora_files import ask
from tests.export.conftest import trained
from tests.export.merging import equal, merge, pipeline, tuned_unet
from tests.tiny import make_sdxl, write_single_file


def test_sdxls_own_table_of_names():
    """Spot checks against sd_xl_base_1.0.safetensors, at SDXL's real size, on the meta device."""
    found = {}
    for part, module in modules_on_meta(SDXL_CONFIG).items():
        keys = {}
        for key, tensor in module.state_dict().items():
            clean = key if not part.startswith("text") or key.startswith("text_") else f"text_model.{key}"
            keys[clean] = tuple(tensor.shape)
        for original in find_family().original_layout(part, keys):
            assert original.key not in found
            found[original.key] = original.sources
    unet, clip = "model.diffusion_model.", "conditioner.embedders."
    assert len([key for key in found if key.startswith(unet)]) == 1680
    for key, source in {
        f"{unet}input_blocks.0.0.weight": "conv_in.weight",
        f"{unet}input_blocks.3.0.op.bias": "down_blocks.0.downsamplers.0.conv.bias",
        f"{unet}input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
        f"{unet}input_blocks.8.1.proj_out.weight": "down_blocks.2.attentions.1.proj_out.weight",
        f"{unet}middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
        f"{unet}output_blocks.2.2.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        f"{unet}output_blocks.8.0.emb_layers.1.bias": "up_blocks.2.resnets.2.time_emb_proj.bias",
        f"{unet}label_emb.0.2.weight": "add_embedding.linear_2.weight",
        f"{unet}out.2.weight": "conv_out.weight",
        "first_stage_model.decoder.up.3.block.0.conv1.weight": "decoder.up_blocks.0.resnets.0.conv1.weight",
        "first_stage_model.encoder.down.1.block.0.norm1.bias": "encoder.down_blocks.1.resnets.0.norm1.bias",
        f"{clip}0.transformer.text_model.encoder.layers.11.mlp.fc2.bias": "text_model.encoder.layers.11.mlp.fc2.bias",
        f"{clip}1.model.transformer.resblocks.31.mlp.c_proj.weight": "text_model.encoder.layers.31.mlp.fc2.weight",
        f"{clip}1.model.text_projection": "text_projection.weight",
    }.items():
        assert found[key] == (source,), key
    assert [k.split(".")[-2] for k in found[f"{clip}1.model.transformer.resblocks.0.attn.in_proj_weight"]] == [
        "q_proj", "k_proj", "v_proj"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_single_file_trained_and_back_to_a_single_file(tmp_path, prediction, zero_snr):
    """As models come from Civitai: the prediction is known by two empty tensors, and extras are carried along."""
    model = make_sdxl(tmp_path / "model")  # its scheduler says epsilon: the file's own marks must win
    plain = load_file(write_single_file(model, tmp_path / "plain.safetensors"))
    marks = {"v_pred": torch.zeros(0)} if prediction == "v_prediction" else {}
    marks |= {"ztsnr": torch.zeros(0)} if zero_snr else {}
    extra = {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6), "denoiser.sigmas": sigma_table()}
    tensors = {k: v.half() for k, v in plain.items()} | extra | marks
    base = tmp_path / "civitai.safetensors"
    save_file(tensors, base, {"modelspec.author": "somebody", "modelspec.hash_sha256": "0x0"})
    assert load_parts_of(base, model) == (prediction, zero_snr)
    run = trained(base, tmp_path, "--set", f"model.config={model}")
    merge(run, "--format", "single-file", "--output", "merged.safetensors")
    after = load_file("merged.safetensors")
    assert after.keys() == tensors.keys()
    changed = {key for key in tensors if not equal(after[key], tensors[key])}
    assert len(changed) == 40
    assert all(key.startswith("model.diffusion_model.") for key in changed)
    with safe_open("merged.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.author"] == "somebody"
    assert "modelspec.hash_sha256" not in metadata
    assert metadata["modelspec.prediction_type"] == ("v" if marks else "epsilon")
    assert load_parts_of(Path("merged.safetensors"), model) == (prediction, zero_snr)
    merge(run, "--output", "folder", "--verify", "keys")
    scheduler = pipeline(Path("folder")).scheduler.config
    assert scheduler.prediction_type == prediction
    assert bool(scheduler.rescale_betas_zero_snr) == zero_snr


def load_parts_of(file, config):
    parts = load_parts(ModelConfig(pretrained=str(file), config=str(config)))
    return parts.prediction, parts.zero_terminal_snr


def test_from_a_folder_a_single_file_is_marked_as_v_prediction(tmp_path, run):
    base = make_sdxl(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True)
    merge(run, "--base", base, "--format", "single-file", "--output", "v.safetensors", "--verify", "keys")
    assert {"v_pred", "ztsnr"} <= load_file("v.safetensors").keys()


def test_a_folder_written_from_a_single_file_is_that_model(single_file, tiny_sdxl, run):
    merge(run, "--base", single_file, "--config", tiny_sdxl, "--output", "folder")
    before, after = pipeline(tiny_sdxl), pipeline(Path("folder"))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        one, two = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert all(equal(one[key], two[key]) for key in one)
    torch.testing.assert_close(ask(after.unet), ask(tuned_unet(tiny_sdxl, run / "final")), rtol=0, atol=1e-5)


def test_loras_of_text_encoders_go_into_both_layouts(single_file, tiny_sdxl):
    """OpenCLIP keeps query, key and value in one matrix, of which a LoRA may change a third."""
    tensors, updates, generator = {}, {}, torch.Generator().manual_seed(0)
    for number, width, layer in ((1, 32, 0), (2, 48, 1)):
        for name in ("k_proj", "out_proj"):
            stem = f"lora_te{number}_text_model_encoder_layers_{layer}_self_attn_{name}"
            down, up = torch.randn(1, width, generator=generator), torch.randn(width, 1, generator=generator)
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            updates[number, name] = up @ down
    save_file(tensors, "te.safetensors")
    first = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn."
    second = "conditioner.embedders.1.model.transformer.resblocks.1.attn."
    for base in (tiny_sdxl, single_file):
        common = ("--config", tiny_sdxl, "--format", "single-file", "--output", "out.safetensors", "--overwrite")
        merge("te.safetensors", "--base", base, *common)
        before, after = load_file(single_file), load_file("out.safetensors")
        moved = {key: after[key] - before[key] for key in before if not equal(before[key], after[key])}
        assert moved.keys() == {
            f"{first}k_proj.weight",
            f"{first}out_proj.weight",
            f"{second}in_proj_weight",
            f"{second}out_proj.weight",
        }
        torch.testing.assert_close(moved[f"{first}k_proj.weight"], updates[1, "k_proj"])
        torch.testing.assert_close(moved[f"{second}in_proj_weight"][48:96], updates[2, "k_proj"])
        assert not moved[f"{second}in_proj_weight"][:48].any()
        assert not moved[f"{second}in_proj_weight"][96:].any()
    merge("te.safetensors", "--base", tiny_sdxl, "--format", "kohya", "--output", "back.safetensors")
    assert {k for k in load_file("back.safetensors") if not k.endswith(".alpha")} == tensors.keys()

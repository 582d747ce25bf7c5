"""`draftp merge-lora` by its command line, on the tiny model: what it writes opens elsewhere and does the same."""

import json
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.lora.files import read_lora, weight_shapes
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.sdxl import SDXL_CONFIG, load_parts
from draftcli.errors import InputError
from draftcli.export import write
from draftcli.export.base import open_base
from draftcli.export.layout import original_layout
from tests.command import draftp
from tests.core.test_lora_files import ask
from tests.core.test_lora_files import write as write_lora_file
from tests.export.conftest import trained
from tests.tiny import make_sdxl, write_single_file

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL_QUERY = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"


def merge(*arguments, code=0):
    result = draftp("merge-lora", *arguments)
    assert result.code == code, result.out + result.err
    if code:
        assert code == 130 or result.err.count("\n") == 1, "one line"
        assert not list(Path.cwd().rglob("*.partial")), "nothing half done is left"
    return result


def refused(*arguments, words, code=2):
    message = merge(*arguments, code=code).err
    for word in words:
        assert word in message
    return message


def pipeline(path, config=None):
    if path.is_dir():
        return StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False)
    return StableDiffusionXLPipeline.from_single_file(str(path), config=str(config), add_watermarker=False)


def tuned_unet(base, lora_folder, scale=1.0):
    """As plain diffusers has it."""
    pipe = pipeline(base)
    pipe.load_lora_weights(lora_folder)
    pipe.unet.set_adapters(pipe.unet.active_adapters(), scale)
    return pipe.unet


def weights(path):
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def equal(one, two):
    return one.dtype == two.dtype and torch.equal(one, two)


def report(path):
    return json.loads((path / "draftp-merge.json" if path.is_dir() else path.with_suffix(".merge.json")).read_text())


# ------------------------------------------------------------------------------------------------------ the formats


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_a_merged_model_does_what_the_adapter_does_and_keeps_the_rest_bit_for_bit(run, tiny_sdxl, single_file, kind):
    output = Path("merged" if kind == "diffusers" else "merged.safetensors")
    out = merge(run, "--format", kind, "--output", output).out
    assert "40 of them changed" in out
    pipe = pipeline(output, tiny_sdxl)
    torch.testing.assert_close(ask(pipe.unet), ask(tuned_unet(tiny_sdxl, run / "final")), rtol=0, atol=1e-5)
    before, after = weights(tiny_sdxl if kind == "diffusers" else single_file), weights(output)
    shared = {k.split("/")[-1] if kind == "single-file" else k: v for k, v in before.items()}
    merged = {k.split("/")[-1] if kind == "single-file" else k: v for k, v in after.items()}
    assert shared.keys() == merged.keys()
    changed = {key for key in shared if not equal(shared[key], merged[key])}
    assert len(changed) == 40
    assert all("attn" in key or "ff.net" in key for key in changed)
    assert report(output)["verification"][0]["effect"] > 1e-3


def test_the_whole_folder_is_there_and_draws(run, tiny_sdxl):
    merge(run, "--output", "merged")

    def names(folder):
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    assert names(Path("merged")) == names(tiny_sdxl) | {"README.md", "draftp-merge.json"}
    pictures = pipeline(Path("merged"))("red", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_a_lora_loads_in_diffusers_and_does_the_same(run, tiny_sdxl, kind):
    output = Path("out" if kind == "lora" else "out.safetensors")
    merge(run, "--format", kind, "--output", output, "--scale", 0.5)
    pipe = pipeline(tiny_sdxl)
    pipe.load_lora_weights(output if kind == "lora" else ".", weight_name=None if kind == "lora" else output.name)
    torch.testing.assert_close(ask(pipe.unet), ask(tuned_unet(tiny_sdxl, run / "final", 0.5)), rtol=0, atol=1e-5)


def test_kohya_files_have_the_names_alphas_and_metadata_that_comfyui_and_a1111_look_for(run):
    merge(run, "--format", "kohya", "--output", "out.safetensors")
    tensors = load_file("out.safetensors")
    stem = "lora_unet_" + ORIGINAL_QUERY.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(
        ".", "_"
    )
    assert tensors[f"{stem}.lora_down.weight"].shape == (2, 32)
    assert tensors[f"{stem}.lora_up.weight"].shape == (32, 2)
    assert tensors[f"{stem}.alpha"] == 2
    assert len(tensors) == 3 * 40
    assert all(
        key.startswith(("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"))
        for key in tensors
    )
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "2.0")


def test_sdxls_own_table_of_names():
    """Spot checks against sd_xl_base_1.0.safetensors, at SDXL's real size, on the meta device."""
    found = {}
    for part, module in modules_on_meta(SDXL_CONFIG).items():
        keys = {}
        for key, tensor in module.state_dict().items():
            clean = key if not part.startswith("text") or key.startswith("text_") else f"text_model.{key}"
            keys[clean] = tuple(tensor.shape)
        for original in original_layout(part, keys):
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


def test_the_newest_run_is_taken_and_its_folder_gets_the_result(tiny_sdxl, run):
    shutil.copytree(run, "runs/mine")
    out = merge("--verify", "keys").out
    assert "written  runs/mine/export/mine-diffusers" in out.splitlines()
    assert "runs/mine x 1" in out
    assert pipeline(Path("runs/mine/export/mine-diffusers")).unet is not None


def test_quiet_is_quiet(run):
    result = merge(run, "--format", "lora", "--output", "x", "--verify", "keys", "--quiet")
    assert (result.out, result.err) == ("", "")


# ---------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_single_file_trained_and_back_to_a_single_file(tmp_path, prediction, zero_snr):
    """As models come from Civitai: the prediction is known by two empty tensors, and extras are carried along."""
    model = make_sdxl(tmp_path / "model")  # its scheduler says epsilon: the file's own marks must win
    plain = load_file(write_single_file(model, tmp_path / "plain.safetensors"))
    marks = {"v_pred": torch.zeros(0)} if prediction == "v_prediction" else {}
    marks |= {"ztsnr": torch.zeros(0)} if zero_snr else {}
    extra = {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6), "denoiser.sigmas": torch.ones(1000)}
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
    from draftcli.config import ModelConfig

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


# -------------------------------------------------------------------------------------------- several, ranks, scales


def test_every_naming_with_every_kind_of_layer_can_be_merged(tiny_sdxl, lora_of_all_kinds):
    for naming in ("old diffusers", "kohya", "kohya by diffusers' names"):
        write_lora_file(lora_of_all_kinds, Path("in.safetensors"), naming, open_base(str(tiny_sdxl)).shapes()["unet"])
        out = merge("in.safetensors", "--base", tiny_sdxl, "--output", "merged", "--overwrite").out
        assert "20 of them changed" in out


@pytest.fixture
def lora_of_all_kinds(tiny_sdxl):
    from tests.core.test_lora_files import RANKS, Lora, Update

    pipe = pipeline(tiny_sdxl)
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for part, ranks in RANKS.items():
        known = {
            n if n.startswith("text_") or part == "unet" else f"text_model.{n}": s
            for n, s in weight_shapes(getattr(pipe, part)).items()
        }
        for name, rank in ranks.items():
            out, *rest = known[name]
            down, up = (
                torch.randn(rank, *rest, generator=generator),
                0.05 * torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator),
            )
            parts.setdefault(part, {})[name] = Update(down, up, 0.7)
    return Lora("made here", parts)


def test_several_with_scales_add_up_exactly(tiny_sdxl, run):
    merge(run, "--format", "kohya", "--output", "one.safetensors", "--verify", "keys")
    merge(f"{run}=0.5", "one.safetensors=-0.25", "--base", tiny_sdxl, "--output", "merged", "--scale", 2)
    torch.testing.assert_close(
        ask(pipeline(Path("merged")).unet), ask(tuned_unet(tiny_sdxl, run / "final", 0.5)), rtol=0, atol=1e-5
    )
    merge(f"{run}=0.5", "one.safetensors=-0.25", "--base", tiny_sdxl, "--format", "lora", "--output", "lora")
    assert load_file("lora/pytorch_lora_weights.safetensors")[f"unet.{QUERY}.lora_A.weight"].shape == (4, 32)


def test_rank_is_the_best_approximation_and_its_error_is_stated(tiny_sdxl, run, lora_of_all_kinds):
    shapes = open_base(str(tiny_sdxl)).shapes()
    write_lora_file(lora_of_all_kinds, Path("other.safetensors"), "kohya", shapes["unet"])
    both = (run, "other.safetensors=0.5", "--base", tiny_sdxl, "--format", "lora")
    merge(*both, "--output", "whole", "--verify", "keys")
    out = merge(*both, "--output", "small", "--rank", 2).out
    whole, small = (read_lora(Path(name), shapes) for name in ("whole", "small"))
    lost = size = 0.0
    for part, module, update in whole.updates():
        exact, kept = update.delta(), small.parts[part][module].delta()
        singular = torch.linalg.svdvals(exact.flatten(1))
        assert float((exact - kept).norm()) == pytest.approx(float(singular[2:].norm()), abs=1e-5)
        lost, size = lost + float((exact - kept).square().sum()), size + float(exact.square().sum())
    assert max(update.rank for _, _, update in small.updates()) == 2
    assert report(Path("small"))["compression"]["relative"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert f"{(lost / size) ** 0.5:.2%}" in out
    assert "nothing is lost" in merge(run, "--format", "lora", "--rank", 8, "--output", "same").out


def test_a_run_that_trained_the_whole_unet(full_run, tiny_sdxl):
    merge(full_run, "--output", "merged")
    tuned = load_file(full_run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(equal(t, tuned[k]) for k, t in load_file("merged/unet/diffusion_pytorch_model.safetensors").items())
    merge(f"{full_run}=0.5", "--output", "half.safetensors", "--format", "single-file")
    base, half = pipeline(tiny_sdxl).unet.state_dict(), pipeline(Path("half.safetensors"), tiny_sdxl).unet.state_dict()
    assert all(torch.allclose(half[k], (base[k] + tuned[k]) / 2, atol=1e-6) for k in base)
    refused(full_run, "--format", "lora", "--output", "x", words=["--rank"])
    out = merge(full_run, "--format", "kohya", "--rank", 4, "--output", "extracted.safetensors").out
    assert "rank 4: error" in out
    assert "biases and norms" in out
    assert 0 < report(Path("extracted.safetensors"))["compression"]["relative"] < 1


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casting_leaves_the_vae_and_says_how_far_it_moves_the_output(run, dtype, expected):
    out = merge(run, "--scale", 4, "--dtype", dtype, "--output", "merged").out
    dtypes = {k: v.dtype for k, v in weights(Path("merged")).items()}
    assert {v for k, v in dtypes.items() if k.startswith("vae/")} == {torch.float32}
    assert {v for k, v in dtypes.items() if k.startswith(("unet/", "text_"))} == {expected}
    comparison = report(Path("merged"))["verification"][0]
    assert 1e-6 < comparison["difference"] < comparison["tolerance"]
    assert f"rounding to {dtype}" in out


def test_what_float16_cannot_hold_is_refused(tiny_sdxl, run):
    message = refused(run, "--scale", 1e8, "--dtype", "fp16", "--output", "x", words=["fp16 ends at", "bf16 or fp32"])
    assert "unet." in message
    assert not Path("x").exists()


def test_a_change_that_rounding_swallows_is_refused(run):
    refused(run, "--scale", 1e-4, "--dtype", "bf16", "--output", "x", words=["would be lost", "--dtype fp32"], code=1)
    assert not Path("x").exists()


def test_the_toy_is_merged_in_its_own_float16(tmp_path):
    settings = {"max_steps": 2, "val_check_interval": 0}
    options = [f"--set=trainer.{k}={v}" for k, v in settings.items()]
    result = draftp(
        "train",
        "--preset",
        "toy",
        *options,
        "--set=held_out_rewards=[]",
        "--set=sampling.steps=4",
        "--set=draftp.truncation_steps=2",
        "--quiet",
    )
    assert result.code == 0, result.err
    out = merge().out
    assert "rounding to fp16" in out
    assert "written  runs/toy/export/toy-diffusers" in out


def test_shards(run):
    merge(run, "--max-shard-gb", 0.001, "--output", "sharded")
    shards = list(Path("sharded/unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert max(p.stat().st_size for p in shards) < 1.1e6
    merge(run, "--base", "sharded", "--output", "again", "--verify", "keys")
    assert weights(Path("again/vae")).keys()


# --------------------------------------------------------------------------------------------------- what is refused


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


def test_existing_output_is_kept_unless_told_and_foreign_folders_always(run):
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


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_a_push_to_the_hub_hands_its_client_the_files_and_a_card(run, kind):
    """Against a stand-in for the hub's client; no real upload was ever tried."""
    output = "out" if kind == "lora" else "out.safetensors"
    with mock.patch("huggingface_hub.HfApi") as client:
        api = client.return_value
        api.create_repo.return_value = "https://hub/me/mine"
        out = merge(
            run, "--format", kind, "--output", output, "--verify", "keys", "--push-to-hub", "me/mine", "--private"
        ).out
        assert "uploaded https://hub/me/mine" in out
        api.create_repo.assert_called_once_with("me/mine", private=True, exist_ok=True)
        card = api.upload_file.call_args.kwargs["path_or_fileobj"].decode()
        assert 'pipe.load_lora_weights("me/mine")' in card
        assert "base_model:" in card
        assert api.upload_folder.called == (kind == "lora")
        api.create_repo.side_effect = OSError("401 Unauthorized")
        refused(
            run,
            "--format",
            kind,
            "--output",
            output,
            "--overwrite",
            "--push-to-hub",
            "me/mine",
            words=["is written, but was not uploaded", "401"],
            code=1,
        )
    assert Path(output).exists()


# ---------------------------------------------------------------------------------------------------------- documents

ROOT = Path(__file__).parents[2]
DOCUMENTED = {
    line.strip()
    for page in (ROOT / "README.md", ROOT / "docs" / "formats.md")
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("draftp merge-lora")
}


@pytest.mark.parametrize("line", sorted(DOCUMENTED))
def test_documented_commands_are_understood(line):
    """Their options exist, and what they ask for is allowed; the work itself is tested above."""
    requests = []

    def stop(request, console):
        request.check()
        requests.append(request)
        raise InputError("far enough")

    with mock.patch("draftcli.export.merge.merge", stop):
        assert "far enough" in draftp(*line.split()[1:]).err
    assert requests

"""`draftp merge-lora` by its command line, on the tiny model: what it writes opens elsewhere and does the same."""

import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.lora.files import weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.errors import InputError
from draftcli.export.base import open_base
from tests.command import draftp
from tests.core.test_lora_files import TAKES_ALL_OF_KOHYA, ask
from tests.core.test_lora_files import write as write_lora_file
from tests.export.merging import QUERY, equal, merge, pipeline, refused, report, tuned_unet, weights

ORIGINAL_QUERY = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"


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
    pipe.load_lora_weights(output if kind == "lora" else ".", weight_name=LORA_FILE if kind == "lora" else output.name)
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


def test_the_newest_run_is_taken_and_its_folder_gets_the_result(tiny_sdxl, run):
    shutil.copytree(run, "runs/mine")
    out = merge("--verify", "keys").out
    assert "written  runs/mine/export/mine-diffusers" in out.splitlines()
    assert "runs/mine x 1" in out
    assert pipeline(Path("runs/mine/export/mine-diffusers")).unet is not None


def test_quiet_is_quiet(run):
    result = merge(run, "--format", "lora", "--output", "x", "--verify", "keys", "--quiet")
    assert (result.out, result.err) == ("", "")


# ----------------------------------------------------------------------------------------------- several, ranks, scales


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
    extracted = (full_run, "--format", "kohya", "--rank", 4, "--output", "extracted.safetensors")
    if not TAKES_ALL_OF_KOHYA:
        failed = draftp("merge-lora", *extracted)
        assert failed.code == 1
        assert "does not take extracted.safetensors; update it, or take --verify keys" in failed.err
        extracted += ("--verify", "keys")
    out = merge(*extracted).out
    assert "rank 4: error" in out
    assert "biases and norms" in out
    assert 0 < report(Path("extracted.safetensors"))["compression"]["relative"] < 1


# ------------------------------------------------------------------------------------------------------------ precision


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


# -------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_a_push_to_the_hub_hands_its_client_the_files_and_a_card(run, tiny_sdxl, kind):
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
        assert "base_model" not in card, "the base is a folder here"
        assert f"from {tiny_sdxl} and:" in card
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


# ------------------------------------------------------------------------------------------------------------ documents


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

    there = mock.patch("draftcli.export.arguments.check_arguments")  # the files that a page names are not here
    with there, mock.patch("draftcli.export.merge.merge", stop):
        assert "far enough" in draftp(*line.split()[1:]).err
    assert requests

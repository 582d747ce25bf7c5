"""kohya's LoRA files, as ComfyUI, A1111, Forge and sd-scripts look for them: names, forms, metadata, hashes."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.lora.adapters import DEFAULT_TARGETS
from draftcli.core.lora.files import Lora, Update
from draftcli.core.models.family import find_family
from draftcli.errors import InputError
from draftcli.export.base import family_shapes
from draftcli.export.kohya import kohya_tensors
from tests.export.conftest import trained
from tests.export.merging import merge
from tests.tiny import make_sdxl, write_single_file

# Written out once, and looked up by the programs' own code (benchmarks/clients): NAME SHAPE-OF-THE-WEIGHT, a line each.
TABLE = Path(__file__).with_name("sdxl_kohya_names.txt")


def names_in(table: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of each name's weight, by section of a table."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in table.read_text().splitlines():
        if line.startswith("#"):
            section = found.setdefault(line.removeprefix("# "), {})
        else:
            name, shape = line.split()
            section[name] = tuple(map(int, shape.split("x")))
    return found


def lora_of(shapes, rank=4, scale=0.5):
    """A LoRA of all these layers, without data."""

    def update(shape):
        kernel = (1,) * len(shape[2:])
        return Update(
            torch.empty(rank, *shape[1:], device="meta"), torch.empty(shape[0], rank, *kernel, device="meta"), scale
        )

    return Lora("made here", {p: {m: update(s) for m, s in layers.items()} for p, layers in shapes.items()})


def clean(shapes):
    """The linear layers and convolutions, text encoders' always with `text_model.`, as a LoRA has them."""
    start = {"unet": "", "text_encoder": "text_model.", "text_encoder_2": "text_model."}
    return {
        part: {
            m if m.startswith(("text_", start[part])) else start[part] + m: s
            for m, s in layers.items()
            if ".embeddings." not in f".{m}"
        }
        for part, layers in shapes.items()
    }


def described(tensors):
    """By module: the shape of the weight that its matrices are for."""
    found = {}
    for key in (key for key in tensors if key.endswith(".lora_down.weight")):
        stem = key.removesuffix(".lora_down.weight")
        down, up, alpha = (tensors[f"{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert alpha.shape == (), stem
        assert alpha.dtype == torch.float32, stem
        assert down.shape[0] == up.shape[1] == 4 == alpha, stem
        assert up.shape[2:] in ((), (1, 1)), stem
        found[stem] = (up.shape[0], *down.shape[1:])
    assert len(tensors) == 3 * len(found)
    return found


def test_sdxls_700_modules_that_are_trained_by_default():
    unet = family_shapes(find_family())["unet"]
    chosen = {m: s for m, s in unet.items() if any(m.endswith(f".{target}") for target in DEFAULT_TARGETS)}
    found = described(kohya_tensors(lora_of({"unet": chosen}), unet, find_family()))
    assert found == names_in(TABLE)["trained by default: 700 modules"]
    assert len(found) == 700


def test_sdxls_1059_modules_with_convolutions_embeddings_and_text_encoders():
    shapes = clean(family_shapes(find_family()))
    found = described(kohya_tensors(lora_of(shapes), shapes["unet"], find_family()))
    first, others = names_in(TABLE).values()
    assert found == first | others
    assert len(found) == 1059
    starts = ("lora_unet_", "lora_te1_", "lora_te2_")
    assert [sum(name.startswith(start) for name in found) for start in starts] == [794, 72, 193]


def test_a_module_without_a_name_is_refused_by_name():
    lora = lora_of({"unet": {"time_embedding.cond_proj": (1280, 256), "conv_in": (320, 4, 3, 3)}})
    with pytest.raises(InputError, match=r"^time_embedding\.cond_proj of the UNet: .* --format lora"):
        kohya_tensors(lora, family_shapes(find_family())["unet"], find_family())


def sdxl_lora(file: Path, **layers: tuple[int, ...]) -> Path:
    """A LoRA of rank 64 for these modules of SDXL (`__` for a dot), larger than a MiB."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (out, *rest) in layers.items():
        module, kernel = name.replace("__", "."), (1,) * len(rest[1:])
        tensors[f"{module}.lora_A.weight"] = torch.randn(64, *rest, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, 64, *kernel, generator=generator)
    save_file(tensors, file)
    return file


MIDDLE = {f"unet__mid_block__attentions__0__{name}": (1280, 1280) for name in ("proj_in", "proj_out")}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_hashes_are_those_that_a1111_and_kohya_compute(dtype):
    sdxl_lora(Path("in.safetensors"), **MIDDLE)
    merge("in.safetensors", "--format", "kohya", "--verify", "keys", "--dtype", dtype, "--output", "out.safetensors")
    data = Path("out.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    said = json.loads(data[8:start])["__metadata__"]
    digest = hashlib.sha256(data[start:]).hexdigest()
    assert (said["sshs_model_hash"], said["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    if dtype == "fp32":  # with other dtypes safetensors has another order of tensors than ours
        ours = {key: value for key, value in said.items() if key.startswith("ss_")}
        alone = safetensors.torch.save(load_file("out.safetensors"), ours)
        assert said["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
        assert len(alone) > 0x110000
    tensors = load_file("out.safetensors")
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {wanted}
    assert {t.dtype for key, t in tensors.items() if key.endswith("alpha")} == {torch.float32}


def test_merging_twice_gives_the_same_bytes():
    sdxl_lora(Path("in.safetensors"), **MIDDLE)
    for kind in ("kohya", "lora"):
        for folder in ("one", "two"):
            Path(folder).mkdir(exist_ok=True)
            merge("in.safetensors", "--format", kind, "--verify", "keys", "--output", f"{folder}/{kind}.safetensors")
        assert Path(f"one/{kind}.safetensors").read_bytes() == Path(f"two/{kind}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"unet__conv_in": (320, 4, 3, 3), "unet__conv_out": (4, 320, 3, 3)}, "conv_in, conv_out"),
        (
            {"unet__time_embedding__linear_1": (1280, 320), "unet__add_embedding__linear_2": (1280, 1280)},
            "add_embedding.linear_2, time_embedding.linear_1",
        ),
        ({"text_encoder_2__text_projection": (1280, 1280)}, "text_encoder_2.text_projection"),
        ({"unet__down_blocks__0__resnets__0__time_emb_proj": (320, 1280)}, None),
    ],
)
def test_modules_that_kohya_has_no_place_for_are_named_in_one_line(layers, named):
    sdxl_lora(Path("in.safetensors"), **MIDDLE, **layers)
    result = merge("in.safetensors", "--format", "kohya", "--verify", "keys", "--output", "x.safetensors")
    assert result.err.count("\n") == (named is not None)
    assert named is None or result.err.startswith(f"warning: {named}: kohya's sd-scripts has no place")
    stems = {key.partition(".")[0] for key in load_file("x.safetensors")}
    assert len(stems) == len(MIDDLE) + len(layers), "they are written all the same, for programs that apply them"
    quiet = merge("in.safetensors", "--format", "lora", "--verify", "keys", "--output", "y.safetensors")
    assert quiet.err == ""


def said_by(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_metadata_of_a_merged_run_is_the_runs(run, tiny_sdxl):
    merge(run, "--format", "kohya", "--output", "out.safetensors")
    said = said_by("out.safetensors")
    expected = {
        "modelspec.title": "out",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.merged_from": str(run),
        "ss_steps": "4",
        "ss_sd_model_name": tiny_sdxl.name,
        "ss_resolution": "(64, 64)",
        "ss_zero_terminal_snr": "False",
        "ss_output_name": "out",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert said["modelspec.date"][:4] >= "2026"
    assert said["modelspec.description"].startswith(
        "fine-tuned with DRaFT+ on tests.example_rewards:red, 4 steps; made"
    )
    merge(run / "step-000002", "--format", "kohya", "--verify", "keys", "--output", "two.safetensors")
    assert said_by("two.safetensors")["ss_steps"] == "2"


def test_without_a_run_and_a_base_nothing_is_made_up():
    sdxl_lora(Path("in.safetensors"), **MIDDLE)
    merge("in.safetensors", "--format", "kohya", "--verify", "keys", "--output", "out.safetensors")
    said = said_by("out.safetensors")
    assert said["modelspec.resolution"] == "1024x1024", "SDXL's own"
    assert said["modelspec.description"].startswith("made by draftp")
    for unknown in ("modelspec.prediction_type", "ss_sd_model_name", "ss_steps", "ss_zero_terminal_snr"):
        assert unknown not in said


@pytest.mark.parametrize("file", ["final/run-kohya.safetensors", "out.safetensors"])
def test_a_lora_of_a_v_prediction_model_says_so(tmp_path, file):
    base = make_sdxl(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True)
    run = trained(base, tmp_path)
    merge(run, "--format", "kohya", "--output", run / "out.safetensors")
    said = said_by(run / file)
    assert (said["modelspec.prediction_type"], said["ss_zero_terminal_snr"]) == ("v", "True")


def test_what_a_run_was_told_of_its_model_is_said_of_the_result(tmp_path, tiny_sdxl):
    """A v-prediction model whose files don't say so: the run knew, and the result bears the marks."""
    base = write_single_file(tiny_sdxl, tmp_path / "unmarked.safetensors")
    told = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    model = {"pretrained": str(base), "config": str(tiny_sdxl), **told}
    run = trained(base, tmp_path, model=model)
    merge(run, "--format", "single-file", "--verify", "keys", "--output", "merged.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file("merged.safetensors").keys()
    merge(run, "--format", "diffusers", "--verify", "keys", "--output", "merged")
    scheduler = json.loads(Path("merged/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    said = said_by(run / "final" / "run-kohya.safetensors")
    assert (said["modelspec.prediction_type"], said["ss_zero_terminal_snr"]) == ("v", "True")
    merge(
        run,
        "--base",
        base,
        "--config",
        tiny_sdxl,
        "--verify",
        "keys",
        "--format",
        "single-file",
        "--output",
        "plain.safetensors",
    )
    assert not {"v_pred", "ztsnr"} & load_file("plain.safetensors").keys(), "of another base the run knows nothing"

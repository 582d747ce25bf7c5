"""Files of weights and configurations: fuzzed (tests/faults/fuzzing.py)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from draftcli.core.lora.files import weight_shapes
from draftcli.core.lora.reading import read_lora
from draftcli.core.models.loading import load_parts
from draftcli.evaluation.evaluate import read_seconds
from draftcli.evaluation.measure import read_chunk
from draftcli.export.base import open_base
from draftcli.export.inputs import find_inputs
from draftcli.export.tensors import close_files
from draftcli.runs import Run
from draftcli.sampling import files
from draftcli.training import checkpoint, session
from tests.command import draftp
from tests.faults.fuzzing import EDITS, JSON_VALUE, TEXT, changed, fuzz, tried
from tests.faults.test_fuzz import INDEX_LINES
from tests.tiny import tiny_config, write_single_file


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the inputs lie: one for all inputs of a test, which hypothesis asks for."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def working_directory(folder, monkeypatch):
    """Instead of one for each test."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def shapes(tiny_sdxl):
    networks = load_parts(tiny_config(tiny_sdxl).model).modules
    return {name: weight_shapes(network) for name, network in networks.items() if name != "vae"}


DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
          "C64": 8, "U16": 2, "F8_E8M0": 1, "F4": 1}  # fmt: skip
LAYERS = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1",
          "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]  # fmt: skip
SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32]), max_size=5) | st.sampled_from(
    [[2, 32], [32, 2], [2, 16, 3, 3], [16, 2, 1, 1], [16, 2, 3, 3], [0, 32], [32, 0], [2, 32, 1, 1], [], [2, 80]]
)


def spelled(layer: str, style: str, side: str) -> str:
    kohya = "lora_unet_" + layer.replace(".", "_")
    return {
        "diffusers": f"unet.{layer}.lora_{'A' if side == 'down' else 'B'}.weight",
        "old": f"unet.{layer}.lora.{side}.weight",
        "peft": f"base_model.model.{layer}.lora_{'A' if side == 'down' else 'B'}.weight",
        "kohya": f"{kohya}.lora_{side}.weight",
        "te": f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{side}.weight",
    }[style]


@st.composite
def lora_headers(draw: Any) -> bytes:
    """Files whose header says what it likes, with as many bytes after it as it says."""
    header: dict[str, Any] = {}
    size = 0
    for layer in draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3)):
        style = draw(st.sampled_from(["diffusers", "old", "peft", "kohya", "te"]))
        keys = [spelled(layer, style, side) for side in ("down", "up")]
        if draw(st.booleans()):
            keys.append(re.sub(r"\.lora.*", "", keys[0]) + ".alpha")
        if draw(st.integers(0, 9)) == 0:
            keys.append(draw(TEXT))
        for key in keys:
            dtype, shape = draw(st.sampled_from([*DTYPES, *["F32"] * 10])), draw(SHAPE)
            if draw(st.booleans()) and layer == LAYERS[0]:
                shape = [2, 32] if "down" in key or "_A" in key else [32, 2]
            bytes_ = int(torch.Size(shape).numel()) * DTYPES[dtype] if shape else DTYPES[dtype]
            off = draw(st.sampled_from([0] * 20 + [1, -1, 2**60]))
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + bytes_ + off]}
            size += bytes_
    alphas = st.fixed_dictionaries({"unet.lora_alpha": JSON_VALUE, "unet.alpha_pattern": JSON_VALUE})
    said = (alphas | JSON_VALUE).map(json.dumps) | TEXT
    metadata = draw(
        st.none() | st.dictionaries(TEXT, TEXT, max_size=2) | said.map(lambda x: {"lora_adapter_metadata": x})
    )
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode("utf-8", "replace")
    length = draw(st.sampled_from([len(text)] * 20 + [0, 7, 2**40, 2**63]))
    fill = draw(st.sampled_from([b"\0", b"\x3f", b"\xff", b"\x01"]))
    return length.to_bytes(8, "little") + text + fill * min(size, 10**5)


@fuzz(400)
@given(lora_headers())
def test_headers_of_loras(tiny_sdxl, shapes, content):
    path = Path("lora.safetensors")
    path.write_bytes(content)
    with tried(Path()):
        lora = read_lora(path, shapes)
        for _, _, update in lora.scaled(0.5).updates():
            update.delta()


@pytest.fixture(scope="module")
def few(lora_run):
    """A few tensors of a trained LoRA, as two kinds of files."""
    tensors = load_file(lora_run / "final" / "pytorch_lora_weights.safetensors")
    diffusers = dict(list(tensors.items())[:4])
    kohya = {}
    for key, tensor in diffusers.items():
        stem = key.removeprefix("unet.").partition(".lora_")[0].replace(".", "_")
        side = "down" if "lora_A" in key else "up"
        kohya |= {f"lora_unet_{stem}.lora_{side}.weight": tensor, f"lora_unet_{stem}.alpha": torch.tensor(2.0)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 2})}
    return {"diffusers": save(diffusers, metadata), "kohya": save(kohya)}


def header_end(whole: bytes) -> int:
    return 8 + int.from_bytes(whole[:8], "little")


@fuzz(150)
@given(st.sampled_from(["diffusers", "kohya"]), EDITS)
def test_lora_files_with_changed_headers(few, shapes, kind, edits):
    path = Path("lora.safetensors")
    path.write_bytes(changed(few[kind], edits, header_end(few[kind])))
    with tried(Path()):
        for _, _, update in read_lora(path, shapes).updates():
            update.delta()


@pytest.fixture(scope="module")
def single_file(tiny_sdxl, folder):
    return write_single_file(tiny_sdxl, folder / "whole.safetensors").read_bytes()


@fuzz(40)
@given(EDITS)
def test_single_files_with_changed_headers(tiny_sdxl, single_file, edits):
    """As merge-lora opens them: only headers are read."""
    path = Path("changed.safetensors")
    path.write_bytes(changed(single_file, edits, header_end(single_file)))
    close_files()
    with tried(Path()):
        open_base(str(path), str(tiny_sdxl))
    close_files()


@pytest.fixture(scope="module")
def model(tiny_sdxl, folder):
    return Path(shutil.copytree(tiny_sdxl, folder / "model"))


CONFIGURATIONS = ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
                  "unet/diffusion_pytorch_model.safetensors.index.json"]  # fmt: skip


@fuzz(60)
@given(st.sampled_from(CONFIGURATIONS), EDITS | JSON_VALUE.map(json.dumps)
       | JSON_VALUE.map(lambda value: json.dumps({"weight_map": value, "prediction_type": value})))  # fmt: skip
@example(CONFIGURATIONS[0], "[" * 50_000)
@example(CONFIGURATIONS[1], "[" * 50_000)
@example(CONFIGURATIONS[1], '{"layers_per_block": 1000000000}')
@example(CONFIGURATIONS[4], '{"weight_map": {"a": 3, "b": []}}')
@example(CONFIGURATIONS[4], '{"weight_map": {"a": "../../../etc/passwd"}}')
def test_configurations_of_models(model, name, content):
    path, weights = model / name, model / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes() if path.is_file() else b"{}"
    path.write_bytes(content.encode() if isinstance(content, str) else changed(whole, content))
    if "index" in path.name and path.parent != model:
        weights.rename("kept")
    with tried(Path()):
        open_base(str(model))
    if "index" in path.name and path.parent != model:
        Path("kept").rename(weights)
        path.unlink()
    else:
        path.write_bytes(whole)


@fuzz(100)
@given(TEXT)
@example("x" * 300)
def test_names_of_what_is_merged(name):
    with tried(Path()):
        find_inputs([name])


@fuzz(100)
@given(INDEX_LINES)
@example(['{"file": "\\ud800.png"}', '{"file": "' + "x" * 300 + '"}', "[" * 100_000])
def test_indexes_that_are_written_again(lines):
    path = Path("index.jsonl")
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with tried(Path()):
        for name, line in files.read_index(path).items():
            (path.parent / name).is_file()
            json.dumps(line, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def resuming(lora_run, folder, tiny_sdxl):
    """A finished run, and a function that resumes it."""
    run = Run(Path(shutil.copytree(lora_run, folder / "run")))
    held: list[Any] = []

    def caught(*arguments: Any) -> int:
        held.extend(arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "resume", caught)
        assert (
            draftp("train", "--preset", run.config, "--output", run.folder, "--set", "trainer.max_steps=3").code == 130
        )
    return run, lambda: session.resume(*held)


def write_sums(newest: Path) -> None:
    manifest = newest / checkpoint.MANIFEST
    files = [path for path in newest.rglob("*") if path.is_file() and path != manifest]
    sums = {path.relative_to(newest).as_posix(): checkpoint._checksum(path) for path in files}
    manifest.write_text(json.dumps(sums), encoding="utf-8")


@fuzz(100)
@given(st.integers(0, 3), EDITS, st.booleans())
def test_checkpoints(resuming, number, edits, with_new_sums):
    """With the checksums of before, so that it is noticed; and with new ones, as of somebody who means harm."""
    run, resume = resuming
    newest = run.checkpoints()[0]
    kept = {path: path.read_bytes() for path in sorted(newest.rglob("*")) if path.is_file()}
    path = [*kept][number % len(kept)]
    path.write_bytes(changed(kept[path], edits, 3000))
    if with_new_sums and path.name != checkpoint.MANIFEST:
        write_sums(newest)
    with tried(Path()):
        resume()
    for file, content in kept.items():
        file.write_bytes(content)


STATE = ["step", "schedule", "grad_scaler", "rewards", "skipped", "prompts", "optimizer", "ema"]


@fuzz(60)
@given(st.dictionaries(st.sampled_from(STATE), JSON_VALUE, min_size=1, max_size=3))
def test_states_that_are_no_states(resuming, values):
    """A checkpoint of something else, whose checksums fit."""
    run, resume = resuming
    newest = run.checkpoints()[0]
    kept = {path: path.read_bytes() for path in (newest / "state.pt", newest / checkpoint.MANIFEST)}
    torch.save(torch.load(newest / "state.pt", weights_only=True) | values, newest / "state.pt")
    write_sums(newest)
    with tried(Path()):
        resume()
    for path, content in kept.items():
        path.write_bytes(content)


def test_caches_of_eval_that_are_damaged_are_made_anew(folder):
    for content in (b"", b"[1]", b"[" * 100_000, b'{"a": "x"}', b"\xff"):
        Path("seconds.json").write_bytes(content)
        assert read_seconds(Path("seconds.json")) == {}
    np.savez("chunk.npz", features=np.ones((2, 3)))
    whole = Path("chunk.npz").read_bytes()
    assert read_chunk(Path("chunk.npz")) is not None
    for content in (b"", whole[:-30], whole[:40], b"x" + whole[1:]):
        Path("chunk.npz").write_bytes(content)
        assert read_chunk(Path("chunk.npz")) is None

"""`draftp doctor` on a healthy model, and on models with real faults in their files."""

import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from draftcli.core.engine import sharding
from draftcli.planning import doctor
from tests.command import draftp, recipe


def broken_copy(folder: Path, part: str, ending: str, factor: float) -> Path:
    """The tiny model with the tensors of one part whose names end so multiplied."""
    copy = Path("broken").absolute()
    shutil.copytree(folder, copy)
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    changed = [name for name in tensors if name.endswith(ending)]
    assert changed
    for name in changed:
        tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("scheme", ["lora", "none"])
def test_a_healthy_model_passes_without_gpu_and_hub(tiny_sdxl, scheme):
    result = draftp("doctor", "--preset", recipe(tiny_sdxl, peft={"peft_scheme": scheme, "rank": 2}))
    assert result.code == 0, result.out
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines if " failed " in line] == []
    for what in ("gradient", "adapters off", "VAE", "attention", "dtype"):
        assert any(line.startswith(what) and " ok " in line for line in lines), what
    assert any(line.startswith("hub") and "warning" in line for line in lines), "the tests are offline"
    assert lines[-1] == "healthy"


def test_compile_is_tried_where_it_splits_weights(tiny_sdxl, monkeypatch):
    def without_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    wanted = recipe(tiny_sdxl, sharding={"compile": True})
    monkeypatch.setattr(sharding, "COMPILER", "aot_eager")
    assert any(line.startswith("compile        ok") for line in draftp("doctor", "--preset", wanted).out.splitlines())
    monkeypatch.setattr(sharding, "COMPILER", without_compiler)
    result = draftp("doctor", "--preset", wanted)
    assert result.code == 1
    said = " ".join(result.out.split())
    assert "compile failed torch.compile does not work here, set sharding.compile=false (" in said
    assert "no C++ compiler" in said


def test_a_vae_that_overflows_in_fp16_is_found_and_float32_mends_it(tiny_sdxl):
    model = broken_copy(tiny_sdxl, "vae", "decoder.mid_block.resnets.0.conv2.weight", 1e6)
    preset = recipe(model)
    result = draftp("doctor", "--preset", preset, "--set", "model.vae_precision=fp16")
    assert result.code == 1
    assert "not finite in float16" in " ".join(result.out.split())
    assert "vae_precision=fp32" in " ".join(result.out.split())
    assert draftp("doctor", "--preset", preset).code == 0


def test_a_weight_that_no_gradient_reaches_is_named(tiny_sdxl):
    model = broken_copy(tiny_sdxl, "unet", "mid_block.attentions.0.proj_out.weight", 0.0)
    result = draftp("doctor", "--preset", recipe(model))
    assert result.code == 1
    assert "get none, such as mid_block.attentions.0" in " ".join(result.out.split())
    assert result.out.splitlines()[-1] == "not healthy: 1 failed"


def test_a_model_that_is_not_there_and_a_folder_that_cannot_be(tiny_sdxl):
    Path("file").write_text("")
    result = draftp("doctor", "--preset", recipe(Path("nowhere")), "--output", "file/runs", "--quiet")
    assert result.code == 1
    assert "nowhere" in result.out
    assert "python" not in result.out, "quiet leaves out what is well"


def test_the_hub_is_asked_for_a_bounded_time_only(tiny_sdxl, monkeypatch):
    """A port of this machine that answers nobody, as its queue is full; the system itself would wait for minutes."""
    monkeypatch.setattr(doctor, "HUB_TIMEOUT", 0.3)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        result = draftp("doctor", "--preset", recipe(tiny_sdxl))
        assert time.monotonic() - began < 60
    (line,) = [line for line in result.out.splitlines() if line.startswith("hub")]
    assert "warning" in line
    assert "127.0.0.1 does not answer" in line

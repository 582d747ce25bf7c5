"""Wrong input to `draftp sample` and `draftp anneal`: one line on stderr, exit code 2, nothing drawn."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.test_bad_input import expect
from tests.command import draftp

ONE = ("--prompt", "a red dog", "--output", "out")

# (options, words of the message); RUN, MODEL and LORA stand for the real ones
BOTH = [
    (["nowhere"], "nowhere is not a run (it has no config.yaml); runs here: none"),
    ([], "there is no run under runs/"),
    (["RUN", "--model", "MODEL"], "give one of them"),
    (["--model", "nobody/nothing", "--lora", "LORA"], "the hub has no such model or cannot be reached"),
    (["--model", "nowhere.safetensors", "--lora", "LORA"], "there is no such file"),
    (["RUN", "--lora", "nowhere.safetensors"], "--lora nowhere.safetensors: there is no such file or folder"),
    (["RUN", "--lora", "LORA=much"], "expected PATH or PATH=SCALE"),
    (["RUN", "--lora", "LORA=nan"], "expected PATH or PATH=SCALE"),
    (["RUN", "--lora", "empty"], "no LoRA in it"),
    (["RUN", "--lora", "damaged.safetensors"], "damaged.safetensors: cannot be read"),
    (["RUN", "--lora", "other.safetensors"], "is it a LoRA for another model?"),
    (["RUN", "--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
    (["RUN", "--prompts", "nothing.txt"], "there is no prompt in it"),
    (["RUN", "--prompts", "cat.png"], "expected a .txt"),
    (["RUN", "--prompts", "latin.txt"], "not UTF-8"),
    (["RUN", "--prompts", "bad.jsonl"], "line 1: seed -1"),
    (["RUN", "--height", "100"], "sampling.height = 100: input should be a multiple of 8"),
    (["RUN", "--width", "8"], "sampling.width = 8"),
    (["RUN", "--steps", "0"], "sampling.steps = 0"),
    (["RUN", "--steps", "1001"], "less than or equal to 1000"),
    (["RUN", "--scale", "-1"], "sampling.scale = -1.0: allowed are 1 to 100"),
    (["RUN", "--scale", "0"], "sampling.scale = 0.0: allowed are 1 to 100; 1 is no guidance"),
    (["RUN", "--set", "sampling.scale=0.99"], "sampling.scale = 0.99: allowed are 1 to 100; 1 is no guidance"),
    (["RUN", "--scale", "nan"], "sampling.scale = nan"),
    (["RUN", "--sampler", "lms"], "'euler', 'heun', 'ddim', 'dpmpp_2m', 'euler_ancestral' or 'lcm'"),
    (["RUN", "--schedule", "karras"], "'trailing' or 'leading'"),
    (["RUN", "--precision", "fp8"], "'fp64', 'fp32', 'bf16' or 'fp16'"),
    (["RUN", "--set", "model.device=tpu"], "model.device 'tpu'"),
    (["RUN", "--set", "sampling.stepz=3"], "did you mean steps?"),
    (["RUN", "--set", "sampling.steps"], "expected KEY=VALUE"),
    (["RUN", "--format", "gif"], "--format gif: allowed are png, jpg, webp"),
    (["RUN", "--seed", "4294967295", "--num-images", "2"], "seeds go from 0 to 4294967295"),
]
ANNEAL = [
    (["--model", "MODEL"], "nothing to anneal to"),
    (["RUN", "--weight", "cubic"], "unknown annealing weight 'cubic'; known kinds: base, draft (or tuned), linear"),
    (["RUN", "--weight", "linear,"], "unknown annealing weight ''"),
    (["RUN", "--weight", "power_0"], "P > 0"),
    (["RUN", "--weight", "step_1.5"], "F in [0, 1]"),
    (["RUN", "--weight", "interval_0.9_0.1"], "0 <= A <= B <= 1"),
    (["RUN", "--weight", "constant_2"], "W in [0, 1]"),
    (["RUN", "--weight", "mine:far"], "the weight at step 0 of 3 is 2; it must be in [0, 1]"),
    (["RUN", "--weight", "mine:fails"], "failed at step 0 of 3 (ZeroDivisionError"),
    (["RUN", "--weight", "mine:nothing"], "mine has no function 'nothing'"),
    (["RUN", "--weight", "nowhere:weigh"], "cannot import 'nowhere'"),
]
CASES = [(c, o, w) for o, w in BOTH for c in ("sample", "anneal")] + [("anneal", o, w) for o, w in ANNEAL]


@pytest.fixture
def odd_files(lora_run):
    Path("empty").mkdir()
    Path("nothing.txt").write_text("\n")
    Path("cat.png").write_bytes(b"")
    Path("latin.txt").write_bytes("Käfer".encode("latin-1"))
    Path("bad.jsonl").write_text('{"prompt": "a", "seed": -1}')
    Path("damaged.safetensors").write_bytes(b"\x10\x00")
    Path("mine.py").write_text("def far(*_):\n    return 2\n\ndef fails(*_):\n    return 1 / 0\n")
    tensors = load_file(lora_run / "final" / "pytorch_lora_weights.safetensors")
    save_file({k.replace("down_blocks.1", "down_blocks.9"): v for k, v in tensors.items()}, "other.safetensors")


@pytest.mark.parametrize(("command", "options", "words"), CASES, ids=[f"{c} {' '.join(o)}" for c, o, _ in CASES])
def test_wrong_input(odd_files, lora_run, tiny_sdxl, monkeypatch, command, options, words):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    real = {"RUN": str(lora_run), "MODEL": str(tiny_sdxl), "LORA": str(lora_run / "final")}
    for name, path in real.items():
        options = [o.replace(name, path) if o.startswith(name) else o for o in options]
    prompt = ONE if not any(o == "--prompts" for o in options) else ONE[2:]
    expect(draftp(command, *options, *prompt), 2, words)
    assert not list(Path("out").glob("*.png"))


def test_no_prompts_at_all(tiny_sdxl, lora_run):
    expect(draftp("sample", "--model", tiny_sdxl, "--output", "out"), 2, "give --prompt TEXT or --prompts FILE")
    without = Path("without")
    shutil.copytree(lora_run, without)
    config = without / "config.yaml"
    lines = config.read_text().splitlines()
    start = lines.index("  validation_prompts:")
    kept = [line for i, line in enumerate(lines) if i < start or i > start + 3]
    config.write_text("\n".join([*kept[:start], "  validation_prompts: []", *kept[start:]]))
    expect(draftp("sample", without, "--output", "out"), 2, "without has no validation prompts")


def test_damaged_and_unfinished_runs(lora_run):
    shutil.copytree(lora_run, "run")
    lora = Path("run/final/pytorch_lora_weights.safetensors")
    lora.write_bytes(lora.read_bytes()[:100])
    expect(draftp("sample", "run", *ONE), 2, str(lora), "damaged")
    for folder in Path("run").iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    expect(draftp("sample", "run", *ONE), 2, "run has no weights yet")
    Path("run/config.yaml").write_text("- no\n- settings\n")
    Path("run/final").mkdir()
    shutil.copy(lora_run / "final" / "pytorch_lora_weights.safetensors", "run/final")
    expect(draftp("sample", "run", *ONE), 2, "run/config.yaml", "expected settings by section")
    Path("run/config.yaml").write_text("\n")
    expect(draftp("sample", "run", *ONE), 2, "run/config.yaml is empty")


def test_a_run_whose_own_scale_is_below_1_is_drawn_at_another(lora_run):
    shutil.copytree(lora_run, "run")
    config = Path("run/config.yaml")
    text = config.read_text()
    assert "  scale: 3.0\n" in text
    config.write_text(text.replace("  scale: 3.0\n", "  scale: 0.0\n"))
    for command in ("sample", "anneal", "eval"):
        options = ONE if command != "eval" else ("--num-images", 1, "--output", "out")
        expect(draftp(command, "run", *options), 2, "sampling.scale = 0.0: allowed are 1 to 100")
    assert draftp("sample", "run", *ONE, "--scale", 1).code == 0


@pytest.mark.parametrize("command", ["sample", "anneal"])
def test_numbers_that_typer_refuses(command):
    for option, value in (("--num-images", "0"), ("--batch-size", "0"), ("--seed", "-1"), ("--steps", "many")):
        result = draftp(command, option, value)
        assert result.code == 2
        assert option in result.err


def test_places_that_cannot_be_written(lora_run):
    Path("file").write_text("")
    result = draftp("sample", lora_run, "--prompt", "a", "--output", "file")
    expect(result, 1, "file: cannot be written (File exists)")
    expect(draftp("anneal", lora_run, "--prompt", "a", "--output", "file/there"), 1, "cannot be written")


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_in_one_line(lora_run):
    Path("out").mkdir()
    Path("out/.0000-a-s1234-tuned.png.partial").symlink_to("/dev/full")
    expect(draftp("sample", lora_run, "--prompt", "a", "--output", "out"), 1, "No space left on device")


def test_prompts_never_lead_out_of_the_folder_or_into_the_page(lora_run):
    evil = "../../etc/passwd <script>alert(1)</script> \"' &amp; {{ 7 * 7 }}"
    Path("p.jsonl").write_text(json.dumps({"prompt": evil}))
    assert draftp("anneal", lora_run, "--prompts", "p.jsonl", "--weight", "base,tuned", "--output", "out").code == 0
    names = {p.name for p in Path("out").iterdir()}
    assert names == {
        "0000-etc-passwd-script-alert-1-script-amp-7-7-s1234-base.png",
        "0000-etc-passwd-script-alert-1-script-amp-7-7-s1234-tuned.png",
        "anneal-sheet.png", "compare.html", "index.jsonl",
    }  # fmt: skip
    page = Path("out/compare.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page
    assert "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e" in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"

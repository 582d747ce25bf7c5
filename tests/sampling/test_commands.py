"""`draftp sample` and `draftp anneal` by their command lines, on the tiny model."""

import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.weighings import weighing
from draftcli.prompts import Prompt
from draftcli.sampling import files
from draftcli.sampling.draw import plan
from draftcli.sampling.embedded import read
from draftcli.sampling.load import load_source
from draftcli.sampling.sheet import to_pil
from draftcli.sampling.source import find_source
from tests.command import DRAWN, draftp

ONE = ("--prompt", "a red dog")


def run(*arguments):
    result = draftp(*arguments)
    assert result.code == 0, result.err
    return result


def pictures(folder="out"):
    """Every picture by name, (H, W, 3)."""
    paths = sorted(
        p for p in Path(folder).glob("*.*") if p.suffix in (".png", ".jpg", ".webp") and "sheet" not in p.name
    )
    return {p.name: np.asarray(Image.open(p).convert("RGB")).astype(int) for p in paths}


def by_column(folder, column):
    return {
        name.removesuffix(f"-{column}.png"): p
        for name, p in pictures(folder).items()
        if name.endswith(f"-{column}.png")
    }


def index(folder="out"):
    return [json.loads(line) for line in (Path(folder) / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def equal(a, b, within=0):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert np.abs(a[name] - b[name]).max() <= within, name


@pytest.fixture
def runs(lora_run):
    """The run where bare commands look for it."""
    shutil.copytree(lora_run, "runs/tiny")


# -------------------------------------------------------------------------------------------------- what people get


def test_bare_commands_draw_the_newest_run(runs):
    result = run("sample")
    folder = Path("runs/tiny/sample")
    assert [Path(line.split()[1]) for line in result.out.splitlines()[-3:]] == [
        folder, folder / "index.jsonl", folder / "sample-sheet.png",
    ]  # fmt: skip
    assert "tuned: 6 UNet evaluations per image" in result.out
    assert "runs/tiny" in result.out
    assert list(pictures(folder)) == [
        "0000-a-red-dog-s1234-tuned.png",
        "0001-a-blue-bird-s1234-tuned.png",
        "0002-a-green-cat-asleep-on-a-windowsill-s1234-tuned.png",
    ]
    result = run("anneal", "--weight", "linear", "--only")
    assert "linear: 10 UNet evaluations per image" in result.out  # the first of 3 steps has weight 0
    assert len(by_column("runs/tiny/anneal", "linear")) == len(pictures("runs/tiny/anneal")) == 3
    assert Path("runs/tiny/anneal/anneal-sheet.png").is_file()
    assert Path("runs/tiny/anneal/compare.html").is_file()
    run("anneal", "--weight", "linear")
    assert [len(by_column("runs/tiny/anneal", name)) for name in ("base", "linear", "tuned")] == [3, 3, 3]
    assert len(pictures("runs/tiny/anneal")) == 9
    assert "9 images, 9 of them existed already" in run("anneal").out


def test_the_newest_run_is_the_one_that_was_started_last(runs, lora_run):
    shutil.copytree(lora_run, "runs/older")
    os.utime("runs/older/config.yaml", (1, 1))
    assert "runs/tiny" in run("sample", *ONE).out
    assert "runs/older" in run("sample", "older", *ONE).out
    assert Path("runs/older/sample").is_dir()


def test_a_checkpoint_can_be_named_and_stands_in_for_an_unfinished_run(runs):
    run("sample", "runs/tiny", *ONE, "--output", "final")
    shutil.rmtree("runs/tiny/final")
    result = run("sample", *ONE, "--output", "newest")
    assert "warning: runs/tiny is not finished; taking runs/tiny/step-000002" in result.err
    equal(pictures("final"), pictures("newest"))
    result = run("sample", "runs/tiny/step-000002", *ONE, "--output", "named")
    assert result.err == ""
    equal(pictures("final"), pictures("named"))


def test_quiet_is_quiet(lora_run):
    result = draftp("sample", lora_run, *ONE, "--output", "out", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("command", ["sample", "anneal"])
def test_help_teaches_by_example(command):
    assert draftp(command, "--help").out.count(f"draftp {command}") >= 3


# ---------------------------------------------------------------------------------------------------- one seed an image


def test_a_picture_hangs_on_prompt_seed_and_settings_alone(lora_run):
    """Whatever the batch size and order. Kernels round by batch size, so pixels may be 1 of 255 apart."""
    options = ("sample", lora_run, "--num-images", 3, "--seed", 5)
    prompts = [part for text in DRAWN for part in ("--prompt", text)]
    run(*options, *prompts, "--output", "one", "--batch-size", 1)
    for size in (3, 8):
        run(*options, *prompts, "--output", f"of{size}", "--batch-size", size)
        equal(pictures("one"), pictures(f"of{size}"), within=1)
    backwards = [part for text in reversed(DRAWN) for part in ("--prompt", text)]
    run(*options, *backwards, "--output", "back", "--batch-size", 1)

    def unnumbered(folder):
        return {name[5:]: p for name, p in pictures(folder).items()}

    equal(unnumbered("one"), unnumbered("back"))
    assert {line["seed"] for line in index("one")} == {5, 6, 7}
    run(*options[:2], *ONE, "--seed", 6, "--output", "six", "--batch-size", 1)
    assert np.array_equal(
        pictures("six")["0000-a-red-dog-s0006-tuned.png"], pictures("one")["0000-a-red-dog-s0006-tuned.png"]
    )


def two_processes(*arguments):
    """As torchrun starts them, but forked, which spares two imports of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process that has threads
            child = os.fork()
        if child == 0:
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({key: str(value) for key, value in places.items()})
            result = draftp(*arguments)
            Path(f"rank{rank}.txt").write_text(result.out + result.err)
            os._exit(result.code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_processes_leave_the_same_files_as_one(lora_run):
    options = ("anneal", lora_run, "--weight", "base,linear", "--only", "--num-images", 2)
    run(*options, "--output", "alone", "--batch-size", 2)
    assert two_processes(*options, "--output", "together", "--batch-size", 2) == [0, 0], Path("rank1.txt").read_text()
    equal(pictures("alone"), pictures("together"))
    assert index("alone") == index("together")
    assert {p.name for p in Path("alone").iterdir()} == {p.name for p in Path("together").iterdir()}
    assert Path("rank1.txt").read_text() == ""
    assert "12 images\n" in Path("rank0.txt").read_text()
    assert two_processes(*options, "--output", "small", "--batch-size", 8) == [0, 0]
    equal(pictures("alone"), pictures("small"), within=1)


def test_jsonl_prompts_bring_seed_size_and_negative_prompt(lora_run):
    lines = [
        {"prompt": "a red dog", "seed": 42, "size": [64, 96]},
        {"prompt": "a red dog", "negative_prompt": "blurry"},
        {"prompt": ""},
        {"prompt": "日本語 <b>& a contact sheet"},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("sample", lora_run, "--prompts", "p.jsonl", "--output", "out")
    found = pictures()
    assert list(found) == [
        "0000-a-red-dog-s0042-tuned.png",
        "0001-a-red-dog-s1234-tuned.png",
        "0002-s1234-tuned.png",
        "0003-b-a-contact-sht-s1234-tuned.png",
    ]
    assert found["0000-a-red-dog-s0042-tuned.png"].shape == (64, 96, 3)
    run("sample", lora_run, *ONE, "--negative-prompt", "blurry", "--output", "negative")
    # Drawn beside others and alone: the same up to rounding, which may turn a level of 255.
    alone = pictures("negative")["0000-a-red-dog-s1234-tuned.png"].astype(int)
    assert np.abs(found["0001-a-red-dog-s1234-tuned.png"] - alone).max() <= 1
    assert [line["negative_prompt"] for line in index()] == [None, "blurry", None, None]
    assert index()[3]["prompt"] == "日本語 <b>& a contact sheet"


# ------------------------------------------------------------------------------------------------------- done once


def changed_times(folder="out"):
    return {p.name: p.stat().st_mtime_ns for p in Path(folder).glob("*-s[0-9]*.png")}


def test_what_is_there_is_not_drawn_again(lora_run, monkeypatch):
    options = ("anneal", lora_run, "--weight", "base,linear", "--only", "--output", "out")
    run(*options)
    before, first = changed_times(), pictures()
    with monkeypatch.context() as patch:
        patch.setattr(files, "draw_batch", lambda *_: pytest.fail("something was drawn"))
        assert "6 of them existed already" in run(*options).out
    assert changed_times() == before
    damaged, cut, foreign = sorted(Path("out").glob("*-s1234-linear.png"))
    damaged.write_bytes(b"no picture")
    cut.write_bytes(cut.read_bytes()[:-200])
    Image.new("RGB", (64, 64), "red").save(foreign)
    theirs = foreign.read_bytes()
    assert "3 of them existed already" in run(*options).out
    assert foreign.read_bytes() == theirs, "a picture of somebody else is not ours to replace"
    (beside,) = Path("out").glob(f"{foreign.stem}-????????.png")
    beside.replace(foreign)
    equal(pictures(), first, within=1)


@pytest.mark.parametrize(
    "change",
    [
        ("--steps", 4),
        ("--scale", 2),
        ("--sampler", "heun"),
        ("--schedule", "leading"),
        ("--negative-prompt", "red"),
        ("--precision", "fp64"),
        ("--height", 96),
        ("--set", "sampling.s_churn=1"),
    ],
    ids=lambda change: str(change[0]),
)
def test_other_settings_are_drawn_again(lora_run, change):
    options = ("sample", lora_run, *ONE, "--output", "out")
    run(*options)
    (old,) = index()
    stored = (Path("out") / old["file"]).read_bytes()
    result = run(*options, *change)
    assert "them existed already" not in result.out
    (new,) = (line for line in index() if line != old)
    assert new["hash"] != old["hash"]
    assert new["file"] == f"0000-a-red-dog-s1234-tuned-{new['hash'][:8]}.png"
    said = f"other images have the same names, so these got a hash: 1 of 1, such as {new['file']}\n"
    assert said in result.out
    assert (Path("out") / old["file"]).read_bytes() == stored
    assert len(index()) == 2


def test_other_weights_are_drawn_again_and_the_base_is_not(runs):
    run("anneal", *ONE, "--weight", "base,tuned")
    file = Path("runs/tiny/final/pytorch_lora_weights.safetensors")
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][-1, -1] += 0.5  # one number of all
    save_file(tensors, file, metadata)
    assert "2 images, 1 of them existed already" in run("anneal", *ONE, "--weight", "base,tuned").out


def test_an_interrupted_job_goes_on_where_it_was(lora_run, monkeypatch):
    options = ("sample", lora_run, "--num-images", 4, "--batch-size", 2, "--output", "out")
    plain, calls = files.draw_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(files, "draw_batch", interrupted)
    result = draftp(*options)
    assert (result.code, result.err) == (130, "draftp: interrupted; run the same command to resume\n")
    assert len(pictures()) == len(index()) == 6
    assert not list(Path("out").glob(".*")), "no half of a picture"
    before = changed_times()
    assert "12 images, 6 of them existed already" in run(*options).out
    assert before.items() <= changed_times().items()
    run(*options, "--output", "undisturbed")
    equal(pictures(), pictures("undisturbed"))
    assert index() == index("undisturbed")


def test_jobs_share_a_folder_and_its_index(lora_run):
    run("sample", lora_run, *ONE, "--output", "out")
    run("sample", lora_run, "--prompt", "a blue bird", "--output", "out")
    assert [line["prompt"] for line in index()] == ["a blue bird", "a red dog"]
    next(Path("out").glob("*dog*")).unlink()
    Path("out/index.jsonl").write_text(Path("out/index.jsonl").read_text() + "no json\n")
    run("sample", lora_run, "--prompt", "a green cat", "--output", "out")
    assert [line["prompt"] for line in index()] == ["a blue bird", "a green cat"]


# ------------------------------------------------------------------------------------------------------- annealing


@pytest.fixture(params=["lora_run", "full_run"])
def either_run(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_pictures_are_those_of_annealed_guidance_bit_for_bit(either_run, sampler):
    kinds = ["base", "linear", "reverse_power_2", "draft"]
    run("anneal", either_run, "--weight", ",".join(kinds), "--sampler", sampler, "--output", "out")
    model = load_source(find_source(str(either_run), None, (), (), {"sampling.sampler": sampler}))
    batch = files_batch(DRAWN)
    for kind, name in zip(kinds, ["base", "linear", "reverse_power_2", "tuned"], strict=True):
        images = model.annealed_guidance(batch, model.initial_noise(batch), weighing(kind))
        found = list(by_column("out", name).values())
        for image, picture in zip(images, found, strict=True):
            assert np.array_equal(np.asarray(to_pil(image / 255)), picture)
            assert np.array_equal(image.round().byte().permute(1, 2, 0).numpy(), picture)
    assert (
        np.abs(
            by_column("out", "base")["0000-a-red-dog-s1234"] - by_column("out", "tuned")["0000-a-red-dog-s1234"]
        ).mean()
        > 1
    )


def files_batch(prompts):
    from draftcli.core.batch import Batch

    return Batch(prompts, [1234] * len(prompts), (64, 64), [None] * len(prompts))


def test_weight_0_and_1_are_the_samples_of_base_and_tuned(either_run):
    run("sample", either_run, "--base", "--output", "sampled")
    run("anneal", either_run, "--weight", "constant_0", "--weight", "step_0.0,reverse_draft", "--output", "annealed")
    for column, kinds in (("base", ["constant_0", "reverse_tuned"]), ("tuned", ["step_0"])):
        for kind in kinds:
            equal(by_column("sampled", column), by_column("annealed", kind))


def test_kinds_by_repetition_commas_and_other_spellings_are_columns_once(lora_run):
    run(
        "anneal",
        lora_run,
        *ONE,
        "--weight",
        "power_2.0, power_2",
        "--weight",
        "draft",
        "--weight",
        "tuned",
        "--base",
        "--output",
        "out",
    )
    assert [line["weight"] for line in index()] == ["base", "power_2", "tuned"]
    assert index()[1]["weights"] == pytest.approx([0, 1 / 9, 4 / 9], abs=1e-6)


def test_a_function_of_ones_own(lora_run):
    Path("my_weights.py").write_text("def late(sigma, sigma_next, i, total):\n    return 0.5 * (sigma_next == 0)\n")
    result = run("anneal", lora_run, *ONE, "--weight", "my_weights:late", "--output", "out")
    assert "my_weights.late: 8 UNet evaluations" in result.out


def test_stochastic_costs_what_plain_sampling_costs(lora_run):
    result = run(
        "anneal", lora_run, "--weight", "base,constant_0.5", "--stochastic", "--num-images", 4, "--output", "out"
    )
    assert "base: 6 UNet" in result.out
    assert "constant_0.5_stochastic: 6 UNet" in result.out
    run("anneal", lora_run, "--weight", "constant_0.5", "--num-images", 4, "--output", "out")
    chance, exact = by_column("out", "constant_0.5_stochastic"), by_column("out", "constant_0.5")
    assert len(chance) == 12
    assert max(np.abs(chance[name] - exact[name]).mean() for name in chance) > 1
    run(
        "anneal",
        lora_run,
        "--weight",
        "constant_0.5",
        "--stochastic",
        "--num-images",
        4,
        "--batch-size",
        1,
        "--output",
        "one",
    )
    equal(chance, by_column("one", "constant_0.5_stochastic"), within=1)


# -------------------------------------------------------------------------------------------------- models and LoRAs


def test_a_model_with_loras_is_the_run_that_they_come_from(lora_run, tiny_sdxl):
    prompts = [part for text in DRAWN for part in ("--prompt", text)]
    run("sample", lora_run, "--base", "--output", "run")
    same_settings = ("--steps", 3, "--scale", 3, "--seed", 1234)
    model = ("sample", "--model", tiny_sdxl, *same_settings, *prompts)
    run(*model, "--lora", lora_run / "final", "--output", "final")
    equal(by_column("run", "tuned"), by_column("final", "tuned"))
    run(*model, "--output", "base")
    equal(by_column("run", "base"), by_column("base", "base"))
    halves = [part for _ in range(2) for part in ("--lora", f"{lora_run}=0.5")]
    run(*model, *halves, "--output", "halves")
    equal(by_column("run", "tuned"), by_column("halves", "tuned"), within=1)
    run(*model, "--lora", f"{lora_run}=0.5", "--output", "half")
    assert (
        np.abs(
            by_column("half", "tuned")["0000-a-red-dog-s1234"] - by_column("run", "tuned")["0000-a-red-dog-s1234"]
        ).mean()
        > 1
    )


def test_kohya_loras_and_several_at_once_anneal(lora_run, tiny_sdxl):
    tensors = load_file(lora_run / "final" / "pytorch_lora_weights.safetensors")
    kohya = {}
    for name, tensor in tensors.items():
        module, side = re.fullmatch(r"unet\.(.+)\.lora_([AB])\.weight", name).groups()
        stem = "lora_unet_" + module.replace(".", "_")
        kohya[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
        kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(kohya, "kohya.safetensors")
    run("anneal", lora_run, *ONE, "--weight", "base,linear,tuned", "--output", "run")
    options = ("--model", tiny_sdxl, *ONE, "--steps", 3, "--scale", 3, "--weight", "base,linear,tuned")
    run("anneal", *options, "--lora", "kohya.safetensors", "--output", "kohya")
    equal(pictures("run"), pictures("kohya"))
    run("anneal", *options, "--lora", "kohya.safetensors=2", "--lora", f"{lora_run}=-1", "--output", "both")
    equal(pictures("run"), pictures("both"), within=1)


def test_a_lora_on_top_of_a_full_fine_tune_is_part_of_tuned(full_run, lora_run):
    run("anneal", full_run, *ONE, "--weight", "base,tuned", "--output", "alone")
    run("anneal", full_run, *ONE, "--lora", lora_run, "--weight", "base,tuned", "--output", "with")
    equal(by_column("alone", "base"), by_column("with", "base"))
    assert (
        np.abs(
            pictures("alone")["0000-a-red-dog-s1234-tuned.png"] - pictures("with")["0000-a-red-dog-s1234-tuned.png"]
        ).mean()
        > 1
    )


def test_a_text_encoders_part_belongs_to_tuned_alone(tiny_sdxl):
    generator = torch.Generator().manual_seed(0)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    sides = {"A": (2, 32), "B": (32, 2)}
    tensors = {f"{layer}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in sides.items()}
    save_file(tensors, "text.safetensors")
    options = ("--model", tiny_sdxl, *ONE, "--steps", 3)
    run("sample", *options, "--output", "plain")
    run("anneal", *options, "--lora", "text.safetensors=30", "--weight", "base,constant_0.5,tuned", "--output", "out")
    equal(by_column("plain", "base"), by_column("out", "base"))
    first, mixed, last = (next(iter(by_column("out", c).values())) for c in ("base", "constant_0.5", "tuned"))
    assert min(np.abs(first - mixed).mean(), np.abs(mixed - last).mean()) > 0.1


def test_without_a_size_a_model_draws_what_it_was_made_for(tiny_sdxl):
    run("sample", "--model", tiny_sdxl, *ONE, "--steps", 2, "--output", "out")
    assert next(iter(pictures().values())).shape == (64, 64, 3)
    run("sample", "--model", tiny_sdxl, *ONE, "--steps", 2, "--width", 128, "--output", "wide")
    assert next(iter(pictures("wide").values())).shape == (64, 128, 3)


# ------------------------------------------------------------------------------------------------- formats and the API


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_every_format_holds_its_settings_and_is_reused(lora_run, suffix):
    options = (
        "sample",
        lora_run,
        "--prompt",
        "a red dog, 日本語",
        "--negative-prompt",
        "dull",
        "--format",
        suffix,
        "--output",
        "out",
    )
    run(*options)
    (path,) = (p for p in Path("out").glob(f"*.{suffix}") if "sheet" not in p.name)
    text = read(path).splitlines()
    assert text[:2] == ["a red dog, 日本語 <lora:run:1>", "Negative prompt: dull"]
    assert text[2].startswith(
        "Steps: 3, Sampler: Euler, Schedule type: Trailing, CFG scale: 3, Seed: 1234, Size: 64x64, "
    )
    assert "1 of them existed already" in run(*options).out


def test_the_picture_api_is_what_the_commands_use(lora_run):
    """What evaluation builds on: model, columns and pictures -> files, in order; a LoRA's scale is a column too."""
    model = load_source(find_source(str(lora_run), None, ()))
    columns = [files.Column.of("base"), files.Column.of("tuned"), files.Column.scaled(0.0), files.Column.scaled(0.5)]
    written = files.write_pictures(model, columns, plan([Prompt(t) for t in DRAWN], 2, 7, (64, 64)), Path("out"))
    assert written.drawn == 24
    assert [[f.column.name for f in row] for row in written.rows()] == [["base", "tuned", "scale_0", "scale_0.5"]] * 6
    assert written.evaluations == {"base": 6, "tuned": 6, "scale_0": 6, "scale_0.5": 6}
    equal(by_column("out", "base"), by_column("out", "scale_0"))
    again = files.write_pictures(model, columns, plan([Prompt(t) for t in DRAWN], 2, 7, (64, 64)), Path("out"))
    assert (again.drawn, again.files) == (0, written.files)


def test_options_without_effect_are_warned_about(lora_run):
    result = run("anneal", lora_run, *ONE, "--weight", "base", "--stochastic", "--output", "out")
    assert result.err == "warning: --stochastic has no effect on base and tuned, which ask one network anyway\n"
    result = run("sample", lora_run, *ONE, "--negative-prompt", "dull", "--scale", 1, "--output", "out")
    assert result.err == "warning: sampling.negative_prompt has no effect at sampling.scale 1\n"


def test_a_models_own_size_unless_another_is_given(tiny_sdxl):
    for options in (("--height", 96), ("--set", "sampling.height=96")):
        run("sample", "--model", tiny_sdxl, *ONE, "--steps", 1, *options, "--output", "out")
        assert [(line["height"], line["width"]) for line in index()] == [(96, 64)]

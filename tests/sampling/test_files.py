"""Jobs that share a folder: nothing is replaced that was made of something else, and nothing is drawn twice."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from draftcli.core.weighings import weighing
from draftcli.prompts import Prompt
from draftcli.sampling import files
from draftcli.sampling.draw import plan
from draftcli.sampling.embedded import read
from draftcli.sampling.load import load_source
from draftcli.sampling.loras import NamedLora, named_loras
from draftcli.sampling.names import free_path
from draftcli.sampling.source import find_source
from tests.cli.test_bad_input import expect
from tests.command import draftp
from tests.tiny import make_sdxl

LONG = "a red dog on a wide green meadow under a blue sky"
SHORT = ("--height", 64, "--width", 64, "--steps", 2)


def run(*arguments):
    result = draftp(*arguments)
    assert result.code == 0, result.err
    return result


def index(folder="out"):
    return [json.loads(line) for line in (Path(folder) / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder="out"):
    """Pictures, sheets and pages."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "index.jsonl"}


# By what differs: two commands whose pictures have the same plain name.
PAIRS = {
    "letters beyond the fortieth": (["sample", "RUN", "--prompt", f"{LONG} at noon"], ["--prompt", f"{LONG} at night"]),
    "letters that a name leaves out": (["sample", "RUN", "--prompt", "a red dog!"], ["--prompt", "A, red (dog)"]),
    "a script that a name leaves out": (["sample", "RUN", "--prompt", "日本"], ["--prompt", "中国"]),
    "the size": (["sample", "RUN", "--prompt", "a dog"], ["--prompt", "a dog", "--width", 72]),
    "the negative prompt": (["anneal", "RUN", "--prompt", "a dog"], ["--prompt", "a dog", "--negative-prompt", "red"]),
    "the LoRA's scale": (
        ["sample", "--model", "MODEL", *SHORT, "--lora", "RUN=0.5", "--prompt", "a dog"],
        ["--model", "MODEL", *SHORT, "--lora", "RUN=0.7", "--prompt", "a dog"],
    ),
    "the model": (
        ["sample", "--model", "MODEL", *SHORT, "--prompt", "a dog"],
        ["--model", "OTHER", *SHORT, "--prompt", "a dog"],
    ),
}


@pytest.mark.parametrize("what", PAIRS)
def test_a_picture_of_something_else_is_not_replaced(lora_run, tiny_sdxl, what):
    first, second = PAIRS[what]
    places = {"RUN": lora_run, "MODEL": tiny_sdxl, "RUN=0.5": f"{lora_run}=0.5", "RUN=0.7": f"{lora_run}=0.7"}
    if what == "the model":
        places["OTHER"] = make_sdxl(Path("other"), seed=1)
    command = first[0]
    if not any(str(a).startswith("--model") for a in second):
        second = ["RUN", *second]
    commands = [[places.get(a, a) for a in given] for given in (first[1:], second)]
    run(command, *commands[0], "--output", "out")
    before, lines = contents(), index()
    said = run(command, *commands[1], "--output", "out").out
    count = len(lines)
    assert "existed already" not in said
    assert f"other images have the same names, so these got a hash: {count} of {count}, such as" in said
    after = contents()
    assert before.items() <= after.items(), "image, sheet and page of the first are as they were"
    assert len(after) == 2 * len(before)
    assert len(index()) == 2 * count
    assert [line for line in index() if line in lines] == lines
    assert len({line["hash"] for line in index()}) == 2 * count
    for old, new in zip(lines, (line for line in index() if line not in lines), strict=True):
        assert new["file"] == f"{Path(old['file']).stem}-{new['hash'][:8]}.png"
    for given in commands:  # each of them finds its own
        assert f"{count} of them existed already" in run(command, *given, "--output", "out").out
    assert contents() == after


def test_a_weighting_of_ones_own_that_was_changed_is_another(lora_run):
    model, pictures = load_source(find_source(str(lora_run), None, ())), plan([Prompt("a dog")], 1, 7, (64, 64))
    first, second, again = (
        files.write_pictures(model, [files.Column("my.late", weighing(kind))], pictures, Path("out"))
        for kind in ("linear", "power_2", "linear")
    )
    assert [written.drawn for written in (first, second, again)] == [1, 1, 0]
    assert first.files == again.files
    assert second.files[0].path.name == f"0000-a-dog-s0007-my.late-{second.files[0].key[:8]}.png"


def test_an_interrupted_job_beside_another_is_finished(lora_run, monkeypatch):
    options = ("sample", lora_run, "--prompt", "a dog", "--num-images", 3, "--batch-size", 1, "--output", "out")
    run(*options)
    plain, calls = files.draw_batch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(files, "draw_batch", interrupted)
    assert draftp(*options, "--scale", 5).code == 130
    assert len(index()) == 5
    before = contents()
    assert "3 images, 2 of them existed already" in run(*options, "--scale", 5).out
    assert before.items() <= contents().items()
    assert len(index()) == 6


def test_columns_whose_names_are_one_to_a_file_system(lora_run):
    """Letters of another case, the word that sheets keep to themselves, and a name that no file can have."""
    Path("weights_by_case.py").write_text(
        "".join(
            f"def {name}(sigma, sigma_next, i, total):\n    return {weight} * (sigma_next == 0)\n"
            for name, weight in (("late", 0.2), ("Late", 0.4), ("sheet", 0.6), ("sht", 0.8), (300 * "x", 0.9))
        )
    )
    kinds = ",".join(f"weights_by_case:{name}" for name in ("late", "Late", "sheet", "sht", 300 * "x"))
    options = ("anneal", lora_run, "--prompt", "a dog", "--weight", kinds, "--only", "--output", "out")
    run(*options)
    names = [line["file"] for line in index()]
    assert len({name.lower() for name in names}) == len({line["hash"] for line in index()}) == 5
    assert not any("sheet" in name for name in names)
    assert "5 of them existed already" in run(*options).out


def test_names_are_taken_as_they_come():
    """Of a plain name, one with a hash, and numbered ones, the first that holds it, else the first that is free."""
    stored = {"a.png": "1" * 16, "a-22222222.png": "", "a-22222222-2.png": "", "b.png": ""}

    def name(stem, key, taken=()):
        return free_path(Path(), stem, ".png", key, lambda path: stored.get(path.name), taken).name

    assert name("a", "1" * 16) == "a.png"
    assert name("a", "2" * 16) == "a-22222222-3.png"
    assert name("b", "3" * 16) == "b-33333333.png"
    assert name("c", "3" * 16) == "c.png"
    assert name("C", "3" * 16, {"c.png"}) == "C-33333333.png"
    stored["c-33333333.png"] = "3" * 16
    assert name("c", "3" * 16) == "c-33333333.png"  # where its name has become free since
    Path("d.png").mkdir()
    assert name("d", "4" * 16) == "d-44444444.png"


# ------------------------------------------------------------------------------------------------------- eval of it all


def test_eval_does_not_choose_among_several_pictures_of_a_seed(lora_run):
    """Columns of one job, or jobs with other settings, in one folder; one picture in two formats is no question."""
    run("sample", lora_run, "--prompt", "a dog", "--output", "one")
    shutil.copytree("one", "settings")
    run("sample", lora_run, "--prompt", "a dog", "--scale", 5, "--output", "settings")
    shutil.copytree("one", "format")
    run("sample", lora_run, "--prompt", "a dog", "--format", "webp", "--output", "format")
    run("anneal", lora_run, "--prompt", "a dog", "--weight", "base,tuned", "--output", "columns")
    shutil.copytree("one", "elsewhere")
    shutil.copy("one/0000-a-dog-s1234-tuned.png", "elsewhere/b.png")
    lines = [{"file": "b.png", "prompt": "a dog", "seed": 1234}, index("one")[0] | {"hash": None}]
    Path("elsewhere/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = ("--reward", "toy", "--features", "toy", "--output", "report")
    for folder in ("settings", "columns", "elsewhere"):
        words = f"{folder}: seed 1234 of 'a dog' was generated in several ways"
        expect(draftp("eval", "one", folder, *judged), 2, words)
        expect(draftp("eval", folder, "one", *judged), 2, words)
    run("eval", "one", "format", *judged)


# ------------------------------------------------------------------------------------------------- LoRAs by their names


def test_the_text_and_the_index_name_the_loras(lora_run, tiny_sdxl):
    """As A1111 finds them: the tag behind the prompt, 12 digits of the hash of what lies behind the file's header."""
    file = lora_run / "final" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    save_file(tensors, "my style.safetensors", {**metadata, "note": "other metadata, same tensors"})
    save_file(tensors, "kohya's.safetensors", {**metadata, "sshs_model_hash": "abcdef0123456789"})
    own = web_ui_hash(file)
    of_the_run = load_hash(lora_run / "final" / "run-kohya.safetensors")
    loras = ("--lora", lora_run, "--lora", "my style.safetensors=0.25", "--lora", "kohya's.safetensors=-1")
    run(
        "anneal", "--model", tiny_sdxl, *SHORT, "--prompt", "a dog", *loras, "--weight", "base,tuned", "--output", "out"
    )
    base, tuned = index()
    assert base["loras"] == []
    assert tuned["loras"] == [
        {"name": "run", "scale": 1.0, "hash": of_the_run},
        {"name": "my style", "scale": 0.25, "hash": own},
        {"name": "kohya's", "scale": -1.0, "hash": "abcdef012345"},
    ]
    assert {base["prompt"], tuned["prompt"]} == {"a dog"}
    text = read(Path("out") / tuned["file"])
    assert text.startswith("a dog <lora:run:1> <lora:my style:0.25> <lora:kohya's:-1>\n")
    assert f'Lora hashes: "run: {of_the_run}, my style: {own}, kohya\'s: abcdef012345", Version' in text
    assert "lora" not in read(Path("out") / base["file"]).lower()


def load_hash(file: Path) -> str:
    """What a file for A1111 says of itself, 12 digits."""
    with safe_open(file, "pt") as stream:
        return stream.metadata()["sshs_model_hash"][:12]


def web_ui_hash(file: Path) -> str:
    """A1111's, from its description: sha256 of the file without its header, 12 digits."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("runs/mine/final/pytorch_lora_weights.safetensors", "mine"),
        ("runs/mine/step-000200/pytorch_lora_weights.safetensors", "mine-step-000200"),
        ("my-adapter/adapter_model.safetensors", "my-adapter"),
        ("a,b <c>.safetensors", "a_b _c_"),
    ],
)
def test_a_lora_is_called_as_people_call_it(lora_run, place, name):
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(lora_run / "final" / "pytorch_lora_weights.safetensors", place)
    (lora,) = named_loras([(Path(place), 0.5)])
    assert (lora.name, lora.scale) == (name, 0.5)


def test_a_run_has_the_hash_of_its_file_for_the_web_ui(lora_run):
    shutil.copytree(lora_run / "final", "mine/final", ignore=shutil.ignore_patterns("*-kohya.safetensors"))
    tensors = {"lora_unet_x.alpha": load_file("mine/final/pytorch_lora_weights.safetensors").popitem()[1]}
    save_file(tensors, "mine/final/mine-kohya.safetensors")
    assert named_loras([(Path("mine"), 1.0)]) == [
        NamedLora("mine", 1.0, web_ui_hash(Path("mine/final/mine-kohya.safetensors")))
    ]


def test_a_columns_scale_multiplies_that_of_its_loras(lora_run):
    source = find_source(str(lora_run), None, ())
    columns = [files.Column.scaled(0.5), files.Column.of("linear")]
    pictures = plan([Prompt("")], 1, 7, (64, 64))
    loras = named_loras(source.loras)
    files.write_pictures(load_source(source), columns, pictures, Path("out"), loras=loras)
    scales = {line["weight"]: [lora["scale"] for lora in line["loras"]] for line in index()}
    assert scales == {"scale_0.5": [0.5], "linear": [1.0]}
    assert read(Path("out/0000-s0007-scale_0.5.png")).startswith("<lora:run:0.5>\n")


def without_number(model, file, key):
    """One weight is NaN, as after a training that diverged."""
    path = model / file
    tensors = load_file(path)
    tensors[next(name for name in tensors if name.endswith(key))].flatten()[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def too_large(model):
    """Activations that half precision cannot hold, as those of SDXL's own VAE."""
    path = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.weight"] *= 1e7
    save_file(tensors, path, {"format": "pt"})


BLACK = {
    "unet": (
        lambda model: without_number(model, "unet/diffusion_pytorch_model.safetensors", "conv_out.weight"),
        [],
        "damaged or came from a training that diverged",
    ),
    "text encoder": (
        lambda model: without_number(model, "text_encoder/model.safetensors", "layers.0.layer_norm1.weight"),
        [],
        "damaged",
    ),
    "VAE": (
        lambda model: without_number(model, "vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
        [],
        "damaged",
    ),
    "VAE in fp16": (too_large, ["--set", "model.vae_precision=fp16"], "model.vae_precision"),
}


@pytest.mark.parametrize("command", [["sample", "--base"], ["anneal", "--weight", "base"]], ids=lambda c: c[0])
@pytest.mark.parametrize(("spoil", "options", "words"), BLACK.values(), ids=BLACK)
def test_a_picture_that_is_not_finite_is_not_saved_black(tiny_sdxl, command, spoil, options, words):
    model = Path(shutil.copytree(tiny_sdxl, "model"))
    spoil(model)
    result = draftp(*command, "--model", model, "--prompt", "a fox", *SHORT, *options, "--output", "out")
    expect(result, 1, "not finite", words, "draftp doctor")
    assert not list(Path("out").glob("*.png"))


def test_what_half_precision_cannot_hold_is_drawn_without_it(tiny_sdxl):
    """By default the VAE stays in float32, however narrow the networks are."""
    model = Path(shutil.copytree(tiny_sdxl, "model"))
    too_large(model)
    run("sample", "--base", "--model", model, "--prompt", "a fox", *SHORT, "--output", "out")
    assert len(list(Path("out").glob("*base.png"))) == 1

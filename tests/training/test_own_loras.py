"""LoRAs of one's own: those that are part of the base (model.loras), and the one that training goes on from
(peft.init_from).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.lora.adapters import lora_state_dict
from draftcli.core.lora.merging import load_base
from draftcli.errors import InputError
from draftcli.sampling.embedded import read
from tests.command import draftp, recipe
from tests.tiny import batch, make_sdxl, prefers_red, tiny_config

TARGETS = {"unet": ["to_q", "to_v", "ff.net.2"], "text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["k_proj"]}
SCALE = 0.7


def network_lora(network, targets, rank=2, seed=0, **settings):
    """peft's adapter with weights that count, as (settings, tensors)."""
    from peft import get_peft_model_state_dict

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **settings)
    network.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator).abs())
    tensors = get_peft_model_state_dict(network, adapter_name="default")
    if any(name.startswith("encoder.") for name in tensors):  # of transformers 5; files have the name of before
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    return tensors, config


def write_lora(folder: Path, model: Path, parts=("unet",), **settings) -> Path:
    """A file as diffusers writes it."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    layers, metadata = {}, {}
    for part in parts:
        layers[f"{part}_lora_layers"], config = network_lora(getattr(pipe, part), TARGETS[part], **settings)
        metadata[f"{part}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def files(tiny_sdxl, tmp_path_factory):
    """One LoRA for the UNet and both text encoders by three programs' names, and the base with it merged."""
    root = tmp_path_factory.mktemp("loras")
    lora = write_lora(root / "whole", tiny_sdxl, tuple(TARGETS))
    peft = root / "peft"
    peft.mkdir()
    tensors = {k.removeprefix("unet."): t for k, t in load_file(lora).items() if k.startswith("unet.")}
    save_file({f"base_model.model.{key}": t for key, t in tensors.items()}, peft / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": TARGETS["unet"]}
    (peft / "adapter_config.json").write_text(json.dumps(settings))
    merges = {
        "kohya.safetensors": (lora, "--format", "kohya", "--verify", "keys"),
        "merged": (f"{lora}={SCALE}", "--verify", "keys"),
        "merged-unet": (f"{peft}={SCALE}", "--verify", "keys"),
    }
    for name, arguments in merges.items():
        result = draftp("merge-lora", *arguments, "--base", tiny_sdxl, "--output", root / name)
        assert result.code == 0, result.err
    return root


def train(base, folder, *options, **sections):
    preset = recipe(base, **sections)
    result = draftp("train", "--preset", preset, "--output", folder, "--quiet", *options)
    assert result.code == 0, result.err
    return Path(folder)


def trained_lora(run):
    return load_file(run / "final" / "pytorch_lora_weights.safetensors")


def assert_alike(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------- part of the base


@pytest.mark.parametrize(
    ("lora", "merged"),
    [
        ("whole/pytorch_lora_weights.safetensors", "merged"),
        ("kohya.safetensors", "merged"),
        ("peft", "merged-unet"),
    ],
    ids=["diffusers", "kohya", "peft"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_has_them_as_if_merged(files, tiny_sdxl, lora, merged, precision):
    """Every weight of every network: bit for bit in float32; bfloat16 rounds the base before, and the sum once more."""
    tolerance = {"rtol": 2**-7, "atol": 2**-9} if precision == "bf16" else {"rtol": 0, "atol": 0}
    model = {"precision": precision}
    theirs = load_base(tiny_config(files / merged, model=model).model)
    ours = load_base(tiny_config(tiny_sdxl, model={**model, "loras": [f"{files / lora}={SCALE}"]}).model)
    plain = load_base(tiny_config(tiny_sdxl, model=model).model)
    for part, network in ours.modules.items():
        weights, other = network.state_dict(), theirs.modules[part].state_dict()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, other[name], **tolerance)
        moved = any(not torch.equal(w, plain.modules[part].state_dict()[n]) for n, w in weights.items())
        assert moved is (part != "vae" and (lora != "peft" or part == "unet"))


@pytest.mark.parametrize("scheme", ["lora", "none"])
def test_a_run_on_them_is_the_run_on_the_merged_model(files, tiny_sdxl, scheme):
    """What is trained, logged, drawn and merged. What is written is the run's own LoRA, and the card says what with."""
    whole = files / "whole" / "pytorch_lora_weights.safetensors"
    sections = {"peft": {"peft_scheme": scheme}, "draftp": {"kl_coeff": 1.0}, "trainer": {"max_steps": 2}}
    ours = train(tiny_sdxl, "ours", **sections, model={"loras": [f"{whole}={SCALE}"]})
    theirs = train(files / "merged", "theirs", **sections)
    for one, two in zip(lines_of(ours), lines_of(theirs), strict=True):
        assert (one["loss"], one["kl_penalty"]) == pytest.approx((two["loss"], two["kl_penalty"]), abs=1e-6)
    pictures = []
    for run in (ours, theirs):
        result = draftp("sample", run, "--base", "--prompt", "a red cat", "--output", f"{run}-pictures", "--quiet")
        assert result.code == 0, result.err
        found = sorted(p for p in Path(f"{run}-pictures").glob("*.png") if "sheet" not in p.name)
        pictures.append(np.stack([np.asarray(Image.open(picture)).astype(int) for picture in found]))
    assert len(pictures[0]) == 2
    assert abs(pictures[0] - pictures[1]).max() <= 1
    for run in (ours, theirs):
        result = draftp("merge-lora", run, "--output", f"{run}-merged")
        assert result.code == 0, result.err
    assert "of the run's base (model.loras)" in Path("ours-merged/README.md").read_text()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        one, two = (load_weights(Path(f"{run}-merged") / part) for run in ("ours", "theirs"))
        assert_alike(one, two)
    card = (ours / "final" / "README.md").read_text()
    assert f"`{whole.name}` at scale 0.7 (sha256 " in card
    assert "pipe.fuse_lora(lora_scale=0.7)" in card
    if scheme == "lora":
        assert_alike(trained_lora(ours), trained_lora(theirs))
        assert all(key.startswith("unet.") for key in trained_lora(ours))
        result = draftp("merge-lora", ours, "--format", "lora", "--output", "own", "--verify", "keys")
        assert result.code == 0, result.err
        assert_alike(load_file("own/pytorch_lora_weights.safetensors"), trained_lora(ours))
    else:
        for run in ("ours", "theirs"):
            lora = ["--format", "lora", "--rank", 32, "--output", f"{run}-lora", "--verify", "keys"]
            assert draftp("merge-lora", run, *lora).code == 0
        one, two = (products(load_file(f"{run}-lora/pytorch_lora_weights.safetensors")) for run in ("ours", "theirs"))
        assert_alike(one, two, 1e-5)


def test_they_go_along_into_another_model_and_pictures_name_them(files, tiny_sdxl):
    whole, other = files / "whole" / "pytorch_lora_weights.safetensors", make_sdxl(Path("other"), seed=1)
    run = train(tiny_sdxl, "run", model={"loras": [f"{whole}={SCALE}"]}, optim={"lr": 0.1}, trainer={"max_steps": 2})
    own = run / "final" / "pytorch_lora_weights.safetensors"
    inputs = {"by-run": [run], "by-hand": [own, f"{whole}={SCALE}"], "own-alone": [own]}
    for name, merged in inputs.items():
        result = draftp("merge-lora", *merged, "--base", other, "--output", name, "--verify", "keys")
        assert result.code == 0, result.err
    for part in ("unet", "text_encoder", "text_encoder_2"):
        one, two, alone = (load_weights(Path(name) / part) for name in inputs)
        assert_alike(one, two)
        assert any(not torch.equal(one[key], alone[key]) for key in one)
    assert "of the run's base (model.loras)" in Path("by-run/README.md").read_text()
    plain = train(tiny_sdxl, "plain", trainer={"max_steps": 2})
    result = draftp("merge-lora", run, plain, "--base", other, "--output", "both")
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "different model.loras, so they have no base in common" in result.err
    assert f"give the LoRAs' files that are to be merged, such as {own}, with --base MODEL" in result.err

    assert draftp("anneal", run, "--prompt", "x", "--weight", "linear", "--output", "out").code == 0
    index = {line["weight"]: line for line in map(json.loads, Path("out/index.jsonl").read_text().splitlines())}
    texts = {weight: read(Path("out") / line["file"]).splitlines()[0] for weight, line in index.items()}
    assert texts == {
        "base": "x <lora:whole:0.7>",
        "tuned": "x <lora:whole:0.7> <lora:run:1>",
        "linear": "x <lora:whole:0.7> <lora:run:1>",
    }
    assert [lora["name"] for lora in index["base"]["loras"]] == ["whole"]


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def load_weights(folder):
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def products(tensors):
    """B A of each layer of a LoRA."""
    ups = {key: tensor for key, tensor in tensors.items() if ".lora_B." in key}
    return {key: up.flatten(1) @ tensors[key.replace("lora_B", "lora_A")].flatten(1) for key, up in ups.items()}


def test_a_run_knows_them_by_their_contents(files, tiny_sdxl):
    lora = shutil.copy(files / "kohya.safetensors", "style.safetensors")
    run = train(tiny_sdxl, "run", model={"loras": [f"{lora}=0.5"]}, trainer={"max_steps": 2})
    write_lora(Path("other"), tiny_sdxl, seed=4)
    shutil.copy("other/pytorch_lora_weights.safetensors", lora)
    words = "was trained with model.loras of which LoRA 1 of 1 x 0.5 is another now"
    for command in (
        ["sample", run, "--prompt", "x"],
        ["eval", run, "--prompts", recipe(tiny_sdxl)],
        ["merge-lora", run],
    ):
        result = draftp(*command)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err
    result = draftp("train", "--preset", "tiny.yaml", "--output", run, "--set", f"model.loras=[{lora}=0.5]")
    assert result.code == 2
    assert "model.loras is as it was, but LoRA 1 of 1 x 0.5 is another" in result.err
    Path("moved.safetensors").write_bytes((files / "kohya.safetensors").read_bytes())
    moved = ["--set", "model.loras=[moved.safetensors=0.5]", "--set", "trainer.max_steps=3"]
    assert draftp("train", "--preset", "tiny.yaml", "--output", run, *moved).code == 0
    for loras in ("[moved.safetensors=0.6]", "[moved.safetensors=0.5,moved.safetensors=0.5]", "[]"):
        again = ["--set", f"model.loras={loras}", "--set", "trainer.max_steps=3"]
        result = draftp("train", "--preset", "tiny.yaml", "--output", run, *again)
        assert (result.code, "model.loras was" in result.err) == (2, True), result.err


# ------------------------------------------------------------------------------------------------ to go on from


def begun(tiny_sdxl, file, **peft):
    cfg = tiny_config(tiny_sdxl, model={"precision": "fp32"}, peft={"init_from": str(file), **peft})
    cfg = cfg.model_copy(update={"peft": type(cfg.peft)(init_from=str(file), **peft)})
    model = SDXLDRaFTPModel(cfg)
    model.reward_model = prefers_red
    return model


def test_training_starts_from_it_and_the_base_stays_the_base(tiny_sdxl):
    file = write_lora(Path("start"), tiny_sdxl, rank=3)
    model = begun(tiny_sdxl, file)
    stored = {key.removeprefix("unet."): tensor for key, tensor in load_file(file).items()}
    assert_alike(lora_state_dict(model.unet), stored, 0)
    assert sum(p.numel() for p in model.trainable_parameters) == sum(t.numel() for t in stored.values())
    plain = SDXLDRaFTPModel(tiny_config(tiny_sdxl, model={"precision": "fp32"}))
    x = plain.initial_noise(batch(1))
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipe.load_lora_weights(file.parent)
    generated = model.generate(batch(1), x)
    with torch.no_grad():
        assert torch.equal(
            model.networks.base(model.encode(batch(1)))(x, model.schedule.level(0)),
            plain.networks.base(plain.encode(batch(1)))(x, plain.schedule.level(0)),
        )
        said = pipe.unet(
            x,
            500,
            model.encode(batch(1)).conditional.prompt_embeds,
            added_cond_kwargs={
                "text_embeds": model.encode(batch(1)).conditional.text_embeds,
                "time_ids": model.encode(batch(1)).conditional.time_ids,
            },
        ).sample
        ours = model.networks.family.predict(model.unet, x, 500, model.encode(batch(1)).conditional)
    torch.testing.assert_close(ours, said, atol=1e-5, rtol=0)
    assert (generated[0] - plain.generate(batch(1), x)[0]).abs().mean() > 1


def test_a_run_that_goes_on(tiny_sdxl):
    """Rank, alpha and targets follow; the first validation sees the LoRA; resuming and drawing need nothing more."""
    first = train(tiny_sdxl, "first", peft={"rank": 3, "alpha": 6.0}, optim={"lr": 0.1})
    settings = {
        "peft": {"init_from": str(first)},
        "optim": {"lr": 1e-12},
        "data": {"validation_prompts": ["a red dog"]},
        "trainer": {"max_steps": 1, "val_check_interval": 1},
    }
    preset = recipe(tiny_sdxl, **settings)
    text = preset.read_text().replace("  rank: 2\n", "")
    preset.write_text(text)
    for steps in (1, 2):
        result = draftp("train", "--preset", preset, "--output", "second", "--set", f"trainer.max_steps={steps}")
        assert result.code == 0, result.err
    assert_alike(trained_lora(Path("second")), trained_lora(first))
    assert "started from the LoRA first" in Path("second/final/README.md").read_text()
    line = json.loads(Path("second/validation.jsonl").read_text().splitlines()[0])
    assert line["step"] == 0
    assert all(figures["difference"] != 0 for figures in line["rewards"].values())
    config = Path("second/config.yaml").read_text()
    assert "rank: 3" in config
    assert "alpha: 6.0" in config
    shutil.rmtree(first)
    assert draftp("sample", "second", "--prompt", "x").code == 0


def test_what_cannot_be_gone_on_from_is_refused_in_one_line(files, tiny_sdxl):
    start = write_lora(Path("start"), tiny_sdxl, rank=3)
    ragged = {
        k: t[:2] if "to_q.lora_A" in k else t[:, :2] if "to_q.lora_B" in k else t for k, t in load_file(start).items()
    }
    save_file({k: t.contiguous() for k, t in ragged.items()}, "ragged.safetensors")
    dora = write_lora(Path("dora"), tiny_sdxl, use_dora=True)
    whole = files / "whole" / "pytorch_lora_weights.safetensors"
    instead = "put it under the base with model.loras="
    cases = [
        ([f"peft.init_from={start}"], f"peft.rank is 2, and {start} has 3: leave it out"),
        ([f"peft.init_from={start}", "peft.rank=3", "peft.alpha=3"], f"peft.alpha is 3.0, and {start} has 6.0"),
        (
            [f"peft.init_from={start}", "peft.rank=3", "peft.target_modules=[to_q]"],
            "peft.target_modules is ['to_q'], and",
        ),
        (["peft.init_from=ragged.safetensors"], f"its layers have 2 ranks (2, 3), not one; {instead}"),
        ([f"peft.init_from={dora}"], f"it has DoRA magnitudes or biases, which are not trained; {instead}"),
        ([f"peft.init_from={whole}"], f"it has a part for text_encoder, and the UNet alone is trained; {instead}"),
        (
            [f"peft.init_from={start}", "peft.peft_scheme=none"],
            "peft_scheme none trains the whole UNet: use model.loras",
        ),
        (["peft.init_from=nowhere"], "peft.init_from nowhere: there is no such file or folder"),
        (["model.loras=[nowhere=0.5]"], "model.loras nowhere"),
        ([f"model.loras=[{start}=0]"], "with the scale 0 it would change nothing; leave it out"),
        ([f"model.loras=[{start}=x]"], "expected PATH or PATH=SCALE with a number"),
        ([f"model.loras=[{dora},{start}]"], "one of them is DoRA, which cannot be added to others"),
    ]
    for settings, words in cases:
        result = draftp("train", "--preset", recipe(tiny_sdxl), "--quiet", *(f"--set={text}" for text in settings))
        assert result.code == 2, (settings, result.err)
        assert words in result.err, result.err
        assert result.err.count("\n") == 1, result.err


def test_the_settings_refuse_it_in_python_too(tiny_sdxl):
    with pytest.raises(InputError, match=r"peft.rank is 2, and .* has 3"):
        begun(tiny_sdxl, write_lora(Path("start"), tiny_sdxl, rank=3), rank=2)

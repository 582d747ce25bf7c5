"""Wrong settings and files: one line on stderr that says what came and what to do; the right exit code."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from tests.command import draftp, in_child, recipe

SETTINGS = [
    # (--set, words of the message)
    ("trainer.max_step=3", "unknown setting trainer.max_step, did you mean max_steps?"),
    ("modle.pretrained=toy", "unknown setting modle, did you mean model?"),
    ("lr=1e-4", "unknown setting lr"),
    ("rewards.red.wieght=1", "did you mean weight?"),
    ("sampling.height=100", "sampling.height = 100: input should be a multiple of 8"),
    ("sampling.steps=0", "sampling.steps = 0: input should be greater than or equal to 1"),
    ("sampling.steps=1001", "less than or equal to 1000"),
    ("sampling.steps=many", "sampling.steps = 'many': input should be a valid integer"),
    ("sampling.sampler=heun", "train with euler, ddim, euler_ancestral or lcm"),
    ("sampling.sampler=lms", "input should be 'euler', 'heun', 'ddim', 'dpmpp_2m', 'euler_ancestral' or 'lcm'"),
    ("sampling.schedule=karras", "'trailing' or 'leading'"),
    ("sampling.scale=.nan", "sampling.scale = nan"),
    ("sampling.scale=.inf", "sampling.scale = inf"),
    ("sampling.scale=0", "sampling.scale = 0: allowed are 1 to 100; 1 is no guidance, which diffusers and few-step"),
    ("sampling.scale=0.5", "sampling.scale = 0.5: allowed are 1 to 100; 1 is no guidance"),
    ("sampling={scale: -7}", "sampling.scale = -7: allowed are 1 to 100; 1 is no guidance"),
    ("draftp.truncation_steps=4", "draftp.truncation_steps is 4, sampling.steps 3: K can be at most 3"),
    ("draftp.truncation_steps=0", "greater than or equal to 1"),
    ("draftp.kl_coeff=-1", "greater than or equal to 0"),
    (
        "draftp.combine=min",
        "draftp.combine min compares rewards: give rewards.tests.example_rewards:red.normalise std or",
    ),
    ("draftp.combine=product", "'sum' or 'min'"),
    ("draftp.kl_target=0", "greater than 0"),
    ("draftp.kl_gate=oracle", "'none' or 'held_out'"),
    ("draftp.kl_gate=held_out", "but there are none: name a reward in held_out_rewards"),
    ("draftp={kl_gate: held_out, kl_by_reward: true}", "both weigh the penalty by image: use only one of"),
    (
        "draftp={kl_target: 0.1, kl_coeff: 0}",
        "draftp.kl_target 0.1 steers the coefficient from draftp.kl_coeff on, and",
    ),
    ("peft.peft_scheme=dora", "'lora' or 'none'"),
    ("peft.rank=0", "greater than or equal to 1"),
    ("peft.target_modules=[nowhere]", "peft.target_modules nowhere: no module of the UNet has such a name"),
    ("model.precision=fp8", "'fp64', 'fp32', 'bf16' or 'fp16'"),
    ("model.device=tpu", "model.device 'tpu'"),
    ("model.device=cuda:99", "model.device 'cuda:99'"),
    ("optim.lr=0", "greater than 0"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("optim.sched.name=wobbly", "optim.sched.name"),
    ("trainer.global_batch_size=3", "the nearest that work: 2, 4"),
    ("trainer.keep_checkpoints=0", "greater than or equal to 1"),
    ("trainer.micro_batch_size=3", "the nearest that work: 3"),
    ("sampling.sizes=[[64, 60]]", "multiple of 8"),
    ("sampling.sizes=[64]", "sampling.sizes.0"),
    ("ema.decay=1", "less than 1"),
    ("ema.device=gpu", "'same' or 'cpu'"),
    ("ema.rate=0.9", "unknown setting ema.rate"),
    ("logging.wandb=''", "at least 1 character"),
    ("logging.tensorboard=maybe", "it can be true or false"),
    ("logging.trackers=[tensorbord]", "did you mean tensorboard?; available: aim, clearml, comet_ml,"),
    ("logging.trackers=mlflow", "logging.trackers = 'mlflow': input should be a valid list"),
    ("data.prompts=nobody/nothing", "data.prompts nobody/nothing: "),
    ("data.validation_prompts=nowhere.jsonl", "data.validation_prompts nowhere.jsonl: cannot be read"),
    ("data.prompts=[]", "data.prompts"),
    ("data.prompts=nowhere.txt", "data.prompts nowhere.txt: cannot be read (No such file or directory)"),
    ("data.prompts=toy-trane", "one of the sets animals"),
    ("data.prompts=cat.png", "expected a .txt, .jsonl, .tar, .csv, .tsv or .parquet file"),
    ("held_out_rewards=[pickscoer]", "did you mean pickscore?"),
    ("sharding={channels_last: true, strategy: fsdp}", "channels_last cannot be combined with sharding.strategy fsdp"),
    ("trainer.max_steps", "--set trainer.max_steps: expected KEY=VALUE"),
    ("trainer.max_steps=[1", "invalid YAML"),
]


def expect(result, code, *words):
    assert result.code == code, (result.code, result.err)
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("draftp: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(("setting", "words"), SETTINGS, ids=[s for s, _ in SETTINGS])
def test_wrong_settings(tiny_sdxl, setting, words):
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run", "--set", setting)
    expect(result, 2, words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"\n\n", "there is no prompt in it"),
        ("latin.txt", "ein grüner Käfer".encode("latin-1"), "not UTF-8 text"),
        ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8 text"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not valid JSON"),
        ("list.jsonl", b'["a fox"]', "expected an object"),
        ("number.jsonl", b'{"prompt": 3}', "expected an object"),
        ("key.jsonl", b'{"prompt": "a", "promt": "b"}', "unknown key 'promt'"),
        ("negative.jsonl", b'{"prompt": "a", "negative_prompt": 1}', "negative_prompt must be text"),
        ("deep.jsonl", b"[" * 100_000, "not valid JSON"),
        ("long.txt", b"x" * 2_000_000, "line 1: longer than"),
        ("float.jsonl", b'{"prompt": "a", "seed": 1.5}', "seed 1.5 must be a whole number"),
        ("seed.jsonl", b'{"prompt": "a", "seed": 4294967296}', "from 0 to 4294967295"),
        ("odd.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "size": [64, 100]}', "line 2: size [64, 100] must be"),
        ("one.jsonl", b'{"prompt": "a", "size": 64}', "size 64 must be [height, width]"),
        ("yes.jsonl", b'{"prompt": "a", "size": [true, 64]}', "size [True, 64] must be"),
        ("noise.tar", b"\x01" * 4096, "not an uncompressed tar file"),
        ("packed.tar", b"\x1f\x8b\x08\x00" + bytes(600), "not an uncompressed tar file"),
        ("nothing.tar", bytes(10240), "there is no prompt in it"),
    ],
)
def test_wrong_prompt_files(tiny_sdxl, name, content, words):
    Path(name).write_bytes(content)
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run", "--prompts", name)
    expect(result, 2, name, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- list", "expected settings by section"),
        ("trainer: [", "invalid YAML at line"),
        ("trainer: 3", "trainer = 3"),
        ("optim:\n  lr: 1.0e-4\ntrainer:\n  seed: 1\noptim:\n  lr: 1.0e-3", "line 5 ('optim' stands at line 1 already"),
        ("optim:\n  lr: 1.0e-4\n  lr: 1.0e-3", "line 3 ('lr' stands at line 2 already"),
        ("rewards: {toy: 1.0, toy: 0.5}", "line 1 ('toy' stands at line 1 already"),
        ("optim:\n  sched:\n    name: cosine\n    'name': constant", "line 4 ('name' stands at line 3 already"),
        ("optim:\n\tlr: 1.0e-3", "line 2 (found character '\\t'"),
        ("!!python/object/apply:os.system ['touch hacked']", "invalid YAML"),
    ],
)
def test_wrong_recipes(content, words):
    Path("mine.yaml").write_text(content)
    expect(draftp("train", "--preset", "mine.yaml"), 2, "mine.yaml" if "=" not in words else "", words)
    assert not Path("hacked").exists()


def test_unknown_presets_name_the_known_ones():
    expect(draftp("train", "--preset", "sdxl-lroa"), 2, "did you mean sdxl-lora?", "toy")
    expect(draftp("train", "--preset", "nowhere.yaml"), 2, "there is no such file")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("pickscoer", "did you mean pickscore?"),
        ("tests.example_rewards:jury", "not differentiable"),
        ("tests.example_rewards:blue", "has no 'blue'"),
        ("nowhere.rewards:red", "cannot import"),
        ("os:getcwd", "cannot be called"),
        ("toy=heavy", "expected NAME or NAME=WEIGHT"),
        ("=1", "expected NAME or NAME=WEIGHT"),
        ("pickscore", "without the hub, download it"),
    ],
)
def test_wrong_rewards(tiny_sdxl, reward, words):
    result = draftp("train", "--preset", recipe(tiny_sdxl), "--output", "run", "--reward", reward)
    expect(result, 2, words)


def test_no_reward_at_all(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    preset.write_text(preset.read_text().replace("rewards:\n  tests.example_rewards:red: 1.0\n", ""))
    expect(draftp("train", "--preset", preset, "--output", "run"), 2, "needs at least one")


def test_wrong_models(tiny_sdxl):
    Path("folder").mkdir()
    Path("sd15").mkdir()
    Path("sd15/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    Path("cut.safetensors").write_bytes(b"\x10\x00")
    cases = {
        "folder": "no model_index.json",
        "sd15": "there is no folder unet in it",
        "cut.safetensors": "damaged: cut short at 2 bytes",
        "nowhere.safetensors": "there is no such file",
        "model.ckpt": "convert it to .safetensors",
        "nobody/nothing": "the hub has no such model or cannot be reached",
    }
    for model, words in cases.items():
        preset = recipe(Path(model))
        expect(draftp("train", "--preset", preset, "--output", f"run-{Path(model).name}"), 2, model, words)


def test_wrong_outputs(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    Path("pictures").mkdir()
    Path("pictures/cat.png").write_bytes(b"")
    Path("file").write_text("")
    Path("odd").mkdir()
    Path("odd/config.yaml").write_text("\0")
    expect(draftp("train", "--preset", preset, "--output", "pictures"), 2, "is not a run", "--output")
    expect(draftp("train", "--preset", preset, "--output", "file"), 2, "is not a run")
    expect(draftp("train", "--preset", preset, "--output", "odd"), 2, "odd/config.yaml is damaged")
    expect(draftp("train", "--preset", preset, "--output", "file/run"), 1, "cannot be written")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_damaged_weights_are_named(tiny_sdxl, damage):
    model = Path("damaged")
    shutil.copytree(tiny_sdxl, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    else:
        data[9] ^= 0xFF  # in the header
        weights.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    result = draftp("train", "--preset", recipe(model), "--output", "run")
    expect(result, 2, "damaged")
    assert not list(Path("run").glob("step-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written(tiny_sdxl):
    Path("closed").mkdir(mode=0o500)
    expect(draftp("train", "--preset", recipe(tiny_sdxl), "--output", "closed/run"), 1, "Permission denied")


def test_a_file_system_that_takes_no_folder(tiny_sdxl):
    expect(draftp("train", "--preset", recipe(tiny_sdxl), "--output", "/proc/run"), 1, "/proc/run", "cannot be written")


def test_a_disk_that_gets_full_while_saving_keeps_the_checkpoint_before(tiny_sdxl):
    preset = recipe(tiny_sdxl, trainer={"save_interval": 1, "keep_checkpoints": 9})
    assert draftp("train", "--preset", preset, "--output", "run", "--set", "trainer.max_steps=1").code == 0

    def with_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        expect(draftp("train", "--preset", preset, "--output", "run"), 1, "step-000002", "cannot be written")
        os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(with_a_full_disk)) == 7
    assert [path.name for path in Path("run").glob("step-*")] == ["step-000001"]
    assert draftp("train", "--preset", preset, "--output", "run").code == 0


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_in_one_line(tiny_sdxl):
    preset = recipe(tiny_sdxl)
    Path("run").mkdir()
    Path("run/metrics.jsonl").symlink_to("/dev/full")
    Path("run/config.yaml").write_text(_resolved(preset))
    expect(draftp("train", "--preset", preset, "--output", "run"), 1, "metrics.jsonl", "No space left on device")


def _resolved(preset):
    import draftcli
    from draftcli.config import dump_config

    return dump_config(draftcli.load_config(preset))


def test_debug_shows_where_an_error_comes_from(tiny_sdxl):
    from draftcli.errors import InputError

    with pytest.raises(InputError):
        draftp("train", "--preset", "nowhere", "--debug")


def test_unused_settings_are_warned_about_and_not_refused(tiny_sdxl):
    preset = recipe(tiny_sdxl, optim={"sched": {"name": "constant_with_warmup", "warmup_steps": 99}})
    result = draftp("train", "--preset", preset, "--output", "run")
    assert result.code == 0
    assert "warning: optim.sched.warmup_steps 99 is beyond trainer.max_steps 4" in result.err

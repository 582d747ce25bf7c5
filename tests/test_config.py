"""Settings: preset < file < --set, every key known, the saved file reads back as the same settings."""

from pathlib import Path

import numpy as np
import pytest
import yaml

import draftcli
from draftcli.config import check_config, dump_config, load_config, preset_names, without_effect
from draftcli.errors import InputError


@pytest.mark.parametrize("preset", preset_names())
def test_saved_settings_read_back_as_themselves(preset):
    cfg = load_config(preset)
    Path("config.yaml").write_text(dump_config(cfg))
    assert load_config("config.yaml") == cfg


def test_later_overrides_win_and_values_are_yaml():
    cfg = load_config(
        "toy",
        [
            "optim.lr=1e-3",
            "optim.lr=2e-4",
            "sampling.sizes=[[64, 96]]",
            "sampling.negative_prompt=blurry, dark",
            "model.vae=null",
        ],
    )
    assert cfg.optim.lr == 2e-4
    assert cfg.sampling.sizes == [(64, 96)]
    assert cfg.sampling.negative_prompt == "blurry, dark"
    assert cfg.model.vae is None


def test_a_rewards_short_form_can_be_refined():
    cfg = load_config("toy", ["rewards.toy.target=3"])
    assert (cfg.rewards["toy"].weight, cfg.rewards["toy"].target) == (1.0, 3.0)


def test_settings_are_frozen():
    cfg = load_config("toy")
    with pytest.raises(ValueError, match="frozen"):
        cfg.trainer.max_steps = 3


def test_sdxl_defaults_are_those_that_peers_found_useful():
    """Not the archived YAML's: its warm-up of 10,000 steps never ended."""
    cfg = load_config("sdxl-lora")
    assert (cfg.peft.rank, cfg.optim.lr, cfg.draftp.truncation_steps, cfg.sampling.steps) == (32, 1e-4, 1, 25)
    assert (cfg.sampling.scale, cfg.trainer.global_batch_size, cfg.trainer.gradient_clip_val) == (5.0, 16, 1.0)
    assert cfg.draftp.kl_coeff > 0
    assert cfg.model.precision == "bf16"
    assert cfg.model.vae_precision is None
    assert cfg.optim.sched.warmup_steps <= 0.05 * cfg.trainer.max_steps
    assert 200 <= cfg.trainer.max_steps <= 500


def test_every_setting_is_documented_or_speaks_for_itself():
    plain = {"height", "width", "sampler", "negative_prompt", "lr", "betas", "weight_decay", "name", "warmup_steps"}
    plain |= {"prompts", "max_steps", "keep_checkpoints", "seed", "weight", "strategy", "peft_scheme"}
    for section in yaml.safe_load(dump_config(check_config({}))):
        for name, field in _fields(section):
            assert field.description or name in plain | {"normalise", "sched"}, f"{section}.{name}"


def _fields(section):
    annotation = draftcli.Config.model_fields[section].annotation
    return getattr(annotation, "model_fields", {}).items()


def test_timesteps_are_numpys_for_every_number_of_steps():
    for n in range(1, 1000):
        assert draftcli.timesteps(n) == np.linspace(999, 0, n, endpoint=False).astype(int).tolist()
    assert draftcli.timesteps(1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("n", [0, 1001, -3])
def test_timesteps_outside_the_schedule_are_refused(n):
    with pytest.raises(ValueError, match="1 to 1000"):
        draftcli.timesteps(n)


def test_settings_given_in_vain_are_warned_about():
    data = {
        "optim": {"sched": {"name": "constant", "warmup_steps": 5}},
        "peft": {"peft_scheme": "none", "rank": 8},
        "sampling": {"scale": 1, "negative_prompt": "blurry"},
        "trainer": {"max_steps": 10, "save_interval": 20, "val_check_interval": 20},
        "held_out_rewards": ["toy_oracle"],
        "model": {"vae_tile": 1024, "config": "elsewhere"},
        "sharding": {"decode_batch_size": 2, "fold_lora": False, "fold_tolerance": 0.1},
    }
    text = "\n".join(without_effect(check_config(data)))
    for word in ("warmup_steps", "peft.rank", "negative_prompt", "save_interval", "val_check_interval", "held_out"):
        assert word in text
    for word in ("model.vae_tile 1024", "decode_batch_size", "fold_tolerance", "model.config"):
        assert f"{word} has no" in text
    gated = {**data, "draftp": {"kl_gate": "held_out"}}
    assert "held_out" not in "\n".join(without_effect(check_config(gated))), "asked in training, without validation"
    for idle in ({"kl_gate": "held_out"}, {"kl_by_reward": True}):
        found = without_effect(check_config({**data, "draftp": {**idle, "kl_coeff": 0}}))
        assert any("has no effect with draftp.kl_coeff 0" in line for line in found)
    assert "vae_tile" not in "\n".join(without_effect(check_config({**data, "sampling": {"sizes": [[64, 2048]]}})))
    assert without_effect(check_config({})) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["monitor.stop=never", "monitor.final=last"],
            "monitor.patience and final have no effect: monitor.stop is never",
        ),
        (
            ["held_out_rewards=[]", "monitor.patience=2"],
            "have no effect: without held_out_rewards monitor.stop is never",
        ),
        (["held_out_rewards=[]", "monitor.stop=hacking", "monitor.patience=2"], None),
        (
            ["trainer.val_check_interval=0", "held_out_rewards=[]", "monitor.stop=hacking"],
            "have no effect without valid",
        ),
        (["held_out_rewards=[toy, brightness]"], "held_out_rewards toy has no effect: it is trained on"),
    ],
)
def test_a_monitor_given_in_vain_is_warned_about(settings, said):
    cfg = load_config("toy", settings)
    text = "\n".join(without_effect(cfg))
    assert said in text if said else text == ""
    assert "toy" not in cfg.held_out


def test_what_does_not_go_with_split_weights_is_said():
    split = {"strategy": "fsdp", "fold_lora": True}
    assert "fsdp never folds" in "\n".join(without_effect(check_config({"sharding": split})))
    assert "it is for fsdp" in "\n".join(
        without_effect(check_config({"sharding": {"strategy": "ddp", "shard_size": 2}}))
    )
    with pytest.raises(InputError, match=r"ema\.device cpu cannot be combined with sharding\.strategy fsdp"):
        check_config({"sharding": {"strategy": "fsdp"}, "ema": {"decay": 0.9, "device": "cpu"}})


def test_a_recipe_that_is_no_file_and_no_preset_names_the_presets():
    with pytest.raises(InputError, match="toy-full"):
        load_config("nothing")


@pytest.mark.parametrize(
    "data",
    [
        {"sampling": {"steps": 2}, "draftp": {"truncation_steps": 3}},
        {"trainer": {"micro_batch_size": 4, "global_batch_size": 10}},
        {"sharding": {"offload": True, "strategy": "fsdp"}},
        {"model": {"quantize": "8bit"}, "peft": {"peft_scheme": "none"}},
        {"draftp": {"low_variance_samples": 2}, "sharding": {"two_stage": False}},
    ],
    ids=str,
)
def test_what_only_a_training_forbids_does_not_stop_drawing(data):
    with pytest.raises(InputError):
        check_config(data)
    check_config(data, purpose="drawing")
    with pytest.raises(InputError, match="the first number is the smaller one"):
        check_config({**data, "sampling": {"guidance_interval": [0.9, 0.1]}}, purpose="drawing")


def test_a_recipe_read_for_drawing_leaves_out_how_its_network_was_kept_small(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {quantize: 8bit, vae_tile: 512}\ndraftp: {truncation_steps: 4}\nsharding: {offload: true}\n"
        "sampling: {steps: 8}\n"
    )
    read = load_config(recipe, purpose="drawing")
    assert (read.model.quantize, read.sharding.offload, read.draftp.truncation_steps) == (None, False, 1)
    assert (read.model.vae_tile, read.sampling.steps) == (512, 8)
    again = load_config(recipe, ["sharding.offload=true", "model.quantize=8bit"], purpose="drawing")
    assert (again.model.quantize, again.sharding.offload) == ("8bit", True)
    trained = load_config(recipe)
    assert (trained.model.quantize, trained.sharding.offload, trained.draftp.truncation_steps) == ("8bit", True, 4)


def test_a_recipe_may_override_what_it_merges():
    text = "rewards:\n  a: &a {weight: 1.0}\n  b: &b {<<: *a, weight: 0.5}\n  c: {<<: *b, weight: 0.25}\n"
    Path("mine.yaml").write_text(text)
    assert [reward.weight for reward in load_config("mine.yaml").rewards.values()] == [1.0, 0.5, 0.25]

"""A ~ at the start of a path is the home folder, wherever a path is given."""

from pathlib import Path

import pytest

from draftcli.config import dump_config, load_config
from tests.cli.test_bad_input import expect
from tests.command import draftp

SETTINGS = [
    *("model.pretrained", "model.config", "model.vae", "data.prompts", "data.validation_prompts"),
    *("data.validation_cache", "sharding.prompt_cache", "rewards.aesthetic.pretrained", "rewards.aesthetic.backbone"),
    "held_out_rewards.clip.pretrained",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_tilde_is_the_home_folder_in_every_setting_that_is_a_path(setting, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for tilde, expected in (("~/x=0.8", "/home/me/x=0.8"), ("a~/x", "a~/x"), ("~", "/home/me")):
        assert expected in dump_config(load_config(None, [f"{setting}='{tilde}'"])).replace("'", "").split()
    Path("mine.yaml").write_text("data: {prompts: ~/p.txt}\nsampling: {negative_prompt: ~/}\n")
    cfg = load_config("mine.yaml", ["data.validation_prompts=['~/ a fox']"])
    assert (cfg.data.prompts, cfg.sampling.negative_prompt) == ("/home/me/p.txt", "~/")
    assert cfg.data.validation_prompts == ["~/ a fox"]


def test_a_tilde_is_the_home_folder_in_options_whatever_the_shell_did(tiny_sdxl, monkeypatch):
    home = Path("home").resolve()
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "tiny").symlink_to(tiny_sdxl)
    (home / "p.txt").write_text("a fox")
    small = ["--steps=1", "--height=64", "--width=64", "--scale=1"]
    result = draftp("sample", "--model=~/tiny", "--prompts", "~/p.txt", "--prompt=~/x", *small, "--output=~/out")
    assert result.code == 0, result.err
    assert '"prompt": "~/x"' in (home / "out/index.jsonl").read_text()
    expect(
        draftp("sample", "--model=toy", "--lora=~/l=0.8", "--prompt=a"), 2, f"--lora {home}/l: there is no such file"
    )
    expect(draftp("train", "--preset=~/r.yaml"), 2, f"{home}/r.yaml: there is no such file")
    assert sorted(path.name for path in Path().iterdir()) == ["home"]

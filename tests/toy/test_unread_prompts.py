"""Prompts that the toy was not made for are said wherever the toy draws them."""

from pathlib import Path

import pytest

from draftcli.core.models.places import BUILT_IN, unread_prompts
from tests.command import draftp

SHORT = [
    *("--set", "trainer.max_steps=1", "--set", "trainer.val_check_interval=0", "--set", "optim.sched.warmup_steps=0"),
    *("--set", "trainer.global_batch_size=1", "--set", "trainer.micro_batch_size=1", "--set", "sampling.steps=4"),
]
READ = ("a red star", "A small pink star, on the left of a gray background.", "a big blue ring", "")
UNREAD = ("a fox in fresh snow", "a red dog", "red star", "a tiny red star")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    result = draftp("train", *SHORT, "--output", folder)
    assert (result.code, "cannot read" in result.err) == (0, False), result.err
    assert "preset toy, as no --preset was given" in result.out
    return folder


@pytest.mark.parametrize("text", READ)
def test_what_the_toy_was_made_for(text):
    assert unread_prompts("toy", [text]) is None


@pytest.mark.parametrize("text", UNREAD)
def test_what_it_was_not_made_for(text):
    said = unread_prompts("toy", [*READ, text, text])
    assert said.startswith(f'the model toy cannot read 2 of {len(READ) + 2} prompts, the first is "{text}"')
    assert BUILT_IN["toy"].elsewhere in said
    assert unread_prompts("stabilityai/stable-diffusion-xl-base-1.0", [text]) is None


COMMANDS = [
    ("train", *SHORT, "--prompts", "mine.txt", "--output", "out"),
    ("sample", "RUN", "--prompts", "mine.txt", "--output", "out"),
    ("sample", "--model", "toy", "--prompt", "a fox", "--prompt", "a red star", "--steps", 2, "--output", "out"),
    ("anneal", "RUN", "--weight", "linear", "--prompt", "a fox", "--prompt", "a red star", "--output", "out"),
    ("eval", "RUN", "--weight", "tuned", "--prompts", "mine.txt", "--num-images", 1, "--output", "out"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(map(str, c[:2])) for c in COMMANDS])
def test_every_command_says_it_once(run, command):
    Path("mine.txt").write_text("a fox\na red star\n")
    result = draftp(*[run if word == "RUN" else word for word in command])
    assert result.code == 0, result.err
    assert result.err.count('the model toy cannot read 1 of 2 prompts, the first is "a fox"') == 1, result.err

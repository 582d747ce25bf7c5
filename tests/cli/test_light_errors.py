"""What is wrong with a command line is said before torch is imported: a typo costs a fraction of a second."""

import json
import subprocess
import sys

import pytest

CASES = [
    ("train", "--preset", "nonesuch"),
    ("train", "--set", "trainer.max_stps=3"),
    ("train", "--prompts", "nofile.txt"),
    ("train", "--prompts", "nonesuch"),
    ("train", "--set", "data.validation_prompts=nofile.jsonl"),
    ("train", "--reward", "nonesuch"),
    ("train", "--set", "model.pretrained=nofile.safetensors"),
    ("train", "--set", "model.pretrained=nofolder"),
    ("train", "--set", "model.pretrained=some/where/else"),
    ("train", "--set", "model.vae=nofolder"),
    ("train", "--set", "model.pretrained=model.safetensors", "--set", "model.config=nofolder"),
    ("train", "--set", "model.device=tpu"),
    ("train", "--set", "model.device=cuda:one"),
    ("train", "--reward", "nofile.py:red"),
    ("train", "--reward", "nowhere.rewards:red"),
    ("train", "--set", "rewards.pickscore.pretrained=nofolder"),
    ("train", "--set", "held_out_rewards=[nofile.py:red]"),
    ("train", "--output", "something"),
    ("train", "--fit", "much"),
    ("sample", "nosuchrun"),
    ("sample", "RUN", "--lora", "nofile"),
    ("sample", "RUN", "--prompts", "nofile.txt"),
    ("sample", "RUN", "--format", "gif"),
    ("sample", "--model", "nofile.safetensors", "--prompt", "a fox"),
    ("sample", "--model", "nofolder", "--prompt", "a fox"),
    ("sample", "RUN", "--set", "model.device=tpu"),
    ("sample", "--model", "toy", "--lora", "nofile"),
    ("sample", "--model", "toy"),
    ("anneal", "nosuchrun"),
    ("anneal", "RUN", "--weight", "linaer"),
    ("anneal", "--model", "toy", "--prompt", "a fox", "--weight", "linear"),
    ("anneal", "--model", "toy", "--prompt", "a fox", "--steps", "0"),
    ("eval", "nosuchrun"),
    ("eval", "RUN", "--weight", "linaer"),
    ("eval", "RUN", "--reward", "nonesuch"),
    ("eval", "RUN", "--judge", "nobody"),
    ("eval", "RUN", "--features", "nonesuch"),
    ("eval", "RUN", "--features", "dinov2=nofolder"),
    ("eval", "RUN", "--prompts", "nofile.txt"),
    ("eval", "RUN", "--set", "model.device=tpu"),
    ("eval", "RUN", "--lora-scale", "much"),
    ("merge-lora", "nofile"),
    ("merge-lora", "RUN=much"),
    ("merge-lora", "RUN", "--base", "nofile.safetensors"),
    ("merge-lora", "RUN", "--base", "nofolder"),
    ("merge-lora", "RUN", "--config", "nofolder"),
    ("merge-lora", "RUN", "--format", "nonesuch"),
    ("merge-lora", "RUN", "--dtype", "fp8"),
    ("merge-lora", "RUN", "--verify", "twice"),
    ("merge-lora", "RUN", "--scale", "0"),
    ("doctor", "--preset", "nonesuch"),
    ("presets", "nonesuch"),
    ("runs", "nosuchrun"),
    ("settings", "nonesuch"),
    ("rewards", "check", "nonesuch"),
    ("rewards", "check", "nofile.py:red"),
    ("rewards", "check", "nowhere:red"),
    ("rewards", "check", "pickscore", "--pretrained", "nofolder"),
    ("rewards", "check", "toy", "--device", "tpu"),
    ("rewards", "check", "toy", "--size", "large"),
    ("rewards", "train", "nofile.jsonl"),
    ("rewards", "train", "notes.txt"),
    ("rewards", "train", "liked", "--from", "nonesuch"),
    ("rewards", "train", "liked", "--from", "./nofolder"),
    ("rewards", "train", "liked", "--judge", "nonesuch"),
    ("rewards", "train", "liked", "--device", "tpu"),
    ("rewards", "train", "liked", "--output", "something"),
    ("rate", "nosuchrun"),
    ("rate", "--preset", "toy", "--device", "tpu"),
    ("rate", "--preset", "toy", "--judge", "nonesuch"),
    ("rate", "--preset", "toy", "--prompts", "nofile.txt"),
]
# Each in a fork of one process that has imported the command line and nothing else, as a start does.
SCRIPT = """
import json, os, sys
from draftcli.cli import main
assert "torch" not in sys.modules
for words in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.argv = ["draftp", *words]
        try:
            main()
            code = 0
        except SystemExit as leave:
            code = leave.code
        print(json.dumps([code, "torch" in sys.modules or "diffusers" in sys.modules]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found(lora_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    (folder / "something").mkdir()
    (folder / "liked").mkdir()
    (folder / "model.safetensors").touch()
    (folder / "notes.txt").touch()
    (folder / "something" / "else.txt").write_text("mine")
    commands = [[word.replace("RUN", str(lora_run)) for word in case] for case in CASES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_typo_costs_no_import_of_torch(found, case):
    code, imported_torch = found[case]
    assert (code, imported_torch) == (2, False)


@pytest.mark.parametrize("command", ["sample", "anneal"])
def test_libraries_say_nothing_of_their_own(lora_run, command):
    """In a process of its own: transformers speaks of what it lacks when it is imported, unless it was told before."""
    words = [command, str(lora_run), "--prompt", "a red dog", "--output", "out", "--set", "sampling.steps=1"]
    code = f"import sys; sys.argv = ['draftp', *{words!r}]; from draftcli.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

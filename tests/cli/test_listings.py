"""`draftp presets`, `runs` and `settings`: what they list is what is there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftcli.config import Config, all_settings, load_config, preset_names, presets_folder, settings_schema
from draftcli.runs import Run
from tests.command import draftp

LISTINGS = (("presets",), ("presets", "toy"), ("runs",), ("settings",), ("settings", "--json-schema"))


def test_presets_are_listed_with_hardware_and_status():
    rows = draftp("presets").out.splitlines()[1:]
    for name in preset_names():
        (row,) = [row for row in rows if row.split()[:1] == [name]]
        assert ("two CPU cores" if name.startswith("toy") else "GPU") in row
        measured = json.loads(draftp("presets", name, "--json").out)["measured"]
        assert ("measured: " if measured else "not yet run on this hardware") in row


@pytest.mark.parametrize("name", preset_names())
def test_every_header_has_every_field(name):
    facts = json.loads(draftp("presets", name, "--json").out)
    assert all(facts[field] for field in ("summary", "hardware", "duration", "result"))
    assert facts["command"].startswith(f"draftp train --preset {name}")
    assert facts["measured"] is ("(measured 20" in facts["duration"])


def test_a_preset_is_printed_whole_and_can_be_trained_from():
    Path("mine.yaml").write_text(draftp("presets", "sdxl-lora").out)
    assert load_config("mine.yaml") == load_config("sdxl-lora")
    assert Path("mine.yaml").read_text() == (presets_folder() / "sdxl-lora.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("presets", "toyy"), "unknown preset 'toyy', did you mean toy?"),
        (("settings", "kl_coef"), "unknown section or setting 'kl_coef', did you mean kl_coeff?"),
        (("settings", "sampilng"), "did you mean sampling?"),
        (("settings", "draftp", "--json-schema"), "leave out the section"),
        (("runs", "nosuch"), "nosuch is not a run (it has no config.yaml); runs here: none"),
    ],
)
def test_a_wrong_name_is_one_line(words, told):
    result = draftp(*words)
    assert (result.code, result.out) == (2, "")
    assert told in result.err
    assert len(result.err.splitlines()) == 1


def test_every_setting_is_listed_with_its_default():
    settings = {setting.key: setting for setting in all_settings()}
    for section, values in Config().model_dump(mode="json").items():
        for name, value in values.items():
            if isinstance(value, dict):
                continue
            listed = yaml.safe_load(settings[f"{section}.{name}"].default)
            assert listed == value or float(listed) == value
    assert all(setting.text and setting.type for setting in settings.values())
    assert {"rewards.NAME.weight", "rewards.NAME.relative.positive", "optim.sched.name"} <= settings.keys()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ema", ["ema.decay", "ema.device", "ema.in_validation", "ema.in_final"]),
        ("optim.sched", ["optim.sched.name", "optim.sched.warmup_steps"]),
        ("draftp.kl_coeff", ["draftp.kl_coeff"]),
        ("weight", ["rewards.NAME.weight"]),
        ("backbone", ["rewards.NAME.backbone", "held_out_rewards.NAME.backbone"]),
    ],
)
def test_settings_are_found_by_section_key_and_last_name(name, keys):
    assert draftp("settings", name, "--quiet").out.split() == keys


def fits(value: Any, node: dict, schema: dict) -> bool:
    """Whether `value` is what a JSON schema allows, as far as ours goes."""
    if "$ref" in node:
        return fits(value, schema["$defs"][node["$ref"].split("/")[-1]], schema)
    if "anyOf" in node:
        return any(fits(value, choice, schema) for choice in node["anyOf"])
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict}
    kinds["null"] = type(None)
    names = [node["type"]] if isinstance(node.get("type"), str) else node.get("type", [*kinds])
    if not any(isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, dict):
        inner, others = node.get("properties", {}), node.get("additionalProperties", {})
        named = ((v, inner.get(k, others)) for k, v in value.items())
        return all(node is not False and fits(v, node, schema) for v, node in named)
    if isinstance(value, list):
        each = node.get("prefixItems") or [node.get("items", {})] * len(value)
        return len(each) == len(value) and all(map(fits, value, each, [schema] * len(value)))
    return value in node.get("enum", [value]) and (not isinstance(value, int) or value >= node.get("minimum", value))


SHORT_FORMS = "held_out_rewards: [clip, {name: toy, pretrained: x}]\nlogging: {tensorboard: false, wandb: mine}\n"


@pytest.mark.parametrize("name", [*preset_names(), "short forms"])
def test_what_a_recipe_may_say_fits_the_schema(name):
    text = SHORT_FORMS if name == "short forms" else draftp("presets", name).out
    assert fits(yaml.safe_load(text), json.loads(draftp("settings", "--json-schema").out), settings_schema())


@pytest.mark.parametrize(
    "text", ["trainer: {max_stps: 3}", "trainer: {max_steps: many}", "trainer: {max_steps: 0}", "nosuch: 1"]
)
def test_what_it_may_not_say_does_not_fit(text):
    assert not fits(yaml.safe_load(text), settings_schema(), settings_schema())


@pytest.fixture
def run(lora_run):
    """A finished run under runs/, and what was made from it."""
    shutil.copytree(lora_run, "runs/mine")  # other tests share the run: nothing may be drawn into it
    return Path("runs/mine")


def listed(*words):
    return json.loads(draftp("runs", *words, "--json").out)


def test_no_runs_are_no_error():
    result = draftp("runs")
    assert result.code == 0
    assert "no runs under runs/" in result.out
    assert listed() == []


def test_a_run_is_listed_with_steps_and_what_was_made_of_it(run, tiny_sdxl):
    assert draftp("sample", "runs/mine", "--prompt", "a red cat", "--num-images", 2).code == 0
    (found,) = listed()
    assert found["folder"] == "runs/mine"
    assert (found["state"], found["step"], found["max_steps"]) == ("finished", 2, 2)
    assert found["made"] == {"sample": "2 images"}
    words = draftp("runs", "mine").out
    assert "2/2" in words
    assert "in training" in words
    assert "sample: 2 images" in words


@pytest.fixture
def begun(run):
    """A copy of it that can be written to."""
    shutil.copytree(run, "runs/other")
    return Path("runs/other")


def test_states(begun, lora_run):
    (begun / "final" / "step.txt").unlink()
    assert listed("other")[0]["state"] == "stopped"
    with Run(begun).locked():
        assert listed("other")[0]["state"] == "training"
    for path in begun.glob("step-*"):
        path.rename(begun / f"old-{path.name}")
    (begun / "final").rename(begun / "old")
    assert listed("other")[0]["state"] == "no weights"
    assert {run["folder"]: run["state"] for run in listed()} == {"runs/mine": "finished", "runs/other": "no weights"}
    (begun / "config.yaml").write_text("[")
    assert listed("other")[0]["state"] == "damaged"
    assert "damaged" in draftp("runs").out


def test_last_scores_are_of_the_last_whole_line(begun):
    figures = {"base": 7.777, "tuned": 10.2222, "difference": 2.4, "low": 2.0, "high": 3.0, "n": 4}
    lines = [{"step": s, "images": 4, "rewards": {"toy": {**figures, "tuned": s}}, "diversity": {}} for s in (1, 2)]
    with (begun / "validation.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "rew')
    (found,) = listed("other")
    assert found["validation"] == lines[-1]
    assert "toy 7.78 -> 2" in draftp("runs", "other").out


def test_a_held_out_reward_is_marked(begun):
    settings = yaml.safe_load((begun / "config.yaml").read_text())
    (begun / "config.yaml").write_text(yaml.safe_dump({**settings, "held_out_rewards": {"toy_oracle": {}}}))
    line = {"step": 2, "images": 4, "rewards": {"toy_oracle": {"base": 0.5, "tuned": None}}, "diversity": {}}
    (begun / "validation.jsonl").write_text(json.dumps(line))
    assert "toy_oracle* 0.5 -> -" in draftp("runs", "other").out
    assert Run(begun).validations() == [line]


@pytest.mark.parametrize("words", LISTINGS)
def test_a_listing_imports_nothing_heavy(words):
    code = (
        "import sys; from draftcli.cli import main\n"
        f"sys.argv = ['draftp', *{words!r}]\n"
        "try: main()\n"
        "except SystemExit as leave: assert not leave.code\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


COMPLETED = {
    "draftp presets toy": ["toy", "toy-4step", "toy-full"],
    "draftp train --preset toy-": ["toy-4step", "toy-full"],
    "draftp train --reward picks": ["pickscore"],
    "draftp train --set draftp.kl": [
        *("draftp.kl_coeff=", "draftp.kl_kind=", "draftp.kl_target=", "draftp.kl_gate=", "draftp.kl_by_reward="),
    ],
    "draftp settings em": ["ema", "ema.decay", "ema.device", "ema.in_validation", "ema.in_final"],
    "draftp sample mi": ["mine"],
    "draftp eval runs/": ["runs/mine"],
}


@pytest.mark.parametrize("line", COMPLETED)
def test_the_shell_completes_names(line, run):
    code = "import sys; from draftcli.cli import main\nsys.argv = ['draftp']\nmain()"
    asked = {"_DRAFTP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == COMPLETED[line]


COMMANDS = ("train", "sample", "anneal", "eval", "merge-lora", "doctor", "presets", "runs", "settings")


@pytest.mark.parametrize(
    "command", [*((c,) for c in COMMANDS), ("rewards",), ("rewards", "list"), ("rewards", "check")]
)
def test_help_is_short_to_ask_for_and_plain(command):
    short, long = draftp(*command, "-h"), draftp(*command, "--help")
    assert short == long
    assert short.code == 0
    for odd in ("<bool>", "<str>", "<int>", "<float>", "<path>", "<=x", "x>="):
        assert odd not in short.out
    if command != ("rewards",):
        assert "Examples" in short.out
        assert short.out.count(f"draftp {' '.join(command)}") >= 2

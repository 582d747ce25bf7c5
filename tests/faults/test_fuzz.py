"""Settings, prompts, and the text files and pictures that a run leaves: fuzzed (tests/faults/fuzzing.py)."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import draftcli
from draftcli.config import dump_config, presets_folder, without_effect
from draftcli.errors import InputError
from draftcli.evaluation.pictures import folder_gallery, items_of, read_entries, read_picture
from draftcli.prompts import read_prompts
from draftcli.runs import Run, find_run
from draftcli.sampling import embedded
from draftcli.sampling.source import find_source
from tests.faults.fuzzing import EDITS, JSON_VALUE, NUMBER, TEXT, VALUE, changed, fuzz, tried


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the inputs lie: one for all inputs of a test, which hypothesis asks for."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def working_directory(folder, monkeypatch):
    """Instead of one for each test."""
    monkeypatch.chdir(folder)
    return folder


def paths_of(section: Any, before: str = "") -> list[str]:
    """Every dotted key of the settings."""
    if not isinstance(section, dict):
        return [before]
    return [before, *(p for name, item in section.items() for p in paths_of(item, f"{before}.{name}".lstrip(".")))]


KEYS = [key for key in paths_of(draftcli.load_config("toy").model_dump(mode="json")) if key]
KEY = st.sampled_from(KEYS) | st.builds("{}.{}".format, st.sampled_from(KEYS), TEXT) | TEXT


def in_yaml(value: Any) -> str:
    """As somebody could write it in a file."""
    return yaml.safe_dump(value, allow_unicode=False)


def use_settings(*arguments: Any, **options: Any) -> None:
    cfg = draftcli.load_config(*arguments, **options)
    without_effect(cfg)
    Path("written.yaml").write_text(dump_config(cfg), encoding="utf-8")
    assert draftcli.load_config("written.yaml") == cfg


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@fuzz(300)
@given(st.dictionaries(KEY, VALUE, max_size=5))
@example({"held_out_rewards": [1]})
def test_presets(values):
    data: dict[Any, Any] = {}
    for key, value in values.items():
        node = data
        *sections, name = str(key).split(".")
        for section in sections:
            inner = node.get(section)
            node[section] = node = inner if isinstance(inner, dict) else {}
        node[name] = value
    Path("mine.yaml").write_text(in_yaml(data), encoding="utf-8")
    with tried(Path()):
        use_settings("mine.yaml")


@fuzz(200)
@given(EDITS.map(lambda edits: changed((presets_folder() / "toy.yaml").read_bytes(), edits)))
@example(BOMB.encode())
@example(f"trainer:\n  max_steps: 0x{'f' * 4000}\n".encode())
@example(b"model: &a [*a]\n")
@example(b"model: {? [a]: b}\n")
@example(b"trainer: {1: 2}\n")
@example(b"trainer: 2001-99-99\n")
@example(b"[" * 20_000)
def test_preset_files_with_changed_bytes(content):
    Path("mine.yaml").write_bytes(content)
    with tried(Path()):
        use_settings("mine.yaml")


@fuzz(400)
@given(st.lists(st.builds("{}{}{}".format, KEY, st.sampled_from(["=", "=", "=", ""]), VALUE.map(in_yaml) | TEXT),
                min_size=1, max_size=3))  # fmt: skip
@example(["held_out_rewards=[1]", "held_out_rewards.toy.pretrained=x"])
@example([BOMB + "=1"])
@example([f"sampling.sizes={'[' * 5000}"])
def test_overrides(overrides):
    with tried(Path()):
        use_settings("toy", overrides)


@fuzz(100)
@given(TEXT | st.builds("{}.yaml".format, TEXT))
@example("x" * 300)
@example("\0.yaml")
def test_names_of_presets_runs_and_prompts(name):
    for use in (draftcli.load_config, read_prompts, find_run, lambda n: find_source(None, "toy", [n])):
        with tried(Path()):
            use(name)


# --- prompts -----------------------------------------------------------------------------------------------------


def use_prompts(path: Path) -> None:
    prompts = read_prompts(str(path))
    assert prompts.sha256
    for i in range(min(50, len(prompts))):
        (prompts[i].text + (prompts[i].negative or "")).encode()  # tokenizers take nothing else


LINE = st.fixed_dictionaries(
    {}, optional={"prompt": TEXT | JSON_VALUE, "negative_prompt": TEXT | JSON_VALUE, "seed": NUMBER | JSON_VALUE,
                  "size": st.lists(NUMBER, max_size=3) | JSON_VALUE, "promt": TEXT}
)  # fmt: skip


@fuzz(250)
@given(st.lists(LINE.map(json.dumps) | JSON_VALUE.map(json.dumps) | st.text(max_size=20), max_size=4))
@example(['{"prompt": "\\ud800"}'])
@example(['{"prompt": "a", "negative_prompt": "\\udfff"}'])
@example(['{"prompt": "a", "seed": ' + "9" * 5000 + "}"])
@example(["[" * 100_000])
def test_prompt_lines(lines):
    path = Path("prompts.jsonl")
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with tried(Path()):
        use_prompts(path)


@fuzz(80)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"a\0b\n\xef\xbb\xbfc")
def test_prompt_texts(content):
    path = Path("prompts.txt")
    path.write_bytes(content)
    with tried(Path()):
        use_prompts(path)


def test_a_pipe_is_not_waited_for():
    os.mkfifo("pipe.txt")
    with pytest.raises(InputError, match="not a file"):
        read_prompts("pipe.txt")


@st.composite
def tars(draw: Any) -> bytes:
    """Archives with names that lead elsewhere, links, devices, and headers that say what is not so."""
    names = TEXT | st.sampled_from(
        [
            "../../escaped.txt",
            "/tmp/escaped.txt",
            "a/../../escaped.txt",
            "C:\\escaped.txt",
            "nul.txt",
            "x" * 400 + ".txt",
        ]
    )
    buffer = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="replace") as tar:
        for _ in range(draw(st.integers(0, 4))):
            name = draw(names) + draw(st.sampled_from(["", ".txt"]))
            member = tarfile.TarInfo(name.replace("\0", "0") or "x")
            odd = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
            member.type = draw(st.sampled_from([*[tarfile.REGTYPE] * 4, *odd, tarfile.GNUTYPE_SPARSE]))
            member.linkname = draw(st.sampled_from(["", "/etc/passwd", "../../x"]))
            member.pax_headers = draw(
                st.dictionaries(st.sampled_from(["size", "path", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset"]),
                                st.sampled_from(["-1", "9" * 30, "x", "../y.txt", "1,2,3", "BINARY"]), max_size=2)
            )  # fmt: skip
            body = draw(st.binary(max_size=40))
            member.size = len(body) if member.type == tarfile.REGTYPE else 0
            try:
                tar.addfile(member, io.BytesIO(body))
            except (ValueError, UnicodeError):
                continue
    return buffer.getvalue()


@fuzz(150)
@given(tars() | st.builds(changed, tars(), EDITS))
def test_archives(content):
    path = Path("prompts.tar")
    path.write_bytes(content)
    with tried(Path()):
        use_prompts(path)
    assert not Path("../escaped.txt").exists()


# --- runs and what lies in them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder):
    """As much of a run as its readers look at before they load weights."""
    run = Run(folder / "run")
    run.step_folder(1).mkdir(parents=True)
    (run.step_folder(1) / "pytorch_lora_weights.safetensors").write_bytes(b"")
    run.config.write_text(dump_config(draftcli.load_config("toy")), encoding="utf-8")
    return run


@fuzz(150)
@given(EDITS | VALUE.map(in_yaml))
@example(BOMB)
@example("trainer: 2001-99-99")
@example("{rewards: {toy: 1.0}, trainer: {max_steps: 0x" + "f" * 4000 + "}}")
def test_settings_of_runs(run, content):
    whole = run.config.read_bytes()
    run.config.write_bytes(content.encode() if isinstance(content, str) else changed(whole, content))
    with tried(Path()):
        find_source(str(run.folder), None, ())
    with tried(Path()), run.locked():
        run.open(draftcli.load_config("toy"))
    run.config.write_bytes(whole)


@fuzz(150)
@given(st.lists(
    (st.fixed_dictionaries({}, optional={"step": NUMBER | JSON_VALUE, "reward": JSON_VALUE, "score": JSON_VALUE,
        "rewards": JSON_VALUE, "file": TEXT, "prompt": TEXT, "seed": NUMBER}) | JSON_VALUE).map(json.dumps)
    | st.text(max_size=20), max_size=4))  # fmt: skip
@example(['{"step": "x"}', '{"step": 1e999}', '{"step": true}', "[" * 100_000])
@example(['{"step": 1, "score": "x"}', '{"step": 2, "score": 3}'])
def test_logs_of_runs(run, lines):
    for path in (run.metrics, run.validation):
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with tried(Path()):
        run.steps()
        run.validations()
        run.best()
        run.forget_after(1)


ENTRY = st.fixed_dictionaries({}, optional={"file": TEXT | JSON_VALUE, "prompt": TEXT | JSON_VALUE,
                                            "seed": NUMBER | JSON_VALUE})  # fmt: skip
INDEX_LINES = st.lists((ENTRY | JSON_VALUE).map(json.dumps) | st.text(max_size=20), max_size=4)


@fuzz(200)
@given(INDEX_LINES)
@example(['{"file": "\\u0000", "prompt": "a", "seed": 0}'])
@example(['{"file": "' + "x" * 5000 + '", "prompt": "a", "seed": 0}'])
@example(['{"file": "a.png", "prompt": "\\ud800", "seed": 0}'])
@example(['{"file": "../../../../etc/passwd", "prompt": "a", "seed": 0}'])
@example(["[" * 100_000])
def test_indexes_of_pictures(lines):
    folder = Path("pictures")
    folder.mkdir(exist_ok=True)
    (folder / "index.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with tried(Path()):
        items = items_of(read_entries(folder))
        for item in items:
            json.dumps([item.prompt, item.seed], ensure_ascii=False).encode()
        folder_gallery(folder, items)


@cache
def picture(suffix: str) -> bytes:
    path = Path(f"whole.{suffix}").absolute()
    embedded.save(Image.new("RGB", (24, 16), "red"), path, suffix, "a fox\nSteps: 3, draftp hash: 0123456789abcdef")
    return path.read_bytes()


@fuzz(300)
@given(st.sampled_from(["png", "jpg", "webp"]), EDITS, st.booleans())
def test_pictures(suffix, edits, in_header):
    path = Path(f"changed.{suffix}")
    path.write_bytes(changed(picture(suffix), edits, 60 if in_header else None))
    with tried(Path()):
        embedded.read_key(path)
    with tried(Path()):
        read_picture(path)

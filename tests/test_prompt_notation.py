"""What other programs write into prompts: read where a prompt can hold it, told where not, never taken for words."""

import json
from pathlib import Path

import pytest

from draftcli.config import SamplingConfig
from draftcli.errors import InputError
from draftcli.prompts import Prompt, built_in_sets, read_prompts
from tests.command import draftp, recipe

KEPT = {
    "kohya": ("a fox --n blurry, dark --w 96 --h 64 --d 7", Prompt("a fox", "blurry, dark", 7, (64, 96))),
    "kohya, capitals": ("a fox --N blurry", Prompt("a fox", "blurry")),
    "AUTOMATIC1111": (
        '--prompt "a fox, \\"red\\" --n" --negative_prompt "low quality" --width 64 --height 96 --seed 3',
        Prompt('a fox, "red" --n', "low quality", 3, (96, 64)),
    ),
    "AUTOMATIC1111, no quotes, any seed": ("--prompt a red fox --seed -1", Prompt("a red fox")),
    "AUTOMATIC1111, single quotes": ("--negative_prompt 'bad art' --prompt 'a fox'", Prompt("a fox", "bad art")),
    "Midjourney": ("a fox --no text, frame --seed 9", Prompt("a fox", "text, frame", 9)),
    "equals signs": ("a fox --seed=9 --negative-prompt=dark", Prompt("a fox", "dark", 9)),
    "dashes that are none": ("a fox -- red --and-brown, well--known", Prompt("a fox -- red --and-brown, well--known")),
}
LEFT_OUT = {
    "a fox --n dark --l 7.5 --s 28": ("'--l 7.5' (sampling.scale sets it for all)", "'--s 28' (sampling.steps"),
    '--prompt "a fox" --sampler_name "Euler a" --tiling': ("'--sampler_name Euler a' (sampling.sampler", "'--tiling'"),
    "a fox --ar 16:9 --v 6.1 --style raw": ("'--ar 16:9'", "'--v 6.1'", "'--style raw'"),
    "a fox --am 0.8 --ct 3": ("removed from 1 prompt", "'--am 0.8'", "'--ct 3'"),
}
REFUSED = {
    "a fox --w 64": "its height is missing",
    "a fox --w 100 --h 64": "size [64, 100] must be [height, width], multiples of 8",
    "a fox --w wide --h 64": "width 'wide' must be a whole number",
    "a fox --d 1,2,3": "seed '1,2,3' must be a whole number",
    "a fox --n dark --no text": "its negative_prompt is there twice",
    "a cat --prompt a fox": "'a cat' stands before --prompt",
    "--n dark": "there is no prompt before --n",
    "a fox\nNegative prompt: dark": "line 2: this is the text that AUTOMATIC1111 stores",
    "Steps: 20, Sampler: Euler a, CFG scale: 7": "AUTOMATIC1111",
    "a fox Negative prompt: dark Steps: 20": "AUTOMATIC1111",
    "a\0 \0f\0o\0x\0": "if it is UTF-16, save it as UTF-8",
}
LITERAL = {
    "a (red:1.3) fox": "'(red:1.3)' (a weight)",
    "a ((red)) fox": "'((red))' (a weight)",
    "a (red fox)++": "')+' (a weight)",
    "fox::2 snow::1": "'x::2' (a weight)",
    "a fox <lora:style:0.8>": "'<lora:style:0.8>' (a LoRA; --lora takes its file)",
    "a fox, embedding:EasyNegative": "'embedding:EasyNegative' (an embedding)",
    "a {red|brown} fox": "'{red|brown}' (a wildcard)",
    "a __colour__ fox": "'__colour__' (a wildcard)",
    "a [fox:cat:0.5]": "'[fox:cat:0.5]' (a prompt that changes between steps)",
    "a fox BREAK snow": "'BREAK' (a break)",
    "a fox --stylise 50": "'--stylise' (a switch; a .jsonl has keys)",
}


@pytest.mark.parametrize(("line", "prompt"), KEPT.values(), ids=KEPT)
def test_switches_are_read_where_a_prompt_can_hold_what_they_say(line, prompt):
    Path("p.txt").write_text(f"an owl\n{line}\n")
    assert list(read_prompts("p.txt")) == [Prompt("an owl"), prompt]
    Path("captions").mkdir()
    Path("captions/1.txt").write_text(line)
    assert list(read_prompts("captions")) == [prompt]


@pytest.mark.parametrize(("line", "listed"), LEFT_OUT.items())
def test_switches_that_a_prompt_cannot_hold_are_left_out_and_listed(line, listed):
    Path("p.txt").write_text(line)
    prompts = read_prompts("p.txt")
    assert prompts[0] in (Prompt("a fox"), Prompt("a fox", "dark"))
    (note,) = prompts.notes
    assert all(words in note for words in listed)


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_what_cannot_be_read_is_refused(text, words):
    Path("p.txt").write_text(text)
    with pytest.raises(InputError) as refused:
        read_prompts("p.txt")
    assert words in str(refused.value)


@pytest.mark.parametrize(("text", "words"), LITERAL.items())
def test_notation_that_is_read_as_words_is_told_once(text, words):
    Path("p.txt").write_text(f"{text}\n" * 3)
    Path("p.jsonl").write_text(json.dumps({"prompt": "a fox", "negative_prompt": text}))
    for source in ("p.txt", "p.jsonl", ["an owl", text]):
        (note,) = read_prompts(source).notes
        assert note.startswith("data.prompts")
        assert words in note
    assert read_prompts("p.txt")[2] == Prompt(text)


@pytest.mark.parametrize(
    "text",
    ["a fox (red) at 16:9", "2 AND/OR 3, SAND", "a fox: [1]", "snake_case__", "a <b>", "C++: std::vector", "a -- b"],
)
def test_plain_words_are_not_taken_for_notation(text):
    assert not read_prompts([text]).notes


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_comments_and_line_ends_of_other_systems(ends):
    Path("p.txt").write_bytes(
        ends.join(["\ufeff# samples", "a fox", "", " #2", "an owl\u2028\x85\v\fhere", ""]).encode()
    )
    prompts = read_prompts("p.txt")
    assert [p.text for p in prompts] == ["a fox", "an owl\u2028\x85\v\fhere"]
    assert prompts.notes == (
        "data.prompts p.txt: lines that begin with # are comments (2); a .jsonl can hold such prompts",
    )
    Path("p.jsonl").write_bytes(ends.join(['{"prompt": "# 1"}', '{"prompt": "a\u2028b"}']).encode())
    assert [p.text for p in read_prompts("p.jsonl")] == ["# 1", "a\u2028b"]


def test_built_in_sets_need_no_notes():
    assert not [note for name in built_in_sets() for note in read_prompts(name).notes]


def test_negative_prompts_without_guidance_are_told():
    Path("p.txt").write_text("a fox --n dark\nan owl\n")
    for prompts in (read_prompts("p.txt"), read_prompts(["a fox"])):
        assert not prompts.notes_for(SamplingConfig(scale=5))
    for without in (SamplingConfig(scale=1), SamplingConfig(guidance_interval=(0.5, 0.5))):
        assert read_prompts("p.txt").notes_for(without) == [
            "negative prompts of their own, which 1 of 2 prompts have, do nothing without guidance"
        ]
        assert not read_prompts(["a fox"]).notes_for(without)


def test_every_command_says_it(tiny_sdxl):
    """sample draws what was meant; sample, train and its dry run each warn in one line."""
    Path("p.txt").write_text("# mine\na fox --n dark --w 64 --h 64 --d 3 --l 7.5\n")
    comment, left_out = "warning: {} p.txt: lines that begin", "warning: {} p.txt: removed from 1 prompt"
    small = ["--prompts", "p.txt", "--prompt", "a (red:1.2) owl", "--steps", 1, "--height", 64, "--width", 64]
    drawn = draftp("sample", "--model", tiny_sdxl, *small, "--output", "out")
    assert drawn.code == 0, drawn.err
    assert drawn.err.count(comment.format("--prompts")) == drawn.err.count(left_out.format("--prompts")) == 1
    assert "warning: --prompt: taken literally" in drawn.err
    lines = [json.loads(line) for line in Path("out/index.jsonl").read_text().splitlines()]
    assert ["a fox", "dark", 3] in [[line["prompt"], line["negative_prompt"], line["seed"]] for line in lines]
    preset = recipe(tiny_sdxl, trainer={"max_steps": 1, "val_check_interval": 0})
    for more in (["--dry-run"], ["--output", "run"]):
        result = draftp("train", "--preset", preset, "--prompts", "p.txt", *more)
        assert result.code == 0, result.err
        assert result.err.count(comment.format("data.prompts")) == result.err.count("removed from 1 prompt") == 1


def test_eval_tells_what_it_leaves_out(lora_run):
    Path("p.txt").write_text("a fox --n dark\na fox --n red\na fox --n dark\nan (old:1.2) owl\n")
    small = ["--num-images", 1, "--weight", "linear", "--features", "toy"]
    result = draftp("eval", lora_run, "--prompts", "p.txt", *small, "--output", "eval")
    assert result.code == 0, result.err
    assert "warning: --prompts p.txt: taken literally" in result.err
    assert "warning: 1 prompts differ from another in negative prompt, seed or size alone" in result.err

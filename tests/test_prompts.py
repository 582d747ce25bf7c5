"""Reading prompts, and the order in which a run takes them."""

from pathlib import Path

from draftcli.prompts import Prompt, Shuffled, built_in_sets, read_prompts


def test_a_text_file_has_one_prompt_a_line_and_blank_lines_do_not_count():
    Path("p.txt").write_text("\ufeffa fox\n\n  an owl \nein grüner Käfer\n", encoding="utf-8")
    assert [p.text for p in read_prompts("p.txt")] == ["a fox", "an owl", "ein grüner Käfer"]


def test_jsonl_brings_negative_prompts():
    Path("p.jsonl").write_text('{"prompt": "a fox", "negative_prompt": "blurry"}\n{"prompt": ""}\n')
    assert read_prompts("p.jsonl") == [Prompt("a fox", "blurry"), Prompt("")]


def test_a_list_may_hold_an_empty_prompt():
    assert read_prompts(["a fox", ""]) == [Prompt("a fox"), Prompt("")]


def test_built_in_sets_are_found_by_name_and_are_not_empty():
    assert {"animals", "toy-train", "toy-validation"} <= built_in_sets().keys()
    for name in built_in_sets():
        texts = [p.text for p in read_prompts(name)]
        assert len(set(texts)) == len(texts) >= 40


def test_every_epoch_takes_every_item_once_in_another_order():
    items = list("abcdefgh")
    order = Shuffled(items, seed=3)
    epochs = [[order[8 * epoch + i] for i in range(8)] for epoch in range(4)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_the_seed_and_the_place_alone():
    items = list(range(50))
    forwards = [Shuffled(items, 7)[i] for i in range(120)]
    order = Shuffled(items, 7)
    assert [order[i] for i in reversed(range(120))] == forwards[::-1]
    assert [Shuffled(items, 8)[i] for i in range(120)] != forwards

"""Which pairs are shown, in which order, and which of them again."""

import json
from itertools import combinations

import pytest

from draftcli.errors import InputError
from draftcli.evaluation.pictures import read_entries
from draftcli.prompts import Prompt
from draftcli.rating.pairs import REPEAT_EVERY, pairs_across, pairs_in_folder, prompts_of_pairs, showings
from tests.rating.example import write_folder


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_more_pairs_begin_with_those_of_fewer(seed):
    few, many = showings(40, seed), showings(300, seed)
    assert many[: len(few)] == few
    prompts = [Prompt("a"), Prompt("b"), Prompt("a"), Prompt("c")]
    assert prompts_of_pairs(prompts, 30, seed)[:9] == prompts_of_pairs(prompts, 9, seed)


def test_one_in_ten_is_shown_again_with_its_sides_swapped_and_others_in_between():
    shown = showings(200, 3)
    once = {s.pair: (at, s) for at, s in enumerate(shown) if not s.repeats}
    again = [(at, s) for at, s in enumerate(shown) if s.repeats]
    assert len(again) == 200 // REPEAT_EVERY == len({s.pair for _, s in again})
    assert [s.pair for s in shown if not s.repeats] == list(range(200))
    for at, showing in again:
        before, first = once[showing.pair]
        assert first.swapped is not showing.swapped
        assert at - before > REPEAT_EVERY // 2
    assert showings(REPEAT_EVERY - 1, 0)[-1].repeats is False


def test_sides_are_drawn_by_chance():
    swapped = [s.swapped for s in showings(1000, 0) if not s.repeats]
    assert 440 < sum(swapped) < 560  # four deviations of a fair coin are 63


def test_a_prompt_that_comes_again_goes_on_with_its_seeds():
    """Whether it comes again as the next round begins, or because the file has it twice."""
    prompts = [Prompt("a"), Prompt("b"), Prompt("a")]
    chosen = prompts_of_pairs(prompts, 9, 0)
    assert sorted(before for prompt, before in chosen if prompt.text == "a") == [0, 1, 2, 3, 4, 5]
    assert sorted(before for prompt, before in chosen if prompt.text == "b") == [0, 1, 2]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 6, 7])
def test_every_two_pictures_of_a_prompt_are_a_pair_once(tmp_path, seeds):
    write_folder(tmp_path, prompts=2, seeds=seeds)
    pairs = pairs_in_folder(tmp_path, "theirs", 1000, seed=1)
    found = [(pair.prompt, frozenset(picture.facts["seed"] for picture in pair.pictures)) for pair in pairs]
    prompts = {pair.prompt for pair in pairs}
    assert len(found) == len({*found})
    assert {*found} == {(prompt, frozenset(two)) for prompt in prompts for two in combinations(range(seeds), 2)}
    first = [picture.path for pair in pairs[: 2 * (seeds // 2)] for picture in pair.pictures]
    assert len(first) == len({*first}), "images that were in no pair yet come first"
    assert pairs_in_folder(tmp_path, "theirs", 3, seed=1) == pairs[:3]


def test_two_folders_are_compared_at_the_same_prompt_and_seed(tmp_path):
    folders = [write_folder(tmp_path / "a", seeds=3), write_folder(tmp_path / "b", prompts=4, seeds=3, first=1)]
    pairs = pairs_across(folders, ["a", "b"], 100, seed=0)
    for pair in pairs:
        first, second = pair.pictures
        assert (first.column, second.column) == ("a", "b")
        assert first.facts["seed"] == second.facts["seed"]
    assert len(pairs) == 4 * 2, "four prompts, seeds 1 and 2"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"file": "a.png", "prompt": "x", "seed": 0}\n{"file": "b.png", "prompt": "y", "seed": 0}', "two images"),
        ('{"file": "../a.png", "prompt": "x", "seed": 0}', "outside the folder"),
        ("[]", "line 1"),
    ],
)
def test_a_folder_without_a_pair_says_so(tmp_path, index, words):
    (tmp_path / "index.jsonl").write_text(index)
    with pytest.raises(InputError, match=words):
        pairs_in_folder(tmp_path, "theirs", 10, seed=0)


def test_folders_with_nothing_in_common_say_so(tmp_path):
    folders = [write_folder(tmp_path / "a", seeds=2), write_folder(tmp_path / "b", seeds=2, first=2)]
    with pytest.raises(InputError, match="in common"):
        pairs_across(folders, ["a", "b"], 10, seed=0)


@pytest.mark.parametrize(("hashes", "is_refused"), [(("a", "b"), True), (("a", "a"), False), ((None, None), True)])
def test_two_pictures_of_one_prompt_and_seed_are_refused_unless_they_are_one(tmp_path, hashes, is_refused):
    folders = [write_folder(tmp_path / name, prompts=1, seeds=1) for name in ("a", "b")]
    [line] = read_entries(folders[0])
    lines = [{**line, "file": f"{i}.png", "hash": key} for i, key in enumerate(hashes)]
    (folders[0] / "index.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))
    if is_refused:
        with pytest.raises(InputError, match=r"was generated in several ways \(0.png and 1.png\)"):
            pairs_across(folders, ["a", "b"], 10, seed=0)
    else:
        [pair] = pairs_across(folders, ["a", "b"], 10, seed=0)
        assert pair.pictures[0].path.name == "1.png"

"""Reading prompts, and the order in which a run takes them."""

import importlib.util
import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from draftcli.errors import DraftpError, InputError
from draftcli.prompts import Batches, Prompt, Shuffled, built_in_sets, past_the_limit, read_prompts


def test_a_text_file_has_one_prompt_a_line_and_blank_lines_do_not_count():
    Path("p.txt").write_text("\ufeffa fox\n\n  an owl \nein grüner Käfer\n", encoding="utf-8")
    assert [p.text for p in read_prompts("p.txt")] == ["a fox", "an owl", "ein grüner Käfer"]


def test_jsonl_brings_negative_prompts_seeds_and_sizes():
    Path("p.jsonl").write_text(
        '{"prompt": "a fox", "negative_prompt": "blurry"}\n\n'
        '{"prompt": "", "seed": 7, "size": [64, 96]}\n{"prompt": "line\\u2028two\\n"}'
    )
    expected = [Prompt("a fox", "blurry"), Prompt("", None, 7, (64, 96)), Prompt("line\u2028two\n")]
    assert list(read_prompts("p.jsonl")) == expected


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **header):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def test_texts_of_a_tar_are_read_in_place_whatever_their_names():
    """As the reference's webdataset has them: 00001.txt beside 00001.jpg. Nothing appears anywhere."""
    with tarfile.open("p.tar", "w") as tar:
        add(tar, "00001.txt", "ein grüner\nKäfer\n".encode())
        add(tar, "00001.jpg", b"\xff\xd8")
        add(tar, "../../escape.txt", b"an owl")
        add(tar, "/absolute.txt", b"")
        add(tar, "hard.txt", type=tarfile.LNKTYPE, linkname="00001.txt")
        add(tar, "folder.txt", type=tarfile.DIRTYPE)
        add(tar, "device.txt", type=tarfile.CHRTYPE)
        add(tar, "n" * 300 + ".txt", b"a fox")
    prompts = read_prompts("p.tar")
    assert [p.text for p in prompts] == ["ein grüner Käfer", "an owl", "", "a fox", "ein grüner Käfer"]
    assert prompts[-1] == prompts[4] == prompts[0] == prompts[1:][3]
    assert [p.name for p in Path.cwd().iterdir()] == ["p.tar"]


def test_a_tar_cut_short_is_refused():
    with tarfile.open("p.tar", "w") as tar:
        add(tar, "1.txt", b"a fox" * 300)
    Path("p.tar").write_bytes(Path("p.tar").read_bytes()[:1000])
    with pytest.raises(InputError, match="it ends within member"):
        read_prompts("p.tar")


def test_a_million_prompts_are_indexed_and_not_loaded():
    """A tenth of a million, to be quick: 18 bytes each, where the text alone has 50 and a Prompt with it some 300."""
    count = 100_000
    with Path("p.txt").open("w") as file:
        file.writelines(f"a drawing of the number {i:06} on a white wall\n" for i in range(count))
    prompts = read_prompts("p.txt")
    assert sum(x.nbytes for x in vars(prompts).values() if hasattr(x, "nbytes")) == 18 * count
    assert sum(len(x) for x in vars(prompts).values() if isinstance(x, list | dict | bytes)) < 10
    assert len(prompts) == count
    assert prompts[65_432].text == "a drawing of the number 065432 on a white wall"
    batches = Batches(prompts, 16, seed=1)
    assert len({p.text for step in (0, 1, 6_249) for p in batches[step]}) == 48


def test_a_file_that_is_replaced_stays_what_it_was_and_one_that_is_changed_is_noticed():
    path = Path("p.txt")
    path.write_text("a fox\nan owl\n")
    prompts = read_prompts("p.txt")
    before = prompts.sha256
    Path("new.txt").write_text("a cat\n")
    Path("new.txt").replace(path)
    assert prompts[1].text == "an owl"
    other = read_prompts("p.txt")
    assert other.sha256 != before
    path.write_text("a caterpillar\n")
    with pytest.raises(DraftpError, match="was changed while it was read"):
        other[0]


class Letters:
    """A token a letter, and two around them; the tokenizers of the tiny and of the toy model are such, or nearly."""

    model_max_length = 77

    def __call__(self, texts, **_):
        return type("Encoded", (), {"input_ids": [[0, *text.encode(), 1] for text in texts]})


def test_prompts_past_the_tokenizers_length_are_counted():
    Path("p.txt").write_text("\n".join("x" * n for n in (74, 75, 76, 300)))
    assert past_the_limit(read_prompts("p.txt"), Letters()) == (2, Prompt("x" * 76))
    assert past_the_limit([Prompt("x" * 75), Prompt("x" * 80)], Letters()) == (1, Prompt("x" * 80))
    assert past_the_limit([Prompt("x")], Letters()) == (0, None)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package datasets is installed")
def test_a_dataset_needs_its_package():
    with pytest.raises(InputError, match=r"pip install 'draftp\[datasets\]'"):
        read_prompts("owner/name")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed")
def test_a_dataset_is_read_by_its_column():
    folder = Path("owner/name")
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(
        '{"prompt": "a fox", "other": "b", "n": 1}\n{"prompt": "an owl", "other": "c", "n": 2}\n'
    )
    assert list(read_prompts("owner/name:prompt")) == [Prompt("a fox"), Prompt("an owl")]
    assert read_prompts("owner/name:other")[1] == Prompt("c")
    assert list(read_prompts("owner/name:other@train[1:]")) == [Prompt("c")]
    for wrong in ("owner/name:n", "owner/name:nothing"):
        with pytest.raises(InputError, match="name its column of prompts"):
            read_prompts(wrong)
    with pytest.raises(InputError, match="no such dataset at hand"):
        read_prompts("nobody/nothing")
    with pytest.raises(InputError, match="no such dataset at hand"):
        read_prompts("owner/name@nowhere")


def test_a_list_may_hold_an_empty_prompt():
    assert list(read_prompts(["a fox", ""])) == [Prompt("a fox"), Prompt("")]


def test_built_in_sets_are_found_by_name_and_are_not_empty():
    assert {"animals", "scenes", "toy-train", "toy-validation"} <= built_in_sets().keys()
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


def test_batches_of_one_size_are_the_shuffle_cut_in_pieces():
    prompts = [Prompt(str(i)) for i in range(10)]
    order, batches = Shuffled(prompts, 7), Batches(prompts, 4, 7)
    assert [p for step in range(12) for p in batches[step]] == [order[i] for i in range(48)]


def test_batches_have_one_size_each_and_every_prompt_comes_up():
    lines = [f'{{"prompt": "{i}", "size": [64, {64 + 32 * (i % 3)}]}}' for i in range(30)]
    Path("p.jsonl").write_text("\n".join([*lines, *('{"prompt": "plain"}',) * 2]))
    prompts = read_prompts("p.jsonl")
    for source in (prompts, list(prompts)):
        batches = Batches(source, 4, 3)
        steps = [batches[step] for step in range(70)]
        assert all(len({p.size for p in batch}) == 1 for batch in steps)
        seen = Counter(p for batch in steps for p in batch)
        assert seen.keys() == set(prompts)
        by_size = Counter(batch[0].size for batch in steps)
        assert by_size == {(64, 64): 20, (64, 96): 20, (64, 128): 20, None: 10}
        assert [Batches(prompts, 4, 3)[step] for step in reversed(range(70))] == steps[::-1], "one order for both"

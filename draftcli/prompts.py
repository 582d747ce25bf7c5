"""Reading prompts: .txt (one a line), .jsonl, .tar of texts, built-in sets, Hugging Face datasets, plain lists.

A line of .jsonl is an object: prompt, and where wanted negative_prompt, seed and size ([height, width]). Files are
indexed, not loaded: of a million prompts 18 bytes each stay in memory, and a .tar is read in place, never unpacked.

The order of training is a function of the seed and the image's index alone, so a run resumes where it was by knowing
its step, and ranks share the work without talking.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, overload

import numpy as np

from draftcli.config import presets_folder
from draftcli.errors import DraftpError, InputError, brief

T = TypeVar("T")
Size = tuple[int, int]

KEYS = ("prompt", "negative_prompt", "seed", "size")
COLUMNS = ("prompt", "Prompt", "text", "caption")  # of a dataset, the first that is there
LONGEST = 2**20  # bytes of one prompt; more is another kind of file
SEEDS = 2**32  # torch's CPU generator reads no more of a seed


@dataclass(frozen=True)
class Prompt:
    """One prompt. An empty text is legal.

    Attributes:
        text: what to draw.
        negative: its negative prompt; None means the run's own.
        seed: of its noise, 0 to 2^32 - 1, instead of the run's own.
        size: (height, width) in pixels, instead of the run's own.
    """

    text: str
    negative: str | None = None
    seed: int | None = None
    size: Size | None = None

    def __post_init__(self) -> None:
        for text in (self.text, self.negative or ""):
            if not text.isprintable():  # quick; a lone half of a surrogate pair is not printable
                _check_encodable(text)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"prompt {brief(text)}: it holds half a character (a lone surrogate); save it again") from None


def built_in_sets() -> dict[str, Path]:
    """The prompt sets that ship with draftp, by name."""
    return {path.stem: path for path in sorted((presets_folder() / "prompts").glob("*.txt"))}


def read_prompts(source: str | Sequence[str], setting: str = "data.prompts") -> Sequence[Prompt]:
    """Read prompts from a file, a built-in set, a dataset of the Hugging Face hub or a list.

    Args:
        source: path, name of a built-in set, dataset id (`owner/name`, `owner/name:column`, either with
            `@split` behind it, `train` otherwise: `owner/name:caption@test[:500]`), or the texts themselves.
        setting: what the source is called in error messages.

    Raises:
        InputError: no such file, set or dataset, not UTF-8, an invalid line, or nothing in it.
    """
    if not isinstance(source, str):
        return [Prompt(text) for text in source]
    path = built_in_sets().get(source, Path(source))
    where = f"{setting} {source}"
    if path.suffix in _INDEXERS:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError(f"{where}: not a file")
        try:
            prompts: Sequence[Prompt] = PromptFile(path, where)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise InputError(f"{setting} {source!r}: no file can have such a name") from None
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w .-]+)?(@[\w.:%\[\]-]+)?", source) and not path.is_file():
        prompts = _dataset(source, where)
    else:
        raise InputError(
            f"{setting} {source!r}: expected a .txt, .jsonl or .tar file, a dataset's id (owner/name), or one of the "
            f"sets {', '.join(built_in_sets())}"
        )
    if not prompts:
        raise InputError(f"{where}: there is no prompt in it")
    return prompts


class PromptFile(Sequence[Prompt]):
    """The prompts of a file, each read when it is asked for; every line was checked once.

    Args:
        path: a .txt, .jsonl or .tar.
        where: what it is called in error messages.

    Attributes:
        sha256: of the file.
        lengths: (n,) bytes of each prompt's entry in the file.
        sizes: (n,) index into `known_sizes`, 0 where the prompt has no size of its own.
        known_sizes: None, then every size that occurs.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        self._from_bytes = _from_json if path.suffix == ".jsonl" else _from_text
        # Unbuffered and kept open: a file that is replaced during the run stays what it was.
        self._file = path.open("rb", buffering=0)
        self._close = weakref.finalize(self, self._file.close)
        starts, lengths, sizes = array("q"), array("q"), array("H")
        known: dict[Size | None, int] = {None: 0}
        with path.open("rb") as file:
            for start, raw, place in _INDEXERS[path.suffix](file, where):
                try:
                    size = self._from_bytes(raw).size
                except (ValueError, InputError) as error:
                    raise InputError(f"{where} {_called(place)}: {error}") from None
                starts.append(start)
                lengths.append(len(raw))
                sizes.append(known.setdefault(size, len(known)))
                if len(known) == 2**16:
                    raise InputError(f"{where}: more than {2**16 - 2} sizes")
            file.seek(0)
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._starts, self.lengths, self.sizes = np.array(starts), np.array(lengths), np.array(sizes)
        self.known_sizes = list(known)
        self._stamp = self._changed_at()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, length = int(self._starts[index]), int(self.lengths[index])
        if self._changed_at() != self._stamp:
            raise DraftpError(f"{self.where} was changed while it was read; the same command again takes the new file")
        self._file.seek(start)
        return self._from_bytes(self._file.read(length))

    def _changed_at(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


# Where the prompts of a file are: (byte offset, bytes, line or member).
_Entries = Iterator[tuple[int, bytes, int | str]]


def _called(place: int | str) -> str:
    return f"line {place}" if isinstance(place, int) else f"member {place[:80]!r}"


def _lines(file: BinaryIO, where: str) -> _Entries:
    """Lines that are not blank, without the white space around them; a byte order mark does not count."""
    offset, number = 0, 0
    while line := file.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise InputError(f"{where} line {number}: longer than {LONGEST} bytes, which is no prompt")
        body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        start = offset + len(line) - len(body.lstrip())
        offset += len(line)
        body = body.strip()
        if body:
            yield start, body, number


def _members(file: BinaryIO, where: str) -> _Entries:
    """Every .txt in an uncompressed tar, one prompt each. Names are looked at and nothing is written anywhere."""
    before = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else every header is kept
                if member.offset_data <= before:  # a crafted header can lead backwards, and around for ever
                    raise tarfile.ReadError("its headers lead backwards")
                before = member.offset_data
                if not member.isreg() or member.issparse() or not member.name.endswith(".txt"):
                    continue
                if member.size > LONGEST:
                    raise tarfile.ReadError(f"{_called(member.name)} is longer than {LONGEST} bytes")
                file.seek(member.offset_data)
                raw = file.read(member.size)
                if len(raw) < member.size:
                    raise tarfile.ReadError(f"it ends within {_called(member.name)}")
                yield member.offset_data, raw, member.name
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise InputError(f"{where}: not an uncompressed tar file of texts, or a damaged one ({error})") from None


_INDEXERS: dict[str, Callable[[BinaryIO, str], _Entries]] = {".txt": _lines, ".jsonl": _lines, ".tar": _members}


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save it as UTF-8") from None


def _from_text(raw: bytes) -> Prompt:
    return Prompt(_decoded(raw).replace("\n", " ").strip())


def _from_json(raw: bytes) -> Prompt:
    text = _decoded(raw)
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ValueError('expected an object such as {"prompt": "a fox"}')
    unknown = sorted(item.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    negative, seed, size = item.get("negative_prompt"), item.get("seed"), item.get("size")
    if negative is not None and not isinstance(negative, str):
        raise ValueError("negative_prompt must be text")
    if seed is not None and not (_is_whole(seed) and 0 <= seed < SEEDS):
        raise ValueError(f"seed {seed!r} must be a whole number from 0 to {SEEDS - 1}")
    if size is not None:
        fits = isinstance(size, list) and len(size) == 2 and all(map(_is_whole, size))
        if not fits or not all(16 <= n <= 8192 and n % 8 == 0 for n in size):
            raise ValueError(f"size {size!r} must be [height, width], multiples of 8 from 16 to 8192")
        size = (size[0], size[1])
    return Prompt(item["prompt"], negative, seed, size)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON's true is no 1


class _Column(Sequence[Prompt]):
    """One text column of a Hugging Face dataset, which is memory-mapped: nothing is loaded but what is asked for."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [Prompt(text or "") for text in self._rows[index][self._name]]
        return Prompt(self._rows[int(index)][self._name] or "")


def _dataset(source: str, where: str) -> Sequence[Prompt]:
    """A split of a dataset; its code is never run (datasets 4 knows no such thing any more)."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{where}: a dataset of the Hugging Face hub needs one more package: pip install 'draftp[datasets]'; "
            "for a file, give its whole name (.txt, .jsonl, .tar)"
        ) from None
    place, _, split = source.partition("@")
    name, _, column = place.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, its mirror, its formats and its network have an exception each
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where}: no such dataset at hand ({reason}); or give a .txt, .jsonl or .tar file") from None
    texts = [c for c in rows.column_names if getattr(rows.features[c], "dtype", None) in ("string", "large_string")]
    found = next((c for c in ([column] if column else COLUMNS) if c in texts), None)
    if found is None:
        raise InputError(f"{where}: name its column of prompts, as owner/name:column; texts are: {', '.join(texts)}")
    return _Column(rows, found)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """The sha256 of what the prompts are: of the file where they come from one."""
    if isinstance(prompts, PromptFile):
        return prompts.sha256
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(asdict(prompt)).encode() + b"\n")
    return digest.hexdigest()


def past_the_limit(prompts: Sequence[Prompt], tokenizer: Any) -> tuple[int, Prompt | None]:
    """How many prompts have more tokens than `tokenizer` keeps, and the first of them.

    A token stands for at least one byte, so that short prompts need no counting.
    """
    limit = tokenizer.model_max_length
    if isinstance(prompts, PromptFile):
        candidates = np.flatnonzero(prompts.lengths > limit - 2)  # two are its start and its end
    else:
        candidates = np.arange(len(prompts))
    count, first = 0, None
    for start in range(0, len(candidates), 4096):
        some = [prompts[int(i)] for i in candidates[start : start + 4096]]
        tokens = tokenizer([p.text for p in some], truncation=False, padding=False, verbose=False).input_ids
        long = [p for p, ids in zip(some, tokens, strict=True) if len(ids) > limit]
        count += len(long)
        first = first or next(iter(long), None)
    return count, first


class Shuffled(Generic[T]):
    """An endless, reproducible shuffle: every item once an epoch, in another order each epoch.

    Args:
        items: prompts, or the sizes of a batch.
        seed: of the order.
    """

    def __init__(self, items: Sequence[T] | np.ndarray, seed: int) -> None:
        self.items = items
        self.seed = seed
        self.permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def __getitem__(self, index: int) -> T:
        """The `index`-th item from 0, counted over all epochs."""
        epoch, position = divmod(index, len(self.items))
        return self.items[int(self.permutation(epoch)[position])]


class Batches:
    """Which prompts train together: `count` of one size, in the order of `Shuffled`.

    Prompts with a size of their own are with their like; each size has as many batches an epoch as its prompts fill,
    and at least one. Where no prompt has a size there is one group, and this is `Shuffled` cut in pieces.

    Args:
        prompts: all of them.
        count: pictures a batch.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], count: int, seed: int) -> None:
        self.prompts, self.count = prompts, count
        if isinstance(prompts, PromptFile):
            groups = [np.flatnonzero(prompts.sizes == i) for i in range(len(prompts.known_sizes))]
        else:
            sizes = {size: i for i, size in enumerate(dict.fromkeys(p.size for p in prompts))}
            labels = np.array([sizes[p.size] for p in prompts])
            groups = [np.flatnonzero(labels == i) for i in range(len(sizes))]
        self._groups = [Shuffled(group, seed) for group in groups if len(group)]
        shares = [max(1, round(len(group.items) / count)) for group in self._groups]
        self._turns = Shuffled(np.repeat(np.arange(len(shares)), shares), seed)

    def __getitem__(self, index: int) -> list[Prompt]:
        """The prompts of batch `index`, from 0."""
        which = int(self._turns[index])
        epoch, position = divmod(index, len(self._turns.items))
        order = np.asarray(self._turns.items)[self._turns.permutation(epoch)]
        turn = epoch * int((order == which).sum()) + int((order[:position] == which).sum())
        return [self.prompts[int(self._groups[which][turn * self.count + i])] for i in range(self.count)]

"""File names in a folder that several jobs share: what is there under a name, and is something else, keeps it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain, count, islice
from pathlib import Path

INDEX = "index.jsonl"  # of a folder of pictures: a line for each

SHORT_HASH = 8  # hexadecimal digits


def short_names(paths: Sequence[Path]) -> list[str]:
    """A short name each: the folder's, and where two are alike, with the folder above it."""
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def free_path(
    folder: Path,
    stem: str,
    ending: str,
    key: str,
    read_stored: Callable[[Path], str | None],
    taken: Collection[str] = (),
) -> Path:
    """Where in `folder` something that is made of `key` belongs.

    That is the file that holds it already; else the plain name where that is free, and where it is not, the name with
    the start of the hash behind it.

    Args:
        folder: need not be there.
        stem: the plain name.
        ending: such as ".png".
        key: hash of what it is made of.
        read_stored: the hash in a file, empty where it has none; None where nothing is lost by writing there.
        taken: names that the same job has given away, in lower case, as some file systems know no other.
    """
    names = chain([stem, f"{stem}-{key[:SHORT_HASH]}"], (f"{stem}-{key[:SHORT_HASH]}-{n}" for n in count(2)))
    paths = (folder / f"{name}{ending}" for name in names)
    usable = (path for path in paths if path.name.lower() not in taken and not path.is_dir())
    # Each file is looked at once: another process of the same job may be writing it, and both must find the same.
    stored = [(path, read_stored(path)) for path in islice(usable, 2)]
    for wanted in (key, None):
        for path, there in stored:
            if there == wanted:
                return path
    return next(path for path in usable if read_stored(path) in (key, None))

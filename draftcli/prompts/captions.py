"""Captions: the .txt files of a folder or a .tar, a prompt each, as they lie beside the pictures of a dataset."""

from __future__ import annotations

import os
import posixpath
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from draftcli.errors import InputError

LONGEST_PROMPT = 2**20  # bytes; more is another kind of file
Entries = Iterator[tuple[int, bytes, int | str]]
"""Where the prompts of a file are: (byte offset, bytes, line or member)."""

_OTHER_PLACES = {"__MACOSX", "@eaDir"}  # where macOS and network storages keep files of their own
_OTHER_TEXTS = {"readme", "license", "licence", "copying", "notice", "changelog", "requirements"}
_CAPTIONS_ELSEWHERE = {".caption", ".cap", ".prompt", ".tags", ".text"}  # endings that other programs give captions


class Names:
    """Decides by its name what is a caption, and counts what is none, for notes and errors.

    Args:
        inside: what a source consists of, for messages: members or files.
    """

    def __init__(self, inside: str) -> None:
        self._inside = inside
        self._others: Counter[str] = Counter()
        self._skipped: dict[str, list[str]] = {}
        self._outside: list[str] = []
        self._hashes = array("q")

    def is_caption(self, name: str) -> bool:
        """Whether the file `name` (with / between folders) is a caption."""
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        file = PurePosixPath(parts[-1] if parts else "")
        ending = file.suffix
        if ending.lower() != ".txt":
            self._others[ending.lower()[:20] or "without an ending"] += 1
            return False
        if any(part.startswith(".") or part in _OTHER_PLACES for part in parts):
            self.skip("hidden files of other programs", name)
            return False
        if file.stem.lower() in _OTHER_TEXTS:
            self.skip("texts about the data", name)
            return False
        self._hashes.append(hash(posixpath.normpath(name)))
        if name.startswith("/") or ".." in name.split("/"):
            self._outside.append(name)
        return True

    def skip(self, why: str, name: str) -> None:
        """Count a .txt that holds no prompt."""
        self._skipped.setdefault(why, []).append(name)

    def notes(self, where: str) -> Iterator[str]:
        """What people should know of the source that messages call `where`, a line each."""
        what = [f"{len(names)} {why} ({_brief(names[0])})" for why, names in self._skipped.items()]
        what += [f"{n} {ending}" for ending, n in self._others.items() if ending in _CAPTIONS_ELSEWHERE]
        if what:
            yield f"{where}: {self._inside} that were not read: {'; '.join(what)}"
        if self._outside:
            count = f"{len(self._outside)} of its {self._inside}"
            yield f"{where}: names of {count} lead outside ({_brief(self._outside[0])}); they are read, never unpacked"
        again = len(self._hashes) - len(np.unique(np.array(self._hashes)))
        if again:
            yield f"{where}: {again} of its {self._inside} have the name of an earlier one; all are read"

    @property
    def instead(self) -> str:
        """What there is where no caption is, for an error."""
        found = [f"{n} {ending}" for ending, n in self._others.most_common(4)]
        found += [f"{len(names)} .txt that are {why}" for why, names in self._skipped.items()]
        return f"no .txt with a caption is there, but {', '.join(found)}" if found else "nothing is there"


def _brief(name: str) -> str:
    return repr(name if len(name) <= 80 else f"...{name[-77:]}")


def tar_entries(file: BinaryIO, where: str, names: Names) -> Entries:
    """Every caption in an uncompressed .tar, links last. Nothing is written anywhere.

    Args:
        file: at its start.
        where: what it is called in error messages.
        names: decides which members are captions.

    Raises:
        InputError: it is no tar or a damaged one, or a caption is a link to what is not in it, sparse, or too long.
    """
    links: dict[str, str] = {}
    captions = []
    try:
        for member in _headers(file):
            is_link = member.issym() or member.islnk()
            if is_link:
                links[posixpath.normpath(member.name)] = _target(member)
            if member.isdir() or not names.is_caption(member.name):
                continue
            if is_link:
                captions.append(member.name)
            elif member.issparse():
                raise tarfile.ReadError(f"member {_brief(member.name)} is sparse; make it again without that")
            elif member.isreg():
                yield member.offset_data, _content(file, member), member.name
            else:
                names.skip("devices or pipes", member.name)
        if captions:
            yield from _linked(file, where, captions, links)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise InputError(f"{where}: not an uncompressed tar file of texts, or a damaged one ({error})") from None


def _headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    before = -1
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # else every header is kept
            if member.offset_data <= before:  # a crafted header can lead backwards, and around for ever
                raise tarfile.ReadError("its headers lead backwards")
            before = member.offset_data
            yield member
        file.seek(tar.offset)  # where tarfile takes what is no header for the end
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("more follows what looks like its end; of several archives in one, unpack each")


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > LONGEST_PROMPT:
        raise tarfile.ReadError(f"member {_brief(member.name)} is longer than {LONGEST_PROMPT} bytes")
    file.seek(member.offset_data)
    raw = file.read(member.size)
    if len(raw) < member.size:
        raise tarfile.ReadError(f"it ends within member {_brief(member.name)}")
    return raw


def _target(link: tarfile.TarInfo) -> str:
    folder = posixpath.dirname(link.name) if link.issym() else ""  # a hard link's is from the archive's root
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _linked(file: BinaryIO, where: str, captions: list[str], links: dict[str, str]) -> Entries:
    """Captions that are links, from what they lead to, which may come later in the archive."""
    ends = {}
    for name in captions:
        target, passed = links[posixpath.normpath(name)], set[str]()
        while target in links and target not in passed:  # a link to a link; of a circle nothing is found below
            passed.add(target)
            target = links[target]
        ends[name] = target
    wanted = set(ends.values())
    found = {}
    for member in _headers(file):
        place = posixpath.normpath(member.name)
        if place in wanted and member.isreg() and not member.issparse():
            found[place] = member
    for name, target in ends.items():
        if target not in found:
            raise InputError(
                f"{where}: member {_brief(name)} is a link to {_brief(target)}, which is no file in the archive; "
                "make it again with the files themselves (tar --dereference)"
            )
        yield found[target].offset_data, _content(file, found[target]), name


def folder_entries(folder: Path, where: str, names: Names) -> Iterator[tuple[bytes, str]]:
    """Every caption in a folder and the folders in it, sorted by name: (bytes, name from `folder` on).

    Args:
        folder: is there.
        where: what it is called in error messages.
        names: decides which files are captions.

    Raises:
        InputError: a caption cannot be read, or is too long.
    """
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in [name for name in folders if (Path(place) / name).is_symlink()]:
            names.skip("links to folders", name)
        for name in sorted(files):
            path = Path(place) / name
            inside = path.relative_to(folder).as_posix()
            if not names.is_caption(inside):
                continue
            if path.exists() and not path.is_file():  # a pipe would be waited for
                names.skip("devices or pipes", inside)
                continue
            with path.open("rb") as file:
                raw = file.read(LONGEST_PROMPT + 1)
            if len(raw) > LONGEST_PROMPT:
                raise InputError(f"{where}: file {_brief(inside)} is longer than {LONGEST_PROMPT} bytes")
            yield raw, inside


def _raise(error: OSError) -> None:
    raise error

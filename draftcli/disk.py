"""Files that are never half written, locks, and what the operating system refuses in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftcli.errors import DraftpError
from draftcli.umask import follow_umask


def beside(path: Path) -> Path:
    """Where `path` is made before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or folder beside `path`, then rename it: `path` is never half written.

    What was at `path` is replaced. The content is on the disk before it has its name, so that a computer that loses
    its power leaves the old or the new one. Where `write` fails nothing is left.
    """
    aside = beside(path)
    try:
        write(aside)
        follow_umask(aside)
        for made in [aside] if aside.is_file() else [*aside.rglob("*")]:
            if made.is_file():
                with made.open("rb") as file:
                    os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    old = _renamed_away(path) if path.is_dir() else None
    aside.replace(path)
    if old is not None:
        shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Remove a folder so that nobody, whenever this is killed, sees half of it under its name."""
    shutil.rmtree(_renamed_away(path))


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing looks for it; its owner may want what is left of it."""
    aside = path.with_name(f"{path.name}.damaged")
    with disk_errors(path):
        shutil.rmtree(aside, ignore_errors=True)
        return path.replace(aside)


def _renamed_away(path: Path) -> Path:
    old = path.with_name(f".{path.name}.removed")
    shutil.rmtree(old, ignore_errors=True)
    return path.replace(old)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """What the operating system refuses becomes one line: disk full, read-only, no permission."""
    try:
        yield
    except OSError as error:
        raise DraftpError(f"{error.filename or where}: cannot be written ({error.strerror or error})") from error


def lock_file(handle: int) -> bool:
    """Take the advisory lock of an open file; False where somebody else has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system that knows no locks: better a run without one than none
    return True

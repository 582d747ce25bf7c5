"""The mode of new files."""

from __future__ import annotations

import stat
import uuid
from contextlib import suppress
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a new file, or every file in a new folder, the mode that `open` gives.

    safetensors 0.8 makes files that nobody but their owner can read, whatever the umask. What `open` gives is seen from
    a file made for a moment beside `path`: a process cannot read its umask without changing it, and a folder may have
    rules of its own. A drive that knows no modes (network shares, exFAT, mounts of cloud storage) keeps its own.
    """
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    private = [file for file in files if not file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    if private:
        example = path.parent / f".{uuid.uuid4().hex}.partial"
        example.touch()
        mode = stat.S_IMODE(example.stat().st_mode)
        example.unlink()
        for file in private:
            with suppress(OSError):
                file.chmod(mode)

"""Files and settings that nobody would write: what they are made of, and what is asked of those who read them.

Each input is taken, or refused in one line, soon, and nothing is written elsewhere. hypothesis makes the inputs, the
same in each run. Two kinds: made up from a format's own words, and whole files in which bytes were changed. What they
have found stands in docs/log.md, and as examples at the tests, which are tried each time.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from draftcli.cli import explain

LONGEST = 5  # seconds of the processor for one input


def fuzz(count: int) -> Callable[[Any], Any]:
    """So many inputs, always the same, whatever the machine's speed."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


class Watch:
    """Sees through Python's audit hooks which files are written; `inside` is the one folder where that is right."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else "r" not in mode
            paths = [path] if writes else []
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            paths = [path for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        elif event in ("os.system", "os.exec", "subprocess.Popen", "socket.connect"):
            self.outside.append(event)
            return
        else:
            return
        for path in paths:
            if not isinstance(path, int) and not os.path.realpath(os.fsdecode(path)).startswith(self.inside):
                self.outside.append(f"{event} {path!r}")


WATCH = Watch()


@contextmanager
def tried(inside: Path) -> Iterator[None]:
    """One input: it works, or it is an error of ours that is one line with a reason; in time, and inside the folder."""
    WATCH.inside, WATCH.outside = os.path.realpath(inside), []
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LONGEST), signal.SIGALRM: (signal.ITIMER_REAL, 60 * LONGEST)}
    previous = {number: signal.signal(number, _too_long) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        assert 10 < len(told[0]) < 7000, f"{len(told[0])} letters: {told[0][:200]}"
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
        WATCH.inside, outside = None, WATCH.outside
    assert not outside, outside


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"took more than {LONGEST} s")


TEXT = st.text(max_size=30) | st.sampled_from(
    ["", " ", "\0", "..", "../../x", "/etc/passwd", "a" * 300, "x" * 5000 + ".txt", "\ud800", "é" * 200, "~", "-1",
     "1e999", ".nan", "0x" + "f" * 4000, "a\nb", "{{7*7}}", "%s", "file://x", "toy", "a/b", "\u2028", "[red]x[/]"]
)  # fmt: skip
NUMBER = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 8, 64, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -0.0])
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | NUMBER, inner, max_size=4),
    max_leaves=8,
)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["set", "cut", "drop", "insert", "twice"]),
        st.binary(min_size=1, max_size=10) | st.sampled_from([b"\0", b"9" * 20, b"\xff", b'"', b"}", b"["]),
    ),
    min_size=1,
    max_size=4,
)


def changed(whole: bytes, edits: Sequence[tuple[float, str, bytes]], end: int | None = None) -> bytes:
    """`whole` with bytes before `end` changed, taken out, put in twice, or all after them cut off."""
    data = bytearray(whole)
    for place, what, new in edits:
        at = int(place * (min(len(data), len(whole) if end is None else end) - 1))
        if what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + 4 * len(new)]
        elif what == "twice":
            data[at:at] = data[at : at + 4 * len(new)]
        else:
            data[at : at + (len(new) if what == "set" else 0)] = new
    return bytes(data)

"""What is on the page now: pairs come in while they are drawn, and answers go out as they are given."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from draftcli.rating.pairs import Pair, RatedPicture, Showing, showings
from draftcli.rating.storage import Preferences

_AHEAD = 2  # pairs whose pictures a browser fetches before they are shown
_Key = tuple[str, frozenset[tuple[str, str, str]], bool]


class NotShown(Exception):
    """An answer about a pair that is not the one on the page, such as from a second window."""


@dataclass
class _Slot:
    """A showing with the names that the page knows it by, which say nothing about the pictures."""

    showing: Showing
    name: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    sides: tuple[str, str] = field(default_factory=lambda: (secrets.token_urlsafe(9), secrets.token_urlsafe(9)))
    line: int | None = None  # of its answer


class RatingSession:
    """Pairs, in the order in which they are shown, and their answers. Threads may share it.

    Args:
        preferences: where answers go. Pairs that it has answers to are not shown again.
        count: how many pairs will come.
        seed: of the sides and of the pairs that are shown again.

    Attributes:
        ended: set when there is nothing more to do here.
        given: how many answers were given here, and not taken back.
        doing: in a sentence, what goes on until the next pair is there.
    """

    def __init__(self, preferences: Preferences, count: int, seed: int) -> None:
        self._preferences, self._count = preferences, count
        self._slots = [_Slot(showing) for showing in showings(count, seed)]
        self._pairs: list[Pair] = []
        self._lock = threading.RLock()
        self._known = {
            _key(line["prompt"], [line["left"], line["right"]], line.get("repeats") is True): number
            for number, line in preferences.answers.items()
        }
        self.ended = threading.Event()
        self.given = 0
        self.doing = ""

    def add(self, pairs: Iterable[Pair]) -> None:
        """The next pairs are ready to be shown."""
        with self._lock:
            for pair in pairs:
                number = len(self._pairs)
                self._pairs.append(pair)
                sides = [self._facts(picture) for picture in pair.pictures]
                for slot in self._slots_of(number):
                    slot.line = self._known.get(_key(pair.prompt, sides, slot.showing.repeats))

    def state(self) -> dict[str, Any]:
        """What the page shows, as JSON: which pair, and how many are done, drawn and there in all."""
        with self._lock:
            waiting = [slot for slot in self._wanted() if slot.line is None]
            ready = [slot for slot in waiting if slot.showing.pair < len(self._pairs)]
            done = sum(slot.line is not None for slot in self._slots)
            shown = ready[0] if ready and ready[0] is waiting[0] else None
            return {
                "pair": None if shown is None else self._on_page(shown),
                "ahead": [name for slot in ready[1 : 1 + _AHEAD] for name in slot.sides],
                "done": done,
                "total": done + len(waiting),
                "drawn": len(self._pairs),
                "pairs": self._count,
                "doing": self.doing,
                "complete": not waiting,
                "undo": self._last() is not None,
                "ended": self.ended.is_set(),
            }

    def picture(self, name: str) -> Path | None:
        """The file of a picture by the name that the page knows it by."""
        with self._lock:
            for slot in self._slots:
                if name in slot.sides and slot.showing.pair < len(self._pairs):
                    return self._shown(slot)[slot.sides.index(name)].path
        return None

    def answer(self, name: str, answer: str, seconds: float) -> None:
        """Keep the answer to the pair that is on the page.

        Args:
            name: of the showing, from `state`.
            answer: one of ANSWERS.
            seconds: that it took.

        Raises:
            NotShown: it is another pair that is on the page.
            DraftpError: the disk refuses; nothing was kept.
        """
        with self._lock:
            slot = next((slot for slot in self._wanted() if slot.line is None), None)
            if slot is None or slot.name != name or slot.showing.pair >= len(self._pairs):
                raise NotShown
            left, right = map(self._facts, self._shown(slot))
            slot.line = self._preferences.append(
                {
                    "prompt": self._pairs[slot.showing.pair].prompt,
                    "left": left,
                    "right": right,
                    "answer": answer,
                    "seconds": round(seconds, 3),
                    "repeats": slot.showing.repeats,
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                }
            )
            self.given += 1

    def undo(self) -> None:
        """Take the last answer back and show its pair again; also one of an earlier session.

        Raises:
            DraftpError: the disk refuses.
        """
        with self._lock:
            slot = self._last()
            if slot is not None and slot.line is not None:
                self._preferences.undo(slot.line)
                slot.line = None
                self.given = max(0, self.given - 1)

    def answers(self) -> list[dict[str, Any]]:
        """The answers to this session's pairs, in the order in which they are shown, also those of earlier sessions."""
        with self._lock:
            return [self._preferences.answers[slot.line] for slot in self._slots if slot.line is not None]

    def _slots_of(self, pair: int) -> list[_Slot]:
        return [slot for slot in self._slots if slot.showing.pair == pair]

    def _wanted(self) -> list[_Slot]:
        """All showings but those that would repeat a pair that was skipped."""
        skipped = {
            slot.showing.pair
            for slot in self._slots
            if slot.line is not None and not slot.showing.repeats
            and self._preferences.answers[slot.line]["answer"] == "skip"
        }  # fmt: skip
        return [s for s in self._slots if not (s.showing.repeats and s.showing.pair in skipped and s.line is None)]

    def _last(self) -> _Slot | None:
        answered = [slot for slot in self._slots if slot.line is not None]
        return max(answered, key=lambda slot: slot.line or 0, default=None)

    def _shown(self, slot: _Slot) -> tuple[RatedPicture, RatedPicture]:
        """The pictures of a showing: left, right."""
        first, second = self._pairs[slot.showing.pair].pictures
        return (second, first) if slot.showing.swapped else (first, second)

    def _on_page(self, slot: _Slot) -> dict[str, str]:
        left, right = slot.sides
        return {"name": slot.name, "prompt": self._pairs[slot.showing.pair].prompt, "left": left, "right": right}

    def _facts(self, picture: RatedPicture) -> dict[str, Any]:
        where = os.path.relpath(picture.path, self._preferences.path.parent)
        return {"picture": Path(where).as_posix(), "column": picture.column, **picture.facts}


def _key(prompt: str, sides: Iterable[Mapping[str, Any]], repeats: bool) -> _Key:
    """What makes a pair the same one, whichever side its pictures are on: what they were made of, else their files."""
    made = frozenset(
        (str(side.get("column")), str(side.get("seed")), str(side.get("hash") or side["picture"])) for side in sides
    )
    return prompt, made, repeats

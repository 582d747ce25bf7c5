"""One `draftp rate` from its request to what the answers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from draftcli.errors import warn
from draftcli.metrics.statistics import Estimate
from draftcli.rating.agreement import RatingSummary, agreement_with, summarise
from draftcli.rating.pairs import Pair, pairs_across, pairs_in_folder
from draftcli.rating.request import Candidates, RatingRequest
from draftcli.rating.session import RatingSession
from draftcli.rating.storage import open_preferences

_TICK = 0.5  # seconds: how often a wait looks round, as Windows delivers Ctrl-C only in between


@dataclass(frozen=True)
class RatingResult:
    """What came of it.

    Attributes:
        path: preferences.jsonl.
        summary: of the answers to this command's pairs, those of earlier times among them.
        columns: that were compared; one: two seeds of it.
        total: how many showings there are in all.
        judges: how far each reward agrees with the answers.
    """

    path: Path
    summary: RatingSummary
    columns: Sequence[str]
    total: int
    judges: dict[str, Estimate]


def rate_pictures(
    request: RatingRequest, candidates: Candidates, console: Console, announce: Callable[[str], None]
) -> RatingResult:
    """Serve the page while pairs are drawn and rated, until somebody finishes there or presses Ctrl-C here.

    Where every pair has its answer already, the page is not waited for.

    Args:
        request: what was asked for.
        candidates: from `check_rating`.
        console: where people look.
        announce: called with the page's address once it answers there.

    Raises:
        InputError: the folder is in use, the port is taken, or there is nothing to show.
        DraftpError: the disk refuses.
    """
    for line in candidates.notes:
        warn(line)
    ready = _pairs_that_are_there(request, candidates)
    count = len(ready) if candidates.folders else request.pairs
    if candidates.folders and count < request.pairs:
        warn(f"--pairs {request.pairs}: there are {count} pairs in {' and '.join(map(str, candidates.folders))}")
    from draftcli.rating.server import served

    with open_preferences(candidates.output) as preferences:
        session = RatingSession(preferences, count, candidates.seed)
        session.add(ready)
        with suppress(KeyboardInterrupt), served(session, request.port) as address:
            announce(address)
            if candidates.sources:
                from draftcli.rating.drawing import draw_pairs

                draw_pairs(request, candidates, session, console)
            is_over = session.given == 0 and session.state()["complete"]
            while not is_over and not session.ended.wait(_TICK):
                pass
        answers, total = session.answers(), session.state()["total"]
    judges = {
        name: agreement_with(answers, candidates.output, name, request.device) for name in dict.fromkeys(request.judges)
    }
    return RatingResult(preferences.path, summarise(answers, candidates.columns), candidates.columns, total, judges)


def _pairs_that_are_there(request: RatingRequest, candidates: Candidates) -> list[Pair]:
    if not candidates.folders:
        return []
    if len(candidates.folders) == 1:
        return pairs_in_folder(candidates.folders[0], candidates.columns[0], request.pairs, candidates.seed)
    return pairs_across(candidates.folders, candidates.columns, request.pairs, candidates.seed)

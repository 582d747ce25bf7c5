"""The pairs of a run or model: drawn one after the other, each on the page as soon as both pictures are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from draftcli.core.models.places import unread_prompts
from draftcli.errors import InputError, warn
from draftcli.prompts import Prompt
from draftcli.rating.pairs import Pair, RatedPicture, prompts_of_pairs
from draftcli.rating.request import Candidates, RatingRequest, read_request_prompts
from draftcli.rating.session import RatingSession
from draftcli.sampling.draw import Column, Picture, plan
from draftcli.sampling.files import write_pictures
from draftcli.sampling.job import picture_size, progress_bar
from draftcli.sampling.load import load_source
from draftcli.sampling.loras import named_loras
from draftcli.sampling.source import DrawingSource

PICTURES = "pictures"  # the folder of the drawn ones, in that of the answers


class _Ended(Exception):
    """Somebody has finished on the page before everything was drawn."""


class _Arrivals:
    """Pictures as they are drawn, a row a column, in the order of the pairs; hands on what has become a pair."""

    def __init__(self, candidates: Candidates, prompts: Sequence[Prompt], session: RatingSession) -> None:
        self.candidates, self.prompts, self.session = candidates, prompts, session
        self.rows: list[list[RatedPicture]] = [[] for _ in candidates.columns]
        self.paired = 0
        self.each = 2 if len(self.rows) == 1 else 1  # pictures of a row in a pair

    def take(self, row: int, picture: RatedPicture) -> None:
        """The next picture of a column."""
        if self.session.ended.is_set():
            raise _Ended
        self.rows[row].append(picture)
        drawn = sum(map(len, self.rows))
        self.session.doing = f"{drawn} of {2 * len(self.prompts)} images are there."
        self.session.add(self._new_pairs())

    def _new_pairs(self) -> Iterator[Pair]:
        while all(len(row) >= self.each * (self.paired + 1) for row in self.rows):
            place = slice(self.each * self.paired, self.each * (self.paired + 1))
            first, second = (picture for row in self.rows for picture in row[place])
            yield Pair(self.prompts[self.paired].text, (first, second))
            self.paired += 1


def draw_pairs(request: RatingRequest, candidates: Candidates, session: RatingSession, console: Console) -> None:
    """Draw the pictures of every pair into pictures/ beside the answers; what is there already is not drawn again.

    Of two runs the second one is drawn when the first one is done. Ends early where the session does.

    Args:
        request: what was asked for.
        candidates: what draws.
        session: gets every pair as soon as it is there.
        console: where people look.

    Raises:
        InputError: no prompts, or a model that cannot be loaded.
        DraftpError: the disk refuses.
    """
    prompts = read_request_prompts(request, candidates.sources[0])
    if not len(prompts):
        raise InputError("there is no prompt; give --prompt TEXT or --prompts FILE")
    chosen = prompts_of_pairs(prompts, request.pairs, candidates.seed)
    texts = [prompt.text for prompt, _ in chosen]
    unread = (unread_prompts(source.cfg.model.pretrained, texts) for source in candidates.sources)
    for line in [*prompts.notes_for(candidates.sources[0].cfg.sampling), *dict.fromkeys(filter(None, unread))]:
        warn(line)
    arrivals = _Arrivals(candidates, [prompt for prompt, _ in chosen], session)
    try:
        for number, source in enumerate(candidates.sources):
            columns = ["base"] if not source.is_tuned else ["tuned"]
            if len(candidates.sources) == 1:
                columns = list(candidates.columns)
            _draw_source(request, candidates, source, columns, number, chosen, arrivals, console)
    except _Ended:
        return


def _draw_source(
    request: RatingRequest,
    candidates: Candidates,
    source: DrawingSource,
    kinds: Sequence[str],
    number: int,
    chosen: Sequence[tuple[Prompt, int]],
    arrivals: _Arrivals,
    console: Console,
) -> None:
    arrivals.session.doing = "The model is being loaded, which may take a minute."
    model, folder = load_source(source), candidates.output / PICTURES
    size = picture_size(source, model)
    pictures: list[Picture] = []
    for prompt, before in chosen:
        pictures += plan([prompt], arrivals.each * (before + 1), candidates.seed, size)[arrivals.each * before :]
    about = {"model": source.name, "settings": model.cfg.sampling.summary}

    def take(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            row = number if len(candidates.sources) > 1 else kinds.index(line["weight"])
            arrivals.take(row, RatedPicture.of(folder, {**line, **about}, candidates.columns[row]))

    console.print(f"{source.name} on {model.runtime.reason}")
    with progress_bar(console, "drawing", len(pictures) * len(kinds)) as advance:
        write_pictures(
            model,
            [Column.of(kind) for kind in kinds],
            pictures,
            folder,
            batch_size=request.batch_size,
            loras=named_loras(source.loras, source.base_loras),
            progress=advance,
            told=take,
        )

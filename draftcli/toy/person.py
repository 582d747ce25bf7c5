"""A function in the place of a person: it rates on the page of `draftp rate`, by the requests that a browser makes.

    python -m draftcli.toy.person ADDRESS --doubt 0.05

The oracle can be that person, so that the way from ratings to a reward is measured where the truth is known.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from draftcli.pictures import open_picture
from draftcli.toy import oracle

Person = Callable[[Image.Image, Image.Image, str], str]
"""Called as person(left, right, prompt); returns left, right, neither or skip."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the page is on this machine
_PATIENCE = 0.2  # seconds between two looks whether the next pair is drawn


def rate_pairs(address: str, person: Person, most: int | None = None, finish: bool = True) -> int:
    """Answer every pair on the page at `address`, until there are no more or `draftp rate` ends; how many there were.

    Args:
        address: as `draftp rate` prints it.
        person: gives the answers.
        most: stop after so many.
        finish: end `draftp rate` afterwards.

    Raises:
        OSError: who answers there is not the page of `draftp rate`, or it could not keep an answer.
    """
    answered = 0
    try:
        state = _ask(address, "state")
        while not (state["complete"] or state["ended"] or answered == most):
            pair = state["pair"]
            if pair is None:
                time.sleep(_PATIENCE)
                state = _ask(address, "state")
                continue
            began = time.monotonic()
            left, right = (_picture(address, pair[side]) for side in ("left", "right"))
            answer = person(left, right, pair["prompt"])
            given = {"name": pair["name"], "answer": answer, "seconds": time.monotonic() - began}
            state = _ask(address, "answer", given)
            answered += 1
        if finish:
            _ask(address, "finish", {})
    except ConnectionError:  # it ends by itself where every pair has its answer
        pass
    return answered


def oracle_person(doubt: float = 0.05, seed: int = 0) -> Person:
    """A person who wants what the oracle wants, and is not always sure.

    The left picture is better with probability 1 / (1 + exp(-(its score - the other's) / doubt)) (Bradley & Terry
    1952), so that at a difference of `doubt` 73 % of the answers are the oracle's. Scores are in [0, 1].

    Args:
        doubt: above 0.
        seed: of the chance in the answers.
    """
    chance = random.Random(seed)

    def person(left: Image.Image, right: Image.Image, prompt: str) -> str:
        first, second = (float(oracle.oracle_score(_images(picture), [prompt])) for picture in (left, right))
        if math.isnan(first) or math.isnan(second):
            return "skip"
        surely = 1 / (1 + math.exp(min(700, (second - first) / doubt)))
        return "left" if chance.random() < surely else "right"

    return person


def _images(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32)).permute(2, 0, 1)[None] / 255


def _ask(address: str, what: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    body = None if given is None else json.dumps(given).encode()
    request = urllib.request.Request(address + what, body, {"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request) as response:
            return json.load(response)
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else error from None


def _picture(address: str, name: str) -> Image.Image:
    with _DIRECT.open(f"{address}picture/{name}") as response:
        return open_picture(io.BytesIO(response.read()), name)


def main(arguments: list[str] | None = None) -> None:
    """Let the oracle rate everything on a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="as draftp rate prints it")
    parser.add_argument("--doubt", type=float, default=0.05, help="difference of scores at which 73 %% are right")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(f"{rate_pairs(options.address, oracle_person(options.doubt, options.seed))} pairs were rated")


if __name__ == "__main__":
    main()
